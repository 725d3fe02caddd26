"""Consistency distillation (Luo et al., Latent Consistency Models, 2023; Song et al., Consistency Models, 2023).

Two neighbouring points of one of the teacher's ways must give the same clean video. The later point is noise on a real
clip; the teacher's guided Euler step leads to the earlier one; the averaged generator says what the answer is.

symbol     meaning                                              shape, range
x_t        real clip with noise                                 [B, C, T, H, W]
t, s       a time and the next earlier one                      [B], 0 <= s < t <= 1
f_theta, f_average   clean estimates of generator and average
"""

from __future__ import annotations

import torch
from torch import Tensor

from pose_core.method.flow import Velocity, add_noise, clean_estimate, per_clip

HUBER_DELTA = 0.03
"""Where the loss turns from square to absolute: robust losses are what both papers found to work."""


def grid_times(uniform: Tensor, intervals: int) -> tuple[Tensor, Tensor]:
    """A time of the grid ``1/K .. 1`` from ``uniform [B]`` in [0, 1), and the one before it."""
    index = (uniform * intervals).floor() + 1
    return index / intervals, (index - 1) / intervals


def consistency_loss(
    v_theta: Velocity, v_average: Velocity, v_real: Velocity, x_0: Tensor, eps: Tensor, t: Tensor, s: Tensor
) -> Tensor:
    """``E d(f_theta(x_t, t), stop(f_average(x_s, s)))``, ``x_s = x_t + (s - t) v_real(x_t, t)``, ``d`` pseudo-Huber."""
    x_t = add_noise(x_0, eps, t)
    with torch.no_grad():
        x_s = x_t + per_clip(s - t, x_t) * v_real(x_t, t)
        target = clean_estimate(v_average, x_s, s)
    difference = clean_estimate(v_theta, x_t, t) - target
    return ((difference.square() + HUBER_DELTA**2).sqrt() - HUBER_DELTA).mean()
