"""Phase I, stability priming.

Adversarial training from pure noise starts with fakes so bad that a discriminator learns nothing useful. Priming first
pulls the distribution of one-step videos towards the real one by distribution matching (variational score
distillation), with no adversarial loss at all. A fake-score model, a LoRA on the frozen teacher, follows the generator
and tells where its distribution lies.

symbol   meaning                                                      shape, range
x_0      clean latent video                                           [B, C, T, H, W]
eps      standard Gaussian noise                                      like x_0
t        input time of the generator, in the low-SNR window           [B], in [0.9, 1]
x0_hat   the generator's clean estimate f_theta(x_t, t, c)            like x_0
eps', t' fresh noise and time for re-noising x0_hat                   like x_0; [B], in (0, 1)
v_theta, v_phi, v_real   velocities of generator, fake score and frozen teacher, conditions bound
"""

from __future__ import annotations

import torch
from torch import Tensor

from pose_core.method.flow import Velocity, add_noise, clean_estimate, flow_matching


def primed_sample(v_theta: Velocity, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """``x0_hat = f_theta(x_t, t, c)`` with ``x_t = (1 - t) x_0 + t eps`` and ``t`` in the low-SNR window."""
    return clean_estimate(v_theta, add_noise(x_0, eps, t), t)


def window_start(progress: float, first: float, last: float) -> float:
    """Lower end of the window of ``t`` after ``progress`` (0..1) of the phase; its upper end is 1.

    Unspecified in paper: v1 speaks of moving from high to low SNR (``first`` below ``last``), v2 of a fixed window
    (``first`` equal to ``last``); how fast it moves is said nowhere, here it is linear.
    """
    return first + (last - first) * progress


def shift_at(progress: float, shift: float, unshifted_share: float) -> float:
    """Shift of the times ``t'`` after ``progress`` (0..1) of the phase; none, which is 1, over its last share.

    Unspecified in paper. How fast a clip moves is open near noise only, on the digits above 0.93: a shift of 3 puts a
    sixth of the times there, where uniform ones have a twentieth. What is left then are details, far from it.
    A phase without a last share keeps its shift behind its steps, too.
    """
    return 1.0 if unshifted_share > 0 and progress >= 1 - unshifted_share else shift


@torch.no_grad()
def matching_gradient(
    v_phi: Velocity, v_real: Velocity, x0_hat: Tensor, eps: Tensor, t: Tensor, *, normalise: bool = True
) -> Tensor:
    """``f_phi(x_t', t', c) - f_real(x_t', t', c)``, divided by each clip's mean ``|x0_hat - f_real|``.

    ``v_real`` carries classifier-free guidance, ``v_phi`` none. Shaped like ``x0_hat``, without gradient.
    ``normalise=False`` leaves the division out: far from the data the gradient then grows.
    """
    x_t = add_noise(x0_hat, eps, t)
    f_real = clean_estimate(v_real, x_t, t)
    f_phi = clean_estimate(v_phi, x_t, t)
    if not normalise:
        return f_phi - f_real
    scale = (x0_hat - f_real).abs().mean(dim=tuple(range(1, x0_hat.ndim)), keepdim=True)
    # A clip the teacher would not change at all must not blow its gradient up.
    return (f_phi - f_real) / scale.clamp_min(1e-5)


def matching_loss(x0_hat: Tensor, gradient: Tensor) -> Tensor:
    """``1/2 || x0_hat - stop(x0_hat - gradient) ||^2`` averaged: its gradient in ``x0_hat`` is ``gradient / numel``."""
    target = (x0_hat - gradient).detach()
    return 0.5 * (x0_hat - target).square().mean()


def fake_score_loss(v_phi: Velocity, x0_hat: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Flow matching of the fake score on stopped ``x0_hat``: it follows the generator, the generator does not move."""
    return flow_matching(v_phi, x0_hat.detach(), eps, t)
