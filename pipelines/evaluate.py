"""Stage 4, evaluate: one step against the teacher on held-out clips; figures, contact sheet and videos."""

from pose_core.runtime import cli
from pose_core.runtime.evaluating import evaluate_generators
from pose_core.runtime.session import open_session
from pose_core.runtime.stage import stage_run


def main(arguments: cli.Arguments) -> None:
    with open_session(arguments.settings) as session, stage_run("evaluate", session.settings) as run:
        evaluate_generators(run)


if __name__ == "__main__":
    cli.run(main, __doc__)
