"""Compare the method with its ablations and rivals: same teacher, clips, generator updates; then same CPU seconds.

    python pipelines/compare.py --config pipelines/configs/digits_i2v.yaml --seeds 3

trains every row, some hours on two cores, and writes tables, contact sheet and loss curves to benchmarks/results and to
MLflow. The same command goes on where it stopped; ``--only pose,dmd2`` makes single rows.
"""

import argparse
from pathlib import Path

from pose_core.data.captions import HELDOUT
from pose_core.runtime import cli
from pose_core.runtime.comparing import METHODS, TABLES, Wanted, open_comparison

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def main(arguments: cli.Arguments) -> None:
    typed = arguments.options
    fields = {name: getattr(typed, name) for name in ("seeds", "only", "tables", "split", "parallel", "out")}
    wanted = Wanted(stem=Path(typed.config).stem, **fields)
    with open_comparison(arguments.settings, wanted) as comparison:
        comparison.prepare_clips()  # once, by the real stage
        for table in wanted.tables:
            comparison.make_rows(table)  # a process a row: train, sample, score
        comparison.report()


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=cli.positive_int, default=3, help="seeds a row, from run.seed on (default: 3)")
    rows = f"make only these rows, of {', '.join(METHODS)}"
    parser.add_argument("--only", type=names, default=(), metavar="ROW,ROW", help=rows)
    parser.add_argument(
        "--tables", type=tables, default=tuple(TABLES), help="equal generator updates, equal CPU time (updates,time)"
    )
    parser.add_argument("--split", choices=HELDOUT, default="test", help="clips that are scored (default: test)")
    parser.add_argument("--parallel", type=cli.positive_int, default=2, help="rows at a time, a core each (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")


def names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def tables(text: str) -> tuple[str, ...]:
    if not names(text) or set(names(text)) - set(TABLES):
        raise argparse.ArgumentTypeError(f"{text!r} is not one or both of {', '.join(TABLES)}")
    return names(text)


if __name__ == "__main__":
    cli.run(main, __doc__, options=options)
