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
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from pose_core.errors import ConfigError
from pose_core.models.folders import read_config
from pose_core.models.parts import clip_shapes
from pose_core.models.video_model import ClipShapes, Condition
from pose_core.settings import Settings
from pose_core.training import build, loop, parallel
from pose_core.training.memory import ROLES, Bytes, Segment, Tracker
from pose_core.training.optimizers import build_optimizers
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

    A network of more than a few blocks is simulated at two depths, and where features end before its last block, with
    two numbers of blocks up to them. All that a step holds, computes and sends grows evenly with either, except at the
    ends of each pass, which both have; so the rest is extended exactly. Of two experts, both run with one clip.

    Raises:
        ConfigError: a setting does not fit this teacher or this number of ranks, or the family cannot be simulated.
    """
    depth, reach = read_config(teacher, "transformer")["num_layers"], max(settings.equilibrium.feature_blocks) + 1
    shallow = max(LEAST_DEPTH, len(settings.equilibrium.feature_blocks))
    if depth <= shallow + DEPTH_STEP:
        return _simulate(phase, settings, teacher)

    def of_depth(blocks: int, up_to: int) -> Step:
        with _of_depth(teacher, blocks) as folder:
            return _simulate(phase, _with_features(settings, up_to), folder)

    deeper, more = shallow + DEPTH_STEP, (depth - shallow) / DEPTH_STEP
    if reach == depth:
        first = of_depth(shallow, shallow)
        return _extend(first, (first, of_depth(deeper, deeper), more))
    first, second = (of_depth(blocks, min(reach, shallow)) for blocks in (shallow, deeper))
    if reach <= shallow:
        return _extend(first, (first, second, more))
    return _extend(first, (first, second, more), (second, of_depth(deeper, deeper), (reach - shallow) / DEPTH_STEP))


def _simulate(phase: str, settings: Settings, teacher: Path) -> Step:
    device = torch.device("cpu")
    data, training = settings.data, settings.training
    size = {"frames": data.frames, "height": data.height, "width": data.width, "text_tokens": data.text_tokens}
    shapes = clip_shapes(teacher, task=settings.model.task, **size)
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
        for model in networks.models():
            model.unread = []  # there are no weights to read
        # The meshes hold real numbers: what reads them must not run among the fake.
        build.shard_networks(networks, settings, mesh)
        for model in networks.models():
            model.any_rank = lambda _flag: True  # of two experts, both run: some rank has a clip for each
        tracker = Tracker(training.workers, training.context_workers)
        with fake, tracker, _marked(tracker, networks):
            try:
                _run_step(phase, settings, networks, tracker, _batches(shapes, training.batch_per_worker))
            except DynamicOutputShapeException:
                raise ConfigError(
                    f"model.family={settings.model.family} cannot be simulated: the shapes in its stock network depend "
                    "on which prompt tokens are padding; --dry-run says what a worker holds between two steps"
                ) from None
        return Step(tuple(tracker.segments), tracker.flops, tracker.sent)


def _run_step(phase: str, settings: Settings, networks: Networks, tracker: Tracker, batches: Iterator[Batch]) -> None:
    turns = build.phase_turns(phase, settings)
    optimizers = build_optimizers(networks, turns, settings.training.weight_decay)
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


def _batches(shapes: ClipShapes, clips: int) -> Iterator[Batch]:
    for _ in itertools.count():
        image, first_frame = (
            None if shape is None else torch.empty(clips, *shape) for shape in (shapes.image, shapes.first_frame)
        )
        condition = Condition(torch.empty(clips, *shapes.text), image, first_frame)
        yield Batch(torch.empty(clips, *shapes.latents), condition)


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
            if not part.name.startswith("transformer"):
                (folder / part.name).symlink_to(part.resolve())
                continue
            (folder / part.name).mkdir()  # each of two experts
            config = read_config(teacher, part.name) | {"num_layers": blocks}
            (folder / part.name / "config.json").write_text(json.dumps(config))
        yield folder


def _with_features(settings: Settings, up_to: int) -> Settings:
    """As many features, the last of block ``up_to - 1``, at about the same shares of the way there."""
    chosen = sorted(settings.equilibrium.feature_blocks)
    found = [min(max(round((block + 1) * up_to / (chosen[-1] + 1)) - 1, 0), up_to - 1) for block in chosen]
    for index in range(1, len(found)):
        found[index] = max(found[index], found[index - 1] + 1)
    for index in reversed(range(len(found))):
        found[index] = min(found[index], up_to - len(found) + index)
    equilibrium = settings.equilibrium.model_copy(update={"feature_blocks": tuple(found)})
    return settings.model_copy(update={"equilibrium": equilibrium})


def _extend(first: Step, *ways: tuple[Step, Step, float]) -> Step:
    """The first step and, of each way, so many times the difference between its two steps."""
    parts = [(1.0, first)]
    for one, two, times in ways:
        parts += [(-times, one), (times, two)]
    passes = {tuple(segment.label for segment in step.segments) for _, step in parts}
    assert len(passes) == 1, "all depths of one network must take the same passes"
    segments = []
    for index, label in enumerate(passes.pop()):
        found = [(weight, step.segments[index].windows) for weight, step in parts]
        count = min(len(windows) for _, windows in found)
        places = [*range((count + 1) // 2), *range(-(count // 2), 0)]
        segments.append(Segment(label, [_added([(weight, at[place]) for weight, at in found]) for place in places]))
    flops, sent = (round(sum(w * getattr(step, name) for w, step in parts)) for name in ("flops", "sent"))
    return Step(tuple(segments), flops, sent)


def _added(parts: list[tuple[float, Bytes]]) -> Bytes:
    return {role: round(sum(weight * each[role] for weight, each in parts)) for role in ROLES}
