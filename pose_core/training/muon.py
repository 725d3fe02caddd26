"""Muon for matrices that ranks share: each is brought together once a step and made orthogonal whole, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pose_core.training import parallel

STEPS = 5
LINEAR, CUBIC, QUINTIC = 3.4445, -4.775, 2.0315
"""Steps and coefficients of the iteration, as Jordan et al. chose them for speed: singular values end near 1."""
LEAST_NORM = 1e-7
ROOT_MEAN_SQUARE = 0.2
"""Of a step, in learning rates: about what AdamW's has (Liu et al., arXiv 2502.16982, section 2.2)."""


class Muon(torch.optim.Optimizer):
    """``torch.optim.Muon`` (``adjust_lr_fn="match_rms_adamw"``), which on shards would talk in every matrix product."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        assert closure is None
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._move(matrix, matrix.grad, group["lr"], group["momentum"], group["weight_decay"])

    def _move(self, matrix: Tensor, gradient: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        direction = parallel.of_whole(orthogonal, gradient.lerp(average, momentum))
        matrix.mul_(1 - lr * weight_decay)
        matrix.add_(direction, alpha=-lr * ROOT_MEAN_SQUARE * max(matrix.shape) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest orthogonal matrix of ``matrix [M, N]``, by Newton and Schulz, in bfloat16."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16().T if tall else matrix.bfloat16()
    x = x / x.norm().clamp(min=LEAST_NORM)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=CUBIC, alpha=QUINTIC), x, beta=LINEAR)
    return x.T if tall else x
