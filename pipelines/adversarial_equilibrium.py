"""Stage 3, unified adversarial equilibrium: the primed generator sharpens itself as its own discriminator."""

from pose_core.runtime import cli
from pose_core.runtime.phases import train_phase
from pose_core.runtime.rehearsal import rehearse
from pose_core.runtime.session import open_session
from pose_core.runtime.stage import stage_run


def main(arguments: cli.Arguments) -> None:
    if arguments.rehearse:
        return rehearse(arguments.settings, "prepare_data", "stability_priming", "adversarial_equilibrium")
    with open_session(arguments.settings) as session, stage_run("adversarial_equilibrium", session.settings) as run:
        train_phase(run, "equilibrium", start_from="stability_priming")


if __name__ == "__main__":
    cli.run(main, __doc__, rehearse=True)
