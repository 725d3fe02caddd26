"""Trains every phase of a method in one process, with the turns, loop, optimisers and average of a cluster's workers.

A comparison trains some sixty small generators: starting a cluster and its workers for each would cost a laptop more
than the training, and would blur the CPU seconds that the comparison counts.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pose_core.settings import Settings
from pose_core.training import build, loop, parallel
from pose_core.training.optimizers import build_optimizers
from pose_core.training.state import Batch, Networks

Advance = Callable[[float], None]
"""Called after every step with the share of the training that is done, in [0, 1]."""


@dataclass
class Trained:
    """What a training took, and what its losses did."""

    updates: int = 0
    """Generator updates, all phases together."""
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    """Of the training steps alone, by phase."""
    curves: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """Losses and gradient norms by ``phase/turn/name``, after so many generator updates."""


def steps_by_phase(settings: Settings) -> dict[str, int]:
    """Generator updates of the phases that the settings ask for, in order; a phase of no steps is left out."""
    steps = {"priming": settings.priming.steps, "equilibrium": settings.equilibrium.steps}
    return {phase: count for phase, count in steps.items() if count}


def share_seconds(settings: Settings, spent: Mapping[str, float], steps: Mapping[str, int]) -> dict[str, float]:
    """CPU seconds that each phase may use, as many in all as another method ``spent`` on its ``steps``, by phase.

    A method with one phase gets them all. One with both gets for each what its own steps would have cost the other, as
    a share of the whole.
    """
    whole = sum(spent.values())
    # What a step costs in a phase that the other has not: as much as its steps do on average.
    average = whole / sum(steps.values())
    costs = {
        phase: number * (spent[phase] / steps[phase] if phase in steps else average)
        for phase, number in steps_by_phase(settings).items()
    }
    return {phase: whole * cost / sum(costs.values()) for phase, cost in costs.items()}


def train_method(
    settings: Settings,
    teacher: Path,
    null_text: Tensor,
    clips: Batch,
    out: Path,
    *,
    seconds: Mapping[str, float] | None = None,
    advance: Advance = lambda share: None,
) -> Trained:
    """Train on ``clips`` (all of them, as one batch) and write the averaged generator to ``out/transformer``.

    A step's batch has ``training.workers * training.batch_per_worker`` clips, as on a cluster. Each phase runs for its
    steps or, with ``seconds`` by phase, until the step that uses up its CPU seconds, however many steps that takes.
    Weights and computation are float32.
    """
    trained = Trained()
    phases = list(steps_by_phase(settings))
    with tempfile.TemporaryDirectory() as scratch:
        start = teacher
        for phase in phases:
            networks = build.build_networks(phase, settings, teacher, start, null_text, device=torch.device("cpu"))
            _train_phase(phase, settings, networks, clips, trained, seconds, advance)
            start = out if phase == phases[-1] else Path(scratch) / phase
            networks.average.save(start / "transformer", parallel.gather_weights(networks.average.module))
    return trained


def _train_phase(
    phase: str,
    settings: Settings,
    networks: Networks,
    clips: Batch,
    trained: Trained,
    seconds: Mapping[str, float] | None,
    advance: Advance,
) -> None:
    training, before, plan = settings.training, trained.updates, steps_by_phase(settings)
    turns = build.phase_turns(phase, settings)
    optimizers = build_optimizers(networks, turns, training.weight_decay)
    started = time.process_time()

    def after_step(step: int, values: dict[str, Tensor]) -> bool:
        trained.updates, trained.cpu_seconds[phase] = before + step, time.process_time() - started
        if step % settings.tracking.log_every_steps == 0:
            named = {f"{phase}/{name}": value for name, value in parallel.mean_over_ranks(values).items()}
            trained.curves.append((trained.updates, named))
        advance(min(share(), 1.0))
        return seconds is not None and trained.cpu_seconds[phase] >= seconds[phase]

    def share() -> float:
        if seconds is None:
            return trained.updates / sum(plan.values())
        return sum(trained.cpu_seconds.values()) / sum(seconds.values())

    loop.train(
        networks,
        optimizers,
        turns,
        shuffled(clips, training.workers * training.batch_per_worker, settings.run.seed),
        first_step=0,
        steps=plan[phase] if seconds is None else sys.maxsize,
        seed=settings.run.seed,
        gradient_clip=training.gradient_clip,
        ema_decay=getattr(settings, phase).ema_decay,
        after_step=after_step,
        non_finite_steps=settings.alarms.non_finite_steps,
        accumulation=training.accumulation,
    )


def shuffled(clips: Batch, size: int, seed: int) -> Iterator[Batch]:
    """Batches of ``size`` clips without end: epoch after epoch, each in a new order that ``seed`` decides."""

    def rows() -> Iterator[int]:
        for epoch in itertools.count():
            yield from np.random.default_rng([seed, epoch]).permutation(len(clips.x_0)).tolist()

    order = rows()
    while True:
        chosen = torch.tensor(list(itertools.islice(order, size)))
        yield Batch(clips.x_0[chosen], clips.condition.rows(chosen))
