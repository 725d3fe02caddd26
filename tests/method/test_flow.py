"""The flow's notation in numbers that a person can check by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pose_core.method import flow
from pose_core.method.flow import Velocity


def clips(*values: float) -> Tensor:
    """One clip ``[1, 1, 1, 1, 1]`` a value."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1, 1)


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Counted:
    """A velocity that remembers at which times it was asked."""

    def __init__(self, velocity: Velocity):
        self.velocity, self.times = velocity, []

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.times.append(t.tolist())
        return self.velocity(x_t, t)


def test_each_clip_is_noised_by_its_own_time() -> None:
    x_t = flow.add_noise(clips(2, 2, 2), clips(10, 10, 10), times(0, 0.25, 1))
    assert x_t.flatten().tolist() == [2, 4, 10]


def test_times_take_the_shape_and_precision_of_what_they_multiply() -> None:
    t = flow.per_clip(torch.tensor([0.5, 1.0]), torch.zeros(2, 3, 4, 5, 6, dtype=torch.bfloat16))
    assert t.shape == (2, 1, 1, 1, 1)
    assert t.dtype == torch.bfloat16


def test_the_clean_estimate_subtracts_time_times_velocity() -> None:
    estimate = flow.clean_estimate(lambda x_t, t: 2 * x_t, clips(3, 3), times(0.25, 1))
    assert estimate.flatten().tolist() == [1.5, -3]


def test_the_true_velocity_leads_from_any_time_straight_to_the_clean_clip() -> None:
    x_0, eps, t = clips(1.5, -2), clips(0.5, 4), times(0.3, 0.8)
    estimate = flow.clean_estimate(lambda x_t, t: eps - x_0, flow.add_noise(x_0, eps, t), t)
    torch.testing.assert_close(estimate, x_0)


def test_one_step_is_noise_minus_the_velocity_at_time_one() -> None:
    velocity = Counted(lambda x_t, t: 0.25 * x_t)
    assert flow.one_step(velocity, clips(4, -8)).flatten().tolist() == [3, -6]
    assert velocity.times == [[1, 1]]


def test_guidance_moves_away_from_the_unconditional_velocity() -> None:
    velocity = flow.guided(lambda x_t, t: x_t + 1, lambda x_t, t: x_t - 1, 3.0)
    assert velocity(clips(10), times(1)).item() == 9 + 3 * 2


def test_guidance_of_one_costs_no_second_evaluation() -> None:
    conditional, unconditional = Counted(lambda x_t, t: x_t + 1), Counted(lambda x_t, t: x_t - 1)
    assert flow.guided(conditional, unconditional, 1.0)(clips(10), times(1)).item() == 11
    assert (len(conditional.times), len(unconditional.times)) == (1, 0)


def test_flow_matching_is_the_mean_squared_distance_to_noise_minus_clip() -> None:
    x_0, eps = clips(1, 2), clips(4, 0)
    loss = flow.flow_matching(lambda x_t, t: torch.zeros_like(x_t), x_0, eps, times(0.5, 0.5))
    assert loss.item() == (3**2 + 2**2) / 2
    assert flow.flow_matching(lambda x_t, t: eps - x_0, x_0, eps, times(0.1, 0.9)).item() == 0


def test_flow_matching_shows_the_network_the_noised_clip_and_its_time() -> None:
    seen = []

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append((x_t.flatten().tolist(), t.tolist()))
        return x_t

    flow.flow_matching(velocity, clips(0, 8), clips(4, 0), times(0.25, 0.5))
    assert seen == [([1, 4], [0.25, 0.5])]


def test_shifting_keeps_the_ends_and_pushes_the_middle_towards_noise() -> None:
    shifted = flow.shift_time(times(0, 0.25, 0.5, 1), 3.0)
    torch.testing.assert_close(shifted, times(0, 0.5, 0.75, 1))
    torch.testing.assert_close(flow.shift_time(times(0.1, 0.7), 1.0), times(0.1, 0.7))


def test_sampled_times_fill_the_window_and_are_then_shifted() -> None:
    torch.testing.assert_close(flow.sample_times(times(0, 0.5, 1), 0.9, 1.0), times(0.9, 0.95, 1.0))
    torch.testing.assert_close(flow.sample_times(times(0.5), 0.0, 1.0, shift=3.0), times(0.75))


def test_logit_normal_times_are_symmetric_around_the_middle_of_their_window() -> None:
    # The normal quantile of 0.841345 is 1, its sigmoid 0.731059.
    found = flow.sample_times(times(0.158655, 0.5, 0.841345), 0.0, 1.0, middle=True)
    torch.testing.assert_close(found, times(0.268941, 0.5, 0.731059), rtol=1e-5, atol=1e-5)
    assert flow.sample_times(times(0.0), 0.1, 0.9, middle=True).item() == pytest.approx(0.1)


def test_one_euler_step_is_the_one_step_map() -> None:
    eps = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x_t) * t.view(-1, 1, 1, 1, 1)

    assert torch.equal(flow.euler(velocity, eps, steps=1, shift=5.0), flow.one_step(velocity, eps))


def test_euler_walks_the_shifted_times_down_to_zero() -> None:
    velocity = Counted(lambda x_t, t: x_t)
    # Times 1, 0.75, 0: the steps multiply by (1 - 0.25) and (1 - 0.75).
    x_0 = flow.euler(velocity, clips(16), steps=2, shift=3.0)
    assert velocity.times == [[1], [0.75]]
    assert x_0.item() == pytest.approx(16 * 0.75 * 0.25)


def test_few_steps_with_one_noise_is_the_one_step_map() -> None:
    eps = clips(2, -3)
    assert torch.equal(flow.few_steps(_halve, [eps]), flow.one_step(_halve, eps))


def test_few_steps_noises_its_clean_clip_again_at_evenly_spaced_times() -> None:
    velocity = Counted(_halve)
    # From 8: clean 4; noised with 2 at 1/2: 3; its clean estimate: 3 - 1/2 * 1.5.
    assert flow.few_steps(velocity, [clips(8), clips(2)]).item() == 2.25
    assert velocity.times == [[1], [0.5]]


def test_few_steps_noise_again_inside_their_window() -> None:
    velocity = Counted(_halve)
    flow.few_steps(velocity, [clips(8)] * 4, 0.65, 0.85)
    assert velocity.times == [[1], *([pytest.approx(t)] for t in (0.8, 0.75, 0.7))]


def _halve(x_t: Tensor, t: Tensor) -> Tensor:
    return x_t / 2
