"""Stage 4, evaluate: one step against the teacher on held-out clips; figures, contact sheet and videos.

With --suite vbench_i2v --images FOLDER, a finished run is put through VBench-I2V instead: FOLDER is vbench2_beta_i2v of
a checkout of VBench with its images.
"""

import argparse
from pathlib import Path

from pose_core.errors import ConfigError
from pose_core.runtime import cli
from pose_core.runtime.evaluating import evaluate_generators
from pose_core.runtime.session import open_session
from pose_core.runtime.stage import stage_run
from pose_core.runtime.vbench_suite import check_suite, evaluate_suite


def main(arguments: cli.Arguments) -> None:
    suite, images = arguments.options.suite, arguments.options.images
    if suite is None:
        with open_session(arguments.settings) as session, stage_run("evaluate", session.settings) as run:
            return evaluate_generators(run)
    if images is None:
        raise ConfigError(f"--suite {suite} needs --images FOLDER, vbench2_beta_i2v of a checkout of VBench")
    check_suite(arguments.settings, images)
    with open_session(arguments.settings) as session, stage_run(suite, session.settings) as run:
        evaluate_suite(run, images)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", choices=["vbench_i2v"], help="a public benchmark in place of the run's own report")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="the suite's prompts and images")


if __name__ == "__main__":
    cli.run(main, __doc__, options=options)
