"""Stage 2, stability priming: pull one-step videos towards the teacher's distribution before anything adversarial."""

from pose_core.runtime import cli
from pose_core.runtime.phases import train_phase
from pose_core.runtime.rehearsal import rehearse
from pose_core.runtime.session import open_session
from pose_core.runtime.stage import stage_run


def main(arguments: cli.Arguments) -> None:
    if arguments.rehearse:
        return rehearse(arguments.settings, "prepare_data", "stability_priming")
    with open_session(arguments.settings) as session, stage_run("stability_priming", session.settings) as run:
        train_phase(run, "priming")


if __name__ == "__main__":
    cli.run(main, __doc__, rehearse=True)
