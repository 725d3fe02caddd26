"""Phase II, unified adversarial equilibrium.

The primed generator becomes its own discriminator: real and generated latents are noised again and pass through the
generator's own backbone, and light heads judge the features of several blocks. The judge so improves with the
generator and needs no second network. A finite difference keeps its logits smooth in space and in time.

symbol   meaning                                                              shape, range
eps      standard Gaussian noise                                              [B, C, T, H, W]
x0_hat   one-step sample f_theta(eps, 1, c), always from pure noise           like eps
x_0      real clean latent                                                    like eps
eps', t' noise and time of the re-noising, shared by real and generated       like eps; [B], in (0, 1)
D        judge(x_t', t', clips) -> logits, one tensor [N, ...] a head: backbone features, then heads d_psi
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pose_core.method.flow import add_noise

Logits = Sequence[Tensor]
"""One tensor ``[B, ...]`` a head; positive means real."""
Judge = Callable[[Tensor, Tensor, Tensor], Logits]
"""``D(x_t [N, C, T, H, W], t [N], clips [N])``; ``clips`` are places in the batch: whose condition goes with each."""


def discriminator_hinge(real: Logits, fake: Logits) -> Tensor:
    """``E max(0, 1 - D(real)) + E max(0, 1 + D(fake))``, each head weighing the same; a scalar."""
    return _mean([F.relu(1 - logits).mean() for logits in real]) + _mean([F.relu(1 + logits).mean() for logits in fake])


def generator_hinge(fake: Logits) -> Tensor:
    """``-E D(fake)``, each head weighing the same; a scalar."""
    return -_mean([logits.mean() for logits in fake])


def perturb_space(x_0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Real latents moved in space: one pattern ``noise [B, C, 1, H, W]`` for all frames, of size ``sigma`` (0.01).

    Unspecified in paper: which noise counts as spatial; one that leaves the motion as it is does.
    """
    return x_0 + sigma * noise


def perturb_time(x_0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Real latents moved in time: one offset ``noise [B, C, T, 1, 1]`` a frame, of size ``sigma`` (0.1).

    Unspecified in paper: as for ``perturb_space``; an offset a frame changes motion and leaves each picture its shape.
    """
    return x_0 + sigma * noise


def spatio_temporal_r1(real: Logits, moved_in_space: Logits, moved_in_time: Logits) -> Tensor:
    """``L_STR1``: mean squared change of the logits under both perturbations; needs no second-order gradients."""
    pairs = [(a, b) for moved in (moved_in_space, moved_in_time) for a, b in zip(real, moved, strict=True)]
    return 2 * _mean([(a - b).square().mean() for a, b in pairs])


def discriminator_logits(
    judge: Judge, samples: Sequence[tuple[Tensor, Tensor]], eps: Tensor, t: Tensor
) -> list[Logits]:
    """Logits of several sets of latents in one forward pass; what stems from one clip has its noise and time.

    A sample is latents ``[N, C, T, H, W]`` and the places ``[N]`` of their clips in ``eps [B, C, T, H, W]``, ``t [B]``.
    """
    clips = torch.cat([places for _, places in samples])
    x_0 = torch.cat([latents.detach() for latents, _ in samples])
    logits = judge(add_noise(x_0, eps[clips], t[clips]), t[clips], clips)
    sizes = [len(latents) for latents, _ in samples]
    return [list(heads) for heads in zip(*(head.split(sizes) for head in logits), strict=True)]


def generator_adversarial(judge: Judge, x0_hat: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The generator's adversarial loss on its re-noised one-step sample; its gradient reaches ``x0_hat`` only.

    Unspecified in paper: whose gradient reaches the shared backbone. Here the judge's weights are constants in the
    generator's turn (see ``training/turns.py``): a generator that could also move its judge would only fool itself.
    """
    clips = torch.arange(len(t), device=t.device)
    return through_sample(lambda sample: generator_hinge(judge(add_noise(sample, eps, t), t, clips)), x0_hat)


def through_sample(loss: Callable[[Tensor], Tensor], x0_hat: Tensor) -> Tensor:
    """``loss(x0_hat)`` whose gradient flows into ``x0_hat`` and into nothing else that the loss depends on.

    The gradient in ``x0_hat`` is taken at once, ``g = dL/dx0_hat``; what is returned has the value of the loss and the
    gradient of ``<g, x0_hat>``.
    """
    if not x0_hat.requires_grad:
        return loss(x0_hat)
    sample = x0_hat.detach().requires_grad_()
    value = loss(sample)
    (gradient,) = torch.autograd.grad(value, sample)
    return value.detach() + (gradient * (x0_hat - sample.detach())).sum()


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()
