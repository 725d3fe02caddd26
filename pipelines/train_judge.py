"""Train the judge: the small classifier behind the quality figures of the embedded domain.

    python pipelines/train_judge.py --out pipelines/configs/teachers/digits_judge

takes a few minutes on one core and ends with the judge's accuracy on handwriting it has not seen.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pose_core.evaluation import judge
from pose_core.runtime.cli import positive_int

HELDOUT_SEED = 2**31
"""Drawn by no run: settings allow seeds below it."""


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    columns = (TextColumn("judge"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[loss]}")) as bar:
        task = bar.add_task("judge", total=arguments.steps, loss="")
        trained = judge.train(
            steps=arguments.steps,
            seed=arguments.seed,
            progress=lambda done, loss: bar.update(task, completed=done, loss=f"loss {loss:.3f}"),
        )
    heldout = {name: round(share, 4) for name, share in judge.accuracy(trained, seed=HELDOUT_SEED).items()}
    trained.save(arguments.out, {"steps": arguments.steps, "seed": arguments.seed, "heldout_accuracy": heldout})
    print(f"held-out digits {heldout['digit']:.1%}, motions {heldout['motion']:.1%}; wrote {arguments.out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("pipelines/configs/teachers/digits_judge"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=positive_int, default=900)
    parser.add_argument(
        "--threads", type=positive_int, default=1, help="torch threads; results repeat for the same number"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
