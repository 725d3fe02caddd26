"""A training step without GPU, weights or data: the real networks, sharding and turns on tensors without numbers.

What it finds holds for the operations as a CPU runs them one by one; kernels that a GPU fuses need less, and what a
kernel takes for itself is not seen.
"""

from __future__ import annotations

import gc
import itertools
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pose_core.models.parts import clip_shapes
from pose_core.models.video_model import Condition
from pose_core.models.wan import read_config
from pose_core.settings import Settings
from pose_core.training import build, loop, parallel
from pose_core.training.memory import ROLES, Bytes, Segment, Tracker
from pose_core.training.state import Batch, Networks

LEAST_DEPTH = 4
"""Blocks of the shallower of two networks from which a deep one is extended; more, if features of more are taken."""
DEPTH_STEP = 2


@dataclass(frozen=True)
class Step:
    """One training step of one rank (the first, whose shards are the largest) in the steady state.

    flops  multiplications and additions, counted separately
    sent   bytes that the rank receives over its links, about as many as it sends
    """

    segments: tuple[Segment, ...]
    flops: int
    sent: int

    @property
    def peak(self) -> Bytes:
        """Bytes by role at the moment that holds most."""
        return max((window for segment in self.segments for window in segment.windows), key=lambda w: sum(w.values()))

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())


def simulate(phase: str, settings: Settings, teacher: Path) -> Step:
    """One step of ``phase`` as ``settings`` ask for, on as many ranks as ``training.workers`` says.

    A network of more than a few blocks is simulated at two depths. All that a step holds, computes and sends grows
    evenly with the number of blocks, except at the ends of each pass, which both have; so the rest is extended exactly.

    Raises:
        ConfigError: a setting does not fit this teacher or this number of ranks.
    """
    depth = read_config(teacher, "transformer")["num_layers"]
    shallow = max(LEAST_DEPTH, len(settings.equilibrium.feature_blocks))
    if depth <= shallow + DEPTH_STEP:
        return _simulate(phase, settings, teacher)

    def of_depth(fewer: int) -> Step:
        with _of_depth(teacher, fewer) as folder:
            return _simulate(phase, _with_features(settings, depth, fewer), folder)

    return _extend(of_depth(shallow), of_depth(shallow + DEPTH_STEP), (depth - shallow) / DEPTH_STEP)


def _simulate(phase: str, settings: Settings, teacher: Path) -> Step:
    device = torch.device("cpu")
    data, training = settings.data, settings.training
    shapes = clip_shapes(
        teacher, frames=data.frames, height=data.height, width=data.width, text_tokens=data.text_tokens
    )
    gc.collect()
    with ExitStack() as stack:
        stack.enter_context(parallel.pretended(training.workers))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        mesh = parallel.build_mesh(training, device)
        nothing = torch.empty(0, device="meta")
        with nothing.device:
            networks = build.build_networks(
                phase, settings, teacher, teacher, nothing, device=nothing.device, meta=True
            )
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake:
            for module in networks.modules():
                _materialise(module, device)
            networks.null_text = torch.zeros(1, *shapes.text)
        # The meshes hold real numbers: what reads them must not run among the fake.
        build.shard_networks(networks, settings, mesh)
        tracker = Tracker(training.workers, training.context_workers)
        with fake, tracker, _marked(tracker, networks):
            _run_step(phase, settings, networks, tracker, _batches(shapes.trained_on, training.batch_per_worker))
        return Step(tuple(tracker.segments), tracker.flops, tracker.sent)


def _run_step(phase: str, settings: Settings, networks: Networks, tracker: Tracker, batches: Iterator[Batch]) -> None:
    turns = build.phase_turns(phase, settings)
    optimizers = loop.build_optimizers(networks, turns, settings.training.weight_decay)
    tracker.tag((p for module in networks.modules() for p in [*module.parameters(), *module.buffers()]), "weights")
    tracker.tag(networks.average.weights().values(), "average")
    for optimizer in optimizers.values():  # the moments are made by its first step
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        tracker.tag((v for state in optimizer.state.values() for v in state.values()), "optimiser")
        for parameter in parameters:
            parameter.grad = None
    tracker.forget()
    tracker.start("begin")
    loop.train(
        networks,
        optimizers,
        turns,
        batches,
        first_step=0,
        steps=1,
        seed=settings.run.seed,
        gradient_clip=settings.training.gradient_clip,
        ema_decay=getattr(settings, phase).ema_decay,
        after_step=lambda _step, _values: None,
        non_finite_steps=settings.alarms.non_finite_steps,
        accumulation=settings.training.accumulation,
    )
    tracker.finish()


