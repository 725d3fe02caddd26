"""The only training loop: the turns of a phase, one after the other, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pose_core.errors import PoseError
from pose_core.training import ema, parallel
from pose_core.training.optimizers import of_group
from pose_core.training.state import Batch, Draws, Networks
from pose_core.training.telemetry import Record, unrecorded
from pose_core.training.turns import Losses, Turn

AfterStep = Callable[[int, dict[str, Tensor]], bool | None]
"""Called with the number of finished steps and this rank's losses and gradient norms, as scalars by name.

True, on all ranks, ends the training there."""


def train(
    networks: Networks,
    optimizers: dict[str, torch.optim.Optimizer],
    turns: Sequence[Turn],
    batches: Iterator[Batch],
    *,
    first_step: int,
    steps: int,
    seed: int,
    gradient_clip: float,
    ema_decay: float,
    after_step: AfterStep,
    non_finite_steps: int,
    accumulation: int = 1,
    record: Record = unrecorded,
) -> None:
    """Run steps ``first_step`` to ``steps``; each takes one batch and every turn in order, then moves the average.

    A turn takes its batch in ``accumulation`` equal parts, one after the other, and moves once. ``record`` is told what
    each part of a step is spent on.

    An update whose loss or gradient is not finite on any rank is skipped on all of them: its parameters and optimisers
    stay as they are. The curve ``<turn>/skipped`` counts them since ``first_step``.

    Raises:
        PoseError: a turn was skipped ``non_finite_steps`` times in a row.
    """
    _free_gathered(networks)
    groups = networks.groups()
    everything = [parameter for group in groups.values() for parameter in group.values()]
    skips = {turn.name: _Skips(turn.name, non_finite_steps) for turn in turns}
    for step in range(first_step, steps):
        with record("data"):
            batch = next(batches)
        values: dict[str, Tensor] = {}
        for turn in turns:
            for repeat in range(turn.repeats):
                key = seed, step, f"{turn.name}/{repeat}"
                losses = _backward(networks, turn, batch, accumulation, key, record)
                with record("optimiser"):
                    norm = parallel.clip_gradients(updated_by(turn, groups), gradient_clip)
                    if skips[turn.name].finite(losses.total + norm, step):
                        for optimizer in (each for group in turn.updates for each in of_group(optimizers, group)):
                            optimizer.step()
                # A loss may leave gradients on constants of its turn (heads in the generator's): they are dropped.
                for parameter in everything:
                    parameter.grad = None
            values |= _curves(turn.name, losses, norm, skips[turn.name].count)
        _free_gathered(networks)
        with record("optimiser"):
            ema.follow(networks.average.weights(), networks.generator.weights(), ema_decay)
        if after_step(step + 1, values):
            return


def _backward(
    networks: Networks, turn: Turn, batch: Batch, accumulation: int, key: tuple[int, int, str], record: Record
) -> Losses:
    """Gradients of a turn's loss, the mean over the parts of the batch, and those means."""
    data_rank = parallel.rank() if networks.mesh is None else networks.mesh.data_rank
    first = data_rank * len(batch.x_0)
    sums: list[Losses] = []
    for part in batch.parts(accumulation):
        with record("forward"):
            losses = turn.loss(networks, part, Draws(*key, first, batch.x_0.device))
        with record("backward"):
            (losses.total / accumulation).backward()
        sums.append(Losses(losses.total.detach(), {name: value.detach() for name, value in losses.parts.items()}))
        first += len(part.x_0)
    parts = {name: torch.stack([each.parts[name] for each in sums]).mean() for name in sums[0].parts}
    return Losses(torch.stack([each.total for each in sums]).mean(), parts)


def _curves(turn: str, losses: Losses, norm: Tensor, skipped: int) -> dict[str, Tensor]:
    values = {"loss": losses.total, "gradient_norm": norm, "skipped": torch.tensor(skipped, device=norm.device)}
    return {f"{turn}/{name}": value.detach() for name, value in (values | losses.parts).items()}


class _Skips:
    """Decides whether a turn's update is taken, and counts those that are not."""

    def __init__(self, turn: str, most_in_a_row: int):
        self.turn, self.most_in_a_row = turn, most_in_a_row
        self.count = self.in_a_row = 0

    def finite(self, value: Tensor, step: int) -> bool:
        """Whether ``value``, loss plus gradient norm, is finite on every rank.

        The norm is the same on all ranks and nearly always tells of a bad loss; a loss can still overflow, or carry a
        term without gradient, beside gradients that are finite, and on one rank only. So both are looked at, in one
        number: a turn waits once for its device and for the other ranks, as it does anyway for the noise it draws and
        the gradients it reduces.
        """
        if not parallel.any_rank(~torch.isfinite(value)):
            self.in_a_row = 0
            return True
        self.count += 1
        self.in_a_row += 1
        if self.in_a_row == self.most_in_a_row:
            raise PoseError(
                f"step {step + 1}: loss or gradient of the {self.turn} turn was not finite, {self.in_a_row} updates in "
                "a row: lower its learning rate, or compute with training.precision=float32; the last checkpoint stays"
            )
        return False


def updated_by(turn: Turn, groups: dict[str, dict[str, nn.Parameter]]) -> list[nn.Parameter]:
    """The parameters that a turn moves."""
    return [parameter for group in turn.updates for parameter in groups[group].values()]


def _free_gathered(networks: Networks) -> None:
    """A forward pass without a backward (a sample, say) leaves a root gathered; what is trained are its shards."""
    for model in networks.models():
        parallel.reshard(model.module)
