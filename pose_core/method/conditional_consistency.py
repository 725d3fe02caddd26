"""Conditional adversarial consistency: the image-to-video terms.

Without them a one-step image-to-video model forgets the subject (semantic degradation) and breaks between the given
frame and the next (condition-frame collapse), or freezes into a still picture. The frozen teacher, which knows the
condition, pulls the sample back; the semantic head (``models/heads.py``) adds a logit that sees the condition.

symbol   meaning                                             shape, range
x0_hat   one-step sample f_theta(eps, 1, c)                  [B, C, T, H, W]
eps', t' fresh noise and time                                like x0_hat; [B], in (0, 1)
v_real   velocity of the frozen teacher, condition bound
"""

from __future__ import annotations

import torch
from torch import Tensor

from pose_core.method.flow import Velocity, add_noise, clean_estimate


def conditional_sds(v_real: Velocity, x0_hat: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """``L_C-SDS = E || x0_hat - f_real(stop(x0_hat_t'), t', c) ||^2``, averaged over every element (weight 10).

    Unspecified in paper: whether the teacher is guided here; the caller decides by the velocity it binds.
    """
    with torch.no_grad():
        target = clean_estimate(v_real, add_noise(x0_hat, eps, t), t)
    return (x0_hat - target).square().mean()