def _materialise(module: nn.Module, device: torch.device) -> None:
    """Give every parameter and buffer a storage (fake, where fake tensors are made) in place of none."""
    for each in module.modules():
        for name, parameter in list(each._parameters.items()):
            if parameter is not None:
                value = torch.empty_like(parameter, device=device)
                each._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        for name, buffer in list(each._buffers.items()):
            if buffer is not None:
                each._buffers[name] = torch.empty_like(buffer, device=device)


def _batches(shapes: list[tuple[int, ...]], clips: int) -> Iterator[Batch]:
    for _ in itertools.count():
        x_0, *condition = (torch.empty(clips, *shape) for shape in shapes)
        yield Batch(x_0, Condition(*condition))


@contextmanager
def _marked(tracker: Tracker, networks: Networks) -> Iterator[None]:
    """Inside, every forward pass of a network and every backward pass begins a segment."""
    within = False

    def marking(call: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*args: Any, **kwargs: Any) -> Any:
            nonlocal within
            if within:  # attention over shared tokens differentiates itself
                return call(*args, **kwargs)
            within = True
            tracker.start("backward")
            found = call(*args, **kwargs)
            tracker.start("after")
            within = False
            return found

        return marked

    hooks = [
        model.module.register_forward_pre_hook(lambda *_: tracker.start("forward"), prepend=True)
        for model in networks.models()
    ]
    with (
        mock.patch.object(torch.autograd, "backward", marking(torch.autograd.backward)),
        mock.patch.object(torch.autograd, "grad", marking(torch.autograd.grad)),
    ):
        yield
    for hook in hooks:
        hook.remove()


@contextmanager
def _of_depth(teacher: Path, blocks: int) -> Iterator[Path]:
    """The teacher's folder with a transformer of ``blocks`` blocks; only its configs are there."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in teacher.iterdir():
            if part.name != "transformer":
                (folder / part.name).symlink_to(part.resolve())
        (folder / "transformer").mkdir()
        config = read_config(teacher, "transformer") | {"num_layers": blocks}
        (folder / "transformer" / "config.json").write_text(json.dumps(config))
        yield folder


def _with_features(settings: Settings, depth: int, fewer: int) -> Settings:
    """Features taken at about the same share of a shallower network."""
    chosen = settings.equilibrium.feature_blocks
    found = [min(max(round((block + 1) * fewer / depth) - 1, 0), fewer - 1) for block in sorted(chosen)]
    for index in range(1, len(found)):
        found[index] = max(found[index], found[index - 1] + 1)
    for index in reversed(range(len(found))):
        found[index] = min(found[index], fewer - len(found) + index)
    equilibrium = settings.equilibrium.model_copy(update={"feature_blocks": tuple(found)})
    return settings.model_copy(update={"equilibrium": equilibrium})


def _extend(first: Step, second: Step, times: float) -> Step:
    """The step of a network ``times`` as many blocks deeper than the first as the second is."""
    labels = [[segment.label for segment in step.segments] for step in (first, second)]
    assert labels[0] == labels[1], "two depths of one network must take the same passes"
    segments = []
    for one, two in zip(first.segments, second.segments, strict=True):
        count = min(len(one.windows), len(two.windows))
        places = [*range((count + 1) // 2), *range(-(count // 2), 0)]
        windows = [_along(one.windows[place], two.windows[place], times) for place in places]
        segments.append(Segment(one.label, windows))
    numbers = ((getattr(first, name), getattr(second, name)) for name in ("flops", "sent"))
    return Step(tuple(segments), *(round(a + (b - a) * times) for a, b in numbers))


def _along(first: Bytes, second: Bytes, times: float) -> Bytes:
    return {role: round(first[role] + (second[role] - first[role]) * times) for role in ROLES}
