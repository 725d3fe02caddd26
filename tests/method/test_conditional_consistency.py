"""Conditional SDS in numbers that a person can check, and where its gradient goes."""

from __future__ import annotations

import pytest
import torch

from pose_core.method.conditional_consistency import conditional_sds


def test_it_is_the_mean_squared_distance_to_the_teachers_clean_estimate() -> None:
    x0_hat = torch.tensor([4.0, 0.0]).view(1, 1, 2, 1, 1)
    eps = torch.tensor([8.0, 2.0]).view(1, 1, 2, 1, 1)
    # x_t = (6, 1); the teacher's estimate x_t - 0.5 x_t = (3, 0.5); distances 1 and 0.5.
    loss = conditional_sds(lambda x_t, t: x_t, x0_hat, eps, torch.tensor([0.5]))
    assert loss.item() == pytest.approx((1 + 0.25) / 2)


def test_a_sample_the_teacher_would_keep_costs_nothing() -> None:
    x0_hat, eps = torch.randn(2, 2, 1, 3, 2, 2, generator=torch.Generator().manual_seed(0)).unbind()
    loss = conditional_sds(lambda x_t, t: eps - x0_hat, x0_hat, eps, torch.tensor([0.3, 0.9]))
    assert loss.item() == pytest.approx(0, abs=1e-12)


def test_the_target_is_a_constant() -> None:
    weight = torch.tensor(1.0, requires_grad=True)
    x0_hat = torch.tensor([4.0]).view(1, 1, 1, 1, 1).requires_grad_()
    conditional_sds(lambda x_t, t: weight * x_t, x0_hat, torch.full_like(x0_hat, 8.0), torch.tensor([0.5])).backward()
    assert weight.grad is None
    # A gradient through the target 0.25 (x0_hat + eps) would give 2 * 1 * (1 - 0.25).
    assert x0_hat.grad is not None
    assert x0_hat.grad.item() == 2 * 1
