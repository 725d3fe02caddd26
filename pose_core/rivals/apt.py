"""Adversarial post-training (Lin et al., Diffusion Adversarial Post-Training for One-Step Video Generation, 2025).

The generator starts from consistency distillation (``lcm.py``). The discriminator is a full copy of the network with
heads, all of it trained; the loss is the non-saturating one, with an R1 penalty approximated by a finite difference.

symbol   meaning                                             shape, range
real, fake, moved   logits of real clips, of one-step samples, of real clips with a little noise    [B, ...] a head
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Logits = Sequence[Tensor]


def discriminator_loss(real: Logits, fake: Logits) -> Tensor:
    """``E softplus(-D(real)) + E softplus(D(fake))``, each head weighing the same."""
    return torch.stack([F.softplus(-a).mean() + F.softplus(b).mean() for a, b in zip(real, fake, strict=True)]).mean()


def generator_loss(fake: Logits) -> Tensor:
    """``E softplus(-D(fake))``, each head weighing the same."""
    return torch.stack([F.softplus(-logits).mean() for logits in fake]).mean()


def approximated_r1(real: Logits, moved: Logits) -> Tensor:
    """``E || D(x) - D(x + sigma eps) ||^2``, each head weighing the same."""
    return torch.stack([(a - b).square().mean() for a, b in zip(real, moved, strict=True)]).mean()
