"""Rectified flow in the project's notation: a straight line from a clean video to noise, and its one-step map.

symbol   meaning                                     shape, range
x_0      clean latent video                          [B, C, T, H, W]
eps      standard Gaussian noise                     like x_0
t        flow time, 0 = data, 1 = noise              [B], in [0, 1]
x_t      (1 - t) x_0 + t eps                         like x_0
v        velocity, learns eps - x_0                  like x_0
f        x_t - t v, the clean estimate               like x_0

SNR(t) = ((1 - t) / t)^2, so t near 1 is the low-SNR end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""``v(x_t [B, C, T, H, W], t [B]) -> [B, C, T, H, W]`` with the condition already bound."""


def per_clip(t: Tensor, like: Tensor) -> Tensor:
    """``t [B]`` shaped to multiply ``like [B, ...]``."""
    return t.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def add_noise(x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """``x_t = (1 - t) x_0 + t eps``."""
    t = per_clip(t, x_0)
    return (1 - t) * x_0 + t * eps


def clean_estimate(velocity: Velocity, x_t: Tensor, t: Tensor) -> Tensor:
    """``f(x_t, t) = x_t - t v(x_t, t)``."""
    return x_t - per_clip(t, x_t) * velocity(x_t, t)


def one_step(velocity: Velocity, eps: Tensor) -> Tensor:
    """``f(eps, 1) = eps - v(eps, 1)``: a video from pure noise in one evaluation."""
    return clean_estimate(velocity, eps, eps.new_ones(len(eps)))


def guided(conditional: Velocity, unconditional: Velocity, scale: float) -> Velocity:
    """Classifier-free guidance ``v_u + scale (v_c - v_u)``; a scale of 1 costs no second evaluation."""
    if scale == 1:
        return conditional

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        v_unconditional = unconditional(x_t, t)
        return v_unconditional + scale * (conditional(x_t, t) - v_unconditional)

    return velocity


def flow_matching(velocity: Velocity, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """``E || v(x_t, t) - (eps - x_0) ||^2``, averaged over every element; a scalar."""
    return (velocity(add_noise(x_0, eps, t), t) - (eps - x_0)).square().mean()


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Push times towards the noise end, ``shift t / (1 + (shift - 1) t)``; 1 changes nothing (Wan's 480P uses 3)."""
    return shift * t / (1 + (shift - 1) * t)


def sample_times(uniform: Tensor, t_min: float, t_max: float, shift: float = 1.0, *, middle: bool = False) -> Tensor:
    """Times in ``[t_min, t_max]`` from ``uniform [B]`` in [0, 1), then shifted towards the noise end.

    Uniform, or with ``middle`` logit-normal: ``t_min + (t_max - t_min) sigmoid(n)`` with ``n`` standard normal.
    """
    if middle:
        uniform = torch.special.ndtri(uniform).sigmoid()
    return shift_time(t_min + (t_max - t_min) * uniform, shift)


def euler(velocity: Velocity, eps: Tensor, steps: int, shift: float = 1.0) -> Tensor:
    """The teacher's sampler: ``steps`` Euler steps from noise to data along shifted, evenly spaced times."""
    times = shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist()
    x = eps
    for now, then in zip(times, times[1:], strict=False):
        x = x + (then - now) * velocity(x, eps.new_full((len(eps),), now))
    return x


def few_steps(velocity: Velocity, noises: list[Tensor], t_min: float = 0.0, t_max: float = 1.0) -> Tensor:
    """The generator's sampler: predict a clean video, add fresh noise at the next lower time, predict again.

    ``noises`` holds one noise ``[B, C, T, H, W]`` a step; one of them is ``one_step``. After ``k`` of ``n`` steps it is
    noised again at ``t_max - (t_max - t_min) k / n``. Unspecified in paper: at which times.
    """
    steps = len(noises)
    x_0 = one_step(velocity, noises[0])
    for step in range(1, steps):
        t = x_0.new_full((len(x_0),), t_max - (t_max - t_min) * step / steps)
        x_0 = clean_estimate(velocity, add_noise(x_0, noises[step], t), t)
    return x_0
