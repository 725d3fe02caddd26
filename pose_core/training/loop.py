"""The only training loop: the turns of a phase, one after the other, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pose_core.training import ema, parallel
from pose_core.training.state import Batch, Draws, Networks
from pose_core.training.turns import Turn

AfterStep = Callable[[int, dict[str, Tensor]], None]
"""Called with the number of finished steps and this rank's losses and gradient norms, as scalars by name."""


def build_optimizers(
    networks: Networks, turns: Sequence[Turn], weight_decay: float
) -> dict[str, torch.optim.Optimizer]:
    """One AdamW a group of parameters that a turn updates."""
    groups = networks.groups()
    return {
        group: torch.optim.AdamW(groups[group].values(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay)
        for turn in turns
        for group, learning_rate in turn.updates.items()
    }


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
) -> None:
    """Run steps ``first_step`` to ``steps``; each takes one batch and every turn in order, then moves the average."""
    _free_gathered(networks)
    groups = networks.groups()
    everything = [parameter for group in groups.values() for parameter in group.values()]
    for step in range(first_step, steps):
        batch = next(batches)
        values: dict[str, Tensor] = {}
        for turn in turns:
            for repeat in range(turn.repeats):
                label = f"{turn.name}/{repeat}"
                draws = Draws(seed, step, label, parallel.rank(), parallel.ranks(), batch.x_0.device)
                losses = turn.loss(networks, batch, draws)
                losses.total.backward()
                norm = parallel.clip_gradients(updated_by(turn, groups), gradient_clip)
                for group in turn.updates:
                    optimizers[group].step()
                # A loss may leave gradients on constants of its turn (heads in the generator's): they are dropped.
                for parameter in everything:
                    parameter.grad = None
            values[f"{turn.name}/loss"] = losses.total.detach()
            values[f"{turn.name}/gradient_norm"] = norm.detach()
            values |= {f"{turn.name}/{name}": value.detach() for name, value in losses.parts.items()}
        _free_gathered(networks)
        ema.follow(networks.average.weights(), networks.generator.weights(), ema_decay)
        after_step(step + 1, values)


def updated_by(turn: Turn, groups: dict[str, dict[str, nn.Parameter]]) -> list[nn.Parameter]:
    """The parameters that a turn moves."""
    return [parameter for group in turn.updates for parameter in groups[group].values()]


def _free_gathered(networks: Networks) -> None:
    """A forward pass without a backward (a sample, say) leaves a root gathered; what is trained are its shards."""
    for model in networks.models():
        parallel.reshard(model.module)
