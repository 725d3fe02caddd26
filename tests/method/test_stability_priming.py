"""Phase I: each loss in numbers that a person can check, and where its gradient goes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pose_core.method import stability_priming as priming
from pose_core.method.flow import Velocity


def clips(*values: float) -> Tensor:
    """One clip ``[1, 1, 1, 1, 1]`` a value."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1, 1)


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def times_input(weight: Tensor | float) -> Velocity:
    return lambda x_t, t: weight * x_t


def test_the_primed_sample_is_the_clean_estimate_of_a_noised_real_clip() -> None:
    # x_t = 0.1 * 10 + 0.9 * 20 = 19, and 19 - 0.9 * 0.5 * 19.
    sample = priming.primed_sample(times_input(0.5), clips(10), clips(20), times(0.9))
    assert sample.item() == pytest.approx(10.45)


def test_the_primed_sample_carries_the_generators_gradient() -> None:
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    priming.primed_sample(times_input(weight), clips(10), clips(20), times(0.9)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(-0.9 * 19)


def test_the_matching_gradient_is_fake_minus_real_over_the_distance_to_the_real_estimate() -> None:
    # x_t = 6; f_phi = 6 - 0.5 * 6 = 3; f_real = 6 - 0.5 * 12 = 0; |x0_hat - f_real| = 4.
    gradient = priming.matching_gradient(times_input(1.0), times_input(2.0), clips(4), clips(8), times(0.5))
    assert gradient.item() == pytest.approx(3 / 4)


def test_without_normalisation_it_is_fake_minus_real() -> None:
    gradient = priming.matching_gradient(
        times_input(1.0), times_input(2.0), clips(4), clips(8), times(0.5), normalise=False
    )
    assert gradient.item() == pytest.approx(3)


def test_a_fixed_window_stays_and_a_moving_one_goes_from_high_to_low_snr() -> None:
    assert [priming.window_start(progress, 0.9, 0.9) for progress in (0.0, 0.5, 1.0)] == [0.9, 0.9, 0.9]
    assert [priming.window_start(progress, 0.5, 0.9) for progress in (0.0, 0.5, 1.0)] == pytest.approx([0.5, 0.7, 0.9])


def test_times_are_shifted_until_the_last_share_of_the_phase() -> None:
    assert [priming.shift_at(progress, 3.0, 0.25) for progress in (0.0, 0.74, 0.75, 1.0)] == [3, 3, 1, 1]
    assert [priming.shift_at(progress, 3.0, 0.0) for progress in (0.0, 0.99, 1.0)] == [3, 3, 3]


def test_the_matching_gradient_is_normalised_clip_by_clip() -> None:
    x0_hat = torch.tensor([[1.0, 3.0], [10.0, 30.0]], dtype=torch.float64).view(2, 1, 1, 1, 2)
    zeros, ones = torch.zeros_like(x0_hat), torch.ones_like(x0_hat)
    # f_real = 0 leaves each clip's own mean size, 2 and 20, as the divisor of f_phi = x_t = x0_hat / 2.
    real = times_input(2.0)
    gradient = priming.matching_gradient(lambda x_t, t: zeros, real, x0_hat, zeros, 0.5 * ones[:, 0, 0, 0, 0])
    torch.testing.assert_close(gradient.flatten(1), torch.tensor([[0.25, 0.75]] * 2, dtype=torch.float64))


def test_the_matching_gradient_stays_finite_where_the_teacher_would_change_nothing() -> None:
    zero = clips(0)
    gradient = priming.matching_gradient(lambda x_t, t: zero + 1, times_input(0.0), zero, zero, times(0.5))
    assert gradient.item() == pytest.approx(-0.5 / 1e-5)


def test_equal_scores_give_no_matching_gradient() -> None:
    x0_hat, eps = clips(1, 2), clips(3, -1)
    gradient = priming.matching_gradient(times_input(0.7), times_input(0.7), x0_hat, eps, times(0.2, 0.9))
    assert gradient.flatten().tolist() == [0, 0]


def test_the_matching_gradient_needs_no_gradient_of_any_network() -> None:
    weight = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    x0_hat = clips(4).requires_grad_()
    gradient = priming.matching_gradient(times_input(weight), times_input(2 * weight), x0_hat, clips(8), times(0.5))
    assert not gradient.requires_grad


def test_the_matching_loss_hands_its_gradient_to_the_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    x0_hat = torch.randn(2, 3, 2, 2, 2, generator=generator, dtype=torch.float64).requires_grad_()
    gradient = torch.randn(2, 3, 2, 2, 2, generator=generator, dtype=torch.float64).requires_grad_()
    loss = priming.matching_loss(x0_hat, gradient)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * gradient.square().mean().item())
    torch.testing.assert_close(x0_hat.grad, gradient.detach() / gradient.numel())
    assert gradient.grad is None


def test_the_fake_score_learns_flow_matching_on_the_stopped_sample() -> None:
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x0_hat = clips(2).requires_grad_()
    # x_t = 0.5 * 2 + 0.5 * 6 = 4; the velocity 2 misses eps - x0_hat = 4 by 2.
    loss = priming.fake_score_loss(times_input(weight), x0_hat, clips(6), times(0.5))
    loss.backward()
    assert loss.item() == 4
    assert x0_hat.grad is None
    assert weight.grad is not None
    assert weight.grad.item() == 2 * -2 * 4
