"""Turns whose loss is spoiled at some steps, in one process and on one of two ranks, for ``test_loop.py``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phases import build_phase, differing
from torch import Tensor

from pose_core.errors import PoseError
from pose_core.training.state import Batch, Draws, Networks
from pose_core.training.turns import Losses, Turn


def spoiled(turn: Turn, steps: dict[int, Callable[[Tensor], Tensor]]) -> Turn:
    """The turn with its loss changed at some steps."""

    def loss(networks: Networks, batch: Batch, draws: Draws) -> Losses:
        losses = turn.loss(networks, batch, draws)
        return losses._replace(total=steps.get(draws.step, lambda total: total)(losses.total))

    return dataclasses.replace(turn, loss=loss)


def beside_a_bad_loss(total: Tensor) -> Tensor:
    """Not a number, with the gradients of the good loss."""
    return total + math.nan


def in_the_gradient(total: Tensor) -> Tensor:
    """The value of the good loss, with gradients that are not numbers."""
    return total.detach() + (total - total.detach()).clamp_min(0).sqrt()


def everywhere(total: Tensor) -> Tensor:
    return total * math.inf


def work(rank: int, folder: Path, _out: Path) -> dict[str, Any]:
    """Rank 1's loss alone is spoiled, in a way that its gradients do not show."""
    skipping, without = (build_phase("equilibrium", folder, sharded=True) for _ in range(2))
    first, second = skipping.turns
    bad = spoiled(first, {step: beside_a_bad_loss for step in (1, 3, 4, 5)} if rank == 1 else {})
    skipping.train(0, 1)
    without.train(0, 1)
    skipping.train(1, 2, turns=[bad, second])
    without.train(1, 2, turns=[second])
    differs = differing(skipping.tensors(), without.tensors())
    skipping.train(2, 3, turns=[bad, second])
    error = ""
    try:
        skipping.train(3, 9, turns=[bad, second])
    except PoseError as raised:
        error = str(raised)
    skipped = [values[f"{first.name}/skipped"] for values in skipping.history]
    return {"skipped": skipped, "differs": differs, "error": error}
