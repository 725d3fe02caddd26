"""The rivals' losses in numbers that a person can check."""

from __future__ import annotations

import math

import pytest
import torch

from pose_core.rivals import apt, lcm


def clips(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1, 1)


def test_times_lie_on_the_grid_and_neighbour_each_other() -> None:
    t, s = lcm.grid_times(torch.tensor([0.0, 0.26, 0.999]), 4)
    assert t.tolist() == [0.25, 0.5, 1.0]
    assert s.tolist() == [0.0, 0.25, 0.75]


def test_a_generator_that_is_the_exact_flow_of_one_clip_is_consistent() -> None:
    x_0, eps = clips(2.0), clips(-1.0)

    def exact(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return eps - x_0

    loss = lcm.consistency_loss(exact, exact, exact, x_0, eps, torch.tensor([0.5]), torch.tensor([0.25]))
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_the_loss_is_the_pseudo_huber_distance_from_the_average_one_step_earlier() -> None:
    theta, average, real = (lambda x_t, t, v=v: torch.full_like(x_t, v) for v in (1.0, 2.0, 4.0))
    # x_t = 3; f_theta = 3 - 0.5; x_s = 3 - 0.25 * 4 = 2; f_average = 2 - 0.25 * 2 = 1.5; difference 1.
    x_0, eps = clips(2.0), clips(4.0)
    loss = lcm.consistency_loss(theta, average, real, x_0, eps, torch.tensor([0.5]), torch.tensor([0.25]))
    assert loss.item() == pytest.approx(math.sqrt(1 + 0.03**2) - 0.03)


def test_only_the_generator_has_a_gradient() -> None:
    weights = [torch.tensor(1.0, requires_grad=True) for _ in range(3)]
    theta, average, real = (lambda x_t, t, w=w: w * x_t for w in weights)
    t, s = torch.tensor([0.5]), torch.tensor([0.25])
    lcm.consistency_loss(theta, average, real, clips(2.0), clips(4.0), t, s).backward()
    assert weights[0].grad is not None and weights[1].grad is None and weights[2].grad is None


def test_the_non_saturating_losses_at_zero_are_logarithms_of_two() -> None:
    zero = [torch.zeros(2, 3), torch.zeros(2)]
    assert apt.discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert apt.generator_loss(zero).item() == pytest.approx(math.log(2))


def test_the_penalty_is_the_mean_squared_change_a_head() -> None:
    real, moved = [torch.tensor([1.0, 2.0]), torch.tensor([0.0])], [torch.tensor([2.0, 2.0]), torch.tensor([3.0])]
    assert apt.approximated_r1(real, moved).item() == pytest.approx((0.5 + 9) / 2)
