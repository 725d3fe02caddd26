"""Stage 1, prepare data: raw clips in object storage become training shards (latents, text and image embeddings)."""

from pose_core.runtime import cli, preparing
from pose_core.runtime.session import open_session
from pose_core.runtime.stage import stage_run
from pose_core.runtime.teachers import teacher_folder


def main(arguments: cli.Arguments) -> None:
    with open_session(arguments.settings) as session, stage_run("prepare_data", session.settings) as run:
        raw = preparing.raw_videos(run)
        preparing.prepare_shards(run, raw, teacher_folder(run.settings.model))


if __name__ == "__main__":
    cli.run(main, __doc__)
