"""Stage 5, export: the folder that stock diffusers loads, registered in MLflow, and LoRA files, with model cards."""

from pose_core.runtime import cli
from pose_core.runtime.exporting import export_generator
from pose_core.runtime.session import open_session
from pose_core.runtime.stage import stage_run


def main(arguments: cli.Arguments) -> None:
    with open_session(arguments.settings) as session, stage_run("export", session.settings) as run:
        export_generator(run)


if __name__ == "__main__":
    cli.run(main, __doc__)
