"""Distil a video model end to end: every stage as its own Ray job, skipping what is already done.

Without arguments it distils the embedded demo: image to video on moving digits, on this machine, in minutes.
"""

from pose_core.runtime import cli, screen
from pose_core.runtime.chain import open_chain
from pose_core.runtime.dry_run import dry_run
from pose_core.runtime.rehearsal import rehearse
from pose_core.runtime.session import open_session


def main(arguments: cli.Arguments) -> None:
    if arguments.dry_run:
        return dry_run(arguments.settings)
    if arguments.rehearse:
        return rehearse(arguments.settings, "full_distill")
    with open_session(arguments.settings, driver=False) as session:
        screen.header(session)
        with open_chain(session, debug=arguments.debug) as chain:
            chain.run("prepare_data")  # raw video shards -> latents and embeddings
            chain.run("stability_priming")  # phase I: towards the teacher's distribution
            chain.run("adversarial_equilibrium")  # phase II: the generator is its own discriminator
            chain.run("evaluate")  # one step against the teacher on held-out clips
            chain.run("export")  # a folder for stock diffusers, registered in MLflow
        screen.results(session, chain.results)


if __name__ == "__main__":
    cli.run(main, __doc__, dry_run=True, rehearse=True)
