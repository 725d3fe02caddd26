"""What moves the parameters of a turn: AdamW, and Muon for the matrices in the generator's blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from pose_core.training.muon import Muon
from pose_core.training.state import Networks
from pose_core.training.turns import Turn

ADAM_BETA2 = 0.99
ADAM_MOMENTS = 2
"""Numbers AdamW keeps for every parameter it moves."""
MUON_MOMENTS = 1
MUON_MOMENTUM = 0.5
"""Nesterov's. On the digits, text to video, one seed: means of 86.4, 87.6 and 86.4 with 0, 0.5 and 0.8 at scales of 6,
6 and 4."""
_MATRICES = "/matrices"


def build_optimizers(
    networks: Networks, turns: Sequence[Turn], weight_decay: float
) -> dict[str, torch.optim.Optimizer]:
    """An AdamW for each group of parameters that a turn updates; fused, it needs no room for a copy of them.

    Where a turn has a ``muon_scale``, Muon moves the generator's matrices, under a name of its own behind the group's.
    Muon (Jordan et al., 2024) takes the nearest orthogonal matrix of a gradient: all of its directions are moved as
    far, where AdamW moves each number as far.
    """
    built: dict[str, torch.optim.Optimizer] = {}
    for turn in turns:
        for group, learning_rate in turn.updates.items():
            others, matrices = split(networks, turn, group)
            betas = turn.adam_beta1, ADAM_BETA2
            if others:
                built[group] = torch.optim.AdamW(
                    others, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True
                )
            if matrices:
                built[group + _MATRICES] = Muon(
                    matrices, lr=turn.muon_scale * learning_rate, momentum=MUON_MOMENTUM, weight_decay=weight_decay
                )
    return built


def split(networks: Networks, turn: Turn, group: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What AdamW moves of a group in this turn, and what Muon does."""
    parameters = list(networks.groups()[group].values())
    if group != "generator" or turn.muon_scale == 0:
        return parameters, []
    layers = (layer for block in networks.generator.blocks for layer in block.modules())
    weights = {id(layer.weight) for layer in layers if isinstance(layer, nn.Linear)}
    return [p for p in parameters if id(p) not in weights], [p for p in parameters if id(p) in weights]


def of_group(optimizers: dict[str, torch.optim.Optimizer], group: str) -> Iterator[torch.optim.Optimizer]:
    """Those that move the group's parameters."""
    return (optimizer for name, optimizer in optimizers.items() if group_of(name) == group)


def group_of(name: str) -> str:
    """The group that the optimiser of this name moves parameters of."""
    return name.removesuffix(_MATRICES)
