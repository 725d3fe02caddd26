"""How close the planner comes: planned over measured peak memory of real training steps on the CPU.

Three transformers, both phases, one and two FSDP ranks over gloo. Planned is what ``pose_core/training/simulation.py``
finds on tensors without numbers. Measured are real networks with real numbers: torch's own CPU allocator reports every
block that it hands out and takes back, inside of kernels too, and the peak is that of the second step, of rank 0.

With ``--gpu CONFIG`` instead: both phases of that config, one rank, on the GPU at hand (see ``gpu_steps.py``).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import gpu_steps
import torch
import torch.multiprocessing as mp
from figures import Figure, record, show
from loopback import run_as_rank
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from pose_core import config
from pose_core.models import small
from pose_core.models.parts import clip_shapes
from pose_core.models.video_model import Condition
from pose_core.runtime.cli import errors_for_people, positive_int
from pose_core.settings import Settings
from pose_core.training import build, loop, parallel
from pose_core.training.optimizers import build_optimizers
from pose_core.training.plan import PHASES
from pose_core.training.simulation import simulate
from pose_core.training.state import Batch

BAR = 0.05
RANKS = (1, 2)
SIZES = {"small": (4, 4), "medium": (8, 6), "large": (12, 8)}
"""Attention heads of 32 channels and blocks."""
OPTIONS = [
    "training.batch_per_worker=4",
    "training.activation_checkpointing=full",
    "data.frames=9",
    "data.height=64",
    "data.width=64",
    "evaluation.judge=",
]
PROMPTS = ["a seven moving up and left"]
SECOND_STEP = "second step"


def main() -> None:
    arguments = parse_arguments()
    load_average = os.getloadavg()[0]
    if arguments.gpu:
        figures, conditions = gpu_steps.figures_of(arguments.gpu, arguments.overrides, arguments.steps, BAR)
    else:
        figures, conditions = on_cpu(arguments.sizes.split(","))
    show(figures)
    if arguments.record:
        print(f"recorded in {record('plan_accuracy', figures, conditions, load_average)}", file=sys.stderr)


def on_cpu(sizes: list[str]) -> tuple[list[Figure], dict[str, Any]]:
    """The figures, and what was measured."""
    torch.set_num_threads(1)
    figures, errors = [], []
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "wan"
            save_teacher(folder, *SIZES[size])
            for phase in PHASES:
                for ranks in RANKS:
                    settings = settings_of(folder, SIZES[size][1], ranks)
                    planned = simulate(phase, settings, folder).peak_bytes
                    measured = measure(phase, settings, folder, Path(name))
                    errors.append(abs(planned / measured - 1))
                    print(f"{size} {phase} {ranks}: planned {planned:,}, measured {measured:,}", file=sys.stderr)
                    figures.append(Figure(f"plan_ratio_{size}_{phase}_{ranks}", planned / measured, "x", None, 1))
    figures.append(Figure("plan_error", max(errors), "x", BAR, len(errors)))
    return figures, {
        "transformers": {size: f"{blocks} blocks, width {32 * heads}" for size, (heads, blocks) in SIZES.items()},
        "settings": OPTIONS,
        "plan_error": "largest of |planned / measured - 1|",
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SIZES), help="of small,medium,large (default: all)")
    parser.add_argument("--gpu", type=Path, metavar="CONFIG", help="a config's model and clips, on the GPU here")
    parser.add_argument("--steps", type=positive_int, default=2, help="with --gpu: timed steps a phase (default: 2)")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value", help="with --gpu: settings to change")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results/plan_accuracy.json")
    return parser.parse_args()


def save_teacher(folder: Path, heads: int, blocks: int) -> None:
    pipeline = small.build_pipeline(PROMPTS, seed=0)
    torch.manual_seed(0)
    pipeline.transformer = small.build_transformer(heads=heads, layers=blocks)
    pipeline.save_pretrained(folder)


def settings_of(folder: Path, blocks: int, ranks: int) -> Settings:
    features = [blocks // 2 - 1, blocks - 1]
    own = [f"model.teacher={folder}", f"equilibrium.feature_blocks={features}", f"training.workers={ranks}"]
    return config.load("", [*OPTIONS, *own])


def measure(phase: str, settings: Settings, folder: Path, scratch: Path) -> int:
    """Peak bytes of rank 0 in its second step, on ranks of processes of their own."""
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        mp.spawn(_rank, (phase, settings, folder, Path(out)), nprocs=settings.training.workers)
        return int((Path(out) / "peak").read_text())


def _rank(rank: int, phase: str, settings: Settings, folder: Path, out: Path) -> None:
    def work() -> None:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            train(phase, settings, folder)
        if rank == 0:
            (out / "peak").write_text(str(peak_of_second_step(profiler)))

    run_as_rank(rank, settings.training.workers, out, work)


def train(phase: str, settings: Settings, folder: Path) -> None:
    """Two steps as a worker takes them; the second is marked in the profile."""
    device, training = torch.device("cpu"), settings.training
    data = settings.data
    shapes = clip_shapes(folder, frames=data.frames, height=data.height, width=data.width, text_tokens=data.text_tokens)
    networks = build.build_networks(phase, settings, folder, folder, torch.zeros(1, *shapes.text), device=device)
    build.shard_networks(networks, settings, parallel.build_mesh(training, device))
    turns = build.phase_turns(phase, settings)
    optimizers = build_optimizers(networks, turns, training.weight_decay)

    def batches():
        while True:
            x_0, *condition = (torch.randn(training.batch_per_worker, *shape) for shape in shapes.trained_on)
            yield Batch(x_0, Condition(*condition))

    def run(first_step: int) -> None:
        loop.train(
            networks,
            optimizers,
            turns,
            batches(),
            first_step=first_step,
            steps=first_step + 1,
            seed=0,
            gradient_clip=training.gradient_clip,
            ema_decay=0.9,
            after_step=lambda _step, _values: None,
            non_finite_steps=3,
        )

    run(0)
    with record_function(SECOND_STEP):
        run(1)


def peak_of_second_step(profiler: profile) -> int:
    """The most bytes allocated at once while the marked step ran, of all that were allocated since the start."""
    events: Any = profiler.profiler
    pending = list(events.kineto_results.experimental_event_tree())
    changes, window = [], (0, 0)
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.typed[1].alloc_size, event.typed[1].ptr))
        elif event.name == SECOND_STEP:
            window = event.start_time_ns, event.end_time_ns
    held: dict[int, int] = {}
    total = peak = 0
    for when, size, pointer in sorted(changes, key=lambda change: change[0]):
        # A block that a thread of gloo gives back is not reported; it is free once its address is handed out again.
        total -= held.pop(pointer, 0)
        if size > 0:
            held[pointer] = size
            total += size
        if window[0] <= when <= window[1]:
            peak = max(peak, total)
    return peak


if __name__ == "__main__":
    with errors_for_people(debug=False):
        main()
