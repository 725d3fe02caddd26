"""Not a benchmark: real training steps of a published model's shape on the GPU at hand, for ``plan_accuracy.py``.

Networks, sharding, turns and loop are those of a worker of one rank; weights and clips are random numbers, which what a
step allocates and computes does not depend on.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from figures import Figure
from torch import Tensor, nn

from pose_core import config
from pose_core.errors import ConfigError
from pose_core.models import families
from pose_core.models.folders import local_teacher
from pose_core.models.parts import clip_shapes
from pose_core.models.video_model import ClipShapes, Condition, Shape
from pose_core.settings import Settings
from pose_core.training import build, loop, parallel
from pose_core.training.devices import peak_teraflops
from pose_core.training.optimizers import build_optimizers
from pose_core.training.plan import PHASES
from pose_core.training.simulation import simulate
from pose_core.training.state import Batch


@dataclass(frozen=True)
class Measured:
    """What the timed steps of a phase took.

    peak_bytes      the most that tensors held at once
    reserved_bytes  the most that torch's allocator took from the device for them
    seconds         of each step
    """

    peak_bytes: int
    reserved_bytes: int
    seconds: list[float]


class RandomWeights:
    """In place of a folder's files: small numbers, so that nothing overflows."""

    def check(self, _module: nn.Module) -> None:
        """Any module will do."""

    def read(self, _name: str, into: Tensor, _first_row: int = 0) -> None:
        if into.ndim > 1:
            into.normal_(std=0.02)
        else:  # a scale, or a bias that may as well be one
            into.fill_(1.0)

    def close(self) -> None:
        """There is nothing to close."""


def figures_of(path: Path, overrides: list[str], steps: int, bar: float) -> tuple[list[Figure], dict[str, Any]]:
    """Figures of both phases of the config at ``path`` on one rank, and what was measured.

    Raises:
        ConfigError: there is no GPU, or the settings do not fit the model.
    """
    if not torch.cuda.is_available():
        raise ConfigError("--gpu: torch finds no GPU here; leave it out to measure on the CPU")
    settings = config.load(path.read_text(), [*overrides, "training.workers=1"], source=str(path))
    teacher = local_teacher(settings.model.teacher, settings.model.revision, weights=False)
    device = torch.device("cuda", 0)
    gpu = torch.cuda.get_device_properties(device)
    peak = settings.tracking.device_teraflops or peak_teraflops(gpu.name, settings.training.precision)
    tokens = _shapes(settings, teacher, settings.data.frames).tokens * settings.training.batch_per_worker
    found, errors = [], []
    for phase in PHASES:
        planned = simulate(phase, settings, teacher)
        measured = measure(phase, settings, teacher, device, steps)
        seconds = median(measured.seconds)
        ratio = planned.peak_bytes / measured.peak_bytes
        errors.append(abs(ratio - 1))
        print(f"{phase}: planned {planned.peak}, measured {measured}", file=sys.stderr)
        found += [
            Figure(f"plan_ratio_gpu_{phase}", ratio, "x", None, 1),
            Figure(f"peak_gpu_{phase}", measured.peak_bytes, "B", None, 1),
            Figure(f"reserved_gpu_{phase}", measured.reserved_bytes, "B", None, 1),
            Figure(f"step_seconds_gpu_{phase}", seconds, "s", None, steps),
            Figure(f"tokens_per_second_gpu_{phase}", tokens / seconds, "1/s", None, steps),
        ]
        if peak:
            share = planned.flops / seconds / (peak * 1e12)
            found.append(Figure(f"utilisation_gpu_{phase}", share, "x", None, steps))
    found.append(Figure("plan_error_gpu", max(errors), "x", bar, len(errors)))
    return found, {
        "gpu": f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, {peak} TFLOP/s at most",
        "config": path.name,
        "settings": [*overrides, "training.workers=1"],
        "tokens_a_step": tokens,
        "steps": f"{steps} timed, behind one on clips of {_short(settings, teacher)} frames",
        "plan_error_gpu": "largest of |planned / measured - 1|",
    }


def measure(phase: str, settings: Settings, teacher: Path, device: torch.device, steps: int) -> Measured:
    """``steps`` steps as a worker takes them, behind a short one in which the optimisers make their moments."""
    with tempfile.TemporaryDirectory() as name:
        dist.init_process_group("nccl", init_method=f"file://{name}/rendezvous", rank=0, world_size=1)
        try:
            return _measure(phase, settings, teacher, device, steps)
        finally:
            dist.destroy_process_group()
            gc.collect()
            torch.cuda.empty_cache()


def _measure(phase: str, settings: Settings, teacher: Path, device: torch.device, steps: int) -> Measured:
    training, shapes = settings.training, _shapes(settings, teacher, settings.data.frames)
    null_text = torch.zeros(1, *shapes.text, device=device)
    networks = build.build_networks(phase, settings, teacher, teacher, null_text, device=device, meta=True)
    for model in networks.models():
        model.unread = [(module, RandomWeights()) for module, _ in model.unread]
    build.shard_networks(networks, settings, parallel.build_mesh(training, device))
    turns = build.phase_turns(phase, settings)
    optimizers = build_optimizers(networks, turns, training.weight_decay)
    moments: list[float] = []

    def batches() -> Iterator[Batch]:
        yield _random(_shapes(settings, teacher, _short(settings, teacher)), training.batch_per_worker, device)
        torch.cuda.reset_peak_memory_stats(device)
        batch = _random(shapes, training.batch_per_worker, device)
        while True:
            yield batch

    def after_step(_step: int, _values: dict[str, Tensor]) -> None:
        torch.cuda.synchronize(device)
        moments.append(time.perf_counter())

    loop.train(
        networks,
        optimizers,
        turns,
        batches(),
        first_step=0,
        steps=1 + steps,
        seed=settings.run.seed,
        gradient_clip=training.gradient_clip,
        ema_decay=getattr(settings, phase).ema_decay,
        after_step=after_step,
        non_finite_steps=1,
        accumulation=training.accumulation,
    )
    return Measured(
        torch.cuda.max_memory_allocated(device),
        torch.cuda.max_memory_reserved(device),
        [after - before for before, after in zip(moments, moments[1:], strict=False)],
    )


def _short(settings: Settings, teacher: Path) -> int:
    """Frames of a clip of two latent frames."""
    return 1 + families.get(settings.model.family).compression(teacher)[0]


def _shapes(settings: Settings, teacher: Path, frames: int) -> ClipShapes:
    data = settings.data
    size = {"frames": frames, "height": data.height, "width": data.width, "text_tokens": data.text_tokens}
    return clip_shapes(teacher, task=settings.model.task, **size)


def _random(shapes: ClipShapes, clips: int, device: torch.device) -> Batch:
    def clip_of(shape: Shape) -> Tensor:
        return torch.randn(clips, *shape, device=device)

    image, first_frame = (None if shape is None else clip_of(shape) for shape in (shapes.image, shapes.first_frame))
    return Batch(clip_of(shapes.latents), Condition(clip_of(shapes.text), image, first_frame))
