"""Phase II: each loss in numbers that a person can check, and where its gradient goes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pose_core.method import adversarial_equilibrium as equilibrium

EPS = torch.full((1, 1, 1, 1, 1), 4.0)
FIRST = torch.tensor([0])


def clip(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1, 1), float(value))


def logits(*heads: list[float]) -> list[Tensor]:
    """One tensor ``[1, n]`` a head."""
    return [torch.tensor([head]) for head in heads]


def test_the_discriminator_wants_real_above_one_and_fake_below_minus_one() -> None:
    assert equilibrium.discriminator_hinge(logits([1.0, 5.0]), logits([-1.0, -5.0])).item() == 0
    # Real: (max(0, 1 - 0.5) + 0) / 2; fake: (max(0, 1 + 3) + 0) / 2.
    assert equilibrium.discriminator_hinge(logits([0.5, 2.0]), logits([3.0, -2.0])).item() == 0.25 + 2


def test_each_head_weighs_the_same_however_many_logits_it_has() -> None:
    fake = logits([-2.0] * 3, [-3.0])
    assert equilibrium.discriminator_hinge(logits([0.0] * 3, [1.0]), fake).item() == 0.5
    assert equilibrium.generator_hinge(logits([1.0] * 3, [5.0])).item() == -3


def test_the_generator_wants_high_logits_without_a_limit() -> None:
    assert equilibrium.generator_hinge(logits([3.0, 5.0])).item() == -4


def test_moving_in_space_gives_every_frame_the_same_pattern() -> None:
    x_0 = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    noise = torch.ones(2, 3, 1, 5, 5) * torch.arange(5.0)
    moved = equilibrium.perturb_space(x_0, noise, 0.01) - x_0
    torch.testing.assert_close(moved, (0.01 * torch.arange(5.0)).expand(2, 3, 4, 5, 5), atol=1e-6, rtol=0)


def test_moving_in_time_gives_every_pixel_of_a_frame_the_same_offset() -> None:
    x_0 = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    noise = torch.arange(4.0).view(1, 1, 4, 1, 1).expand(2, 3, 4, 1, 1)
    moved = equilibrium.perturb_time(x_0, noise, 0.1) - x_0
    expected = (0.1 * torch.arange(4.0)).view(1, 1, 4, 1, 1).expand(2, 3, 4, 5, 5)
    torch.testing.assert_close(moved, expected, atol=1e-6, rtol=0)


def test_the_penalty_is_the_squared_change_in_space_plus_that_in_time() -> None:
    real = logits([1.0, 2.0], [0.0])
    in_space, in_time = logits([1.0, 4.0], [0.0]), logits([1.0, 2.0], [3.0])
    # Space: heads change by (0 + 4) / 2 and 0, mean 1; time: by 0 and 9, mean 4.5.
    assert equilibrium.spatio_temporal_r1(real, in_space, in_time).item() == pytest.approx(1 + 4.5)
    assert equilibrium.spatio_temporal_r1(real, real, real).item() == 0


def test_the_penalty_has_a_gradient_of_first_order_in_every_logit() -> None:
    real, moved = (torch.tensor([[value]], requires_grad=True) for value in (1.0, 3.0))
    equilibrium.spatio_temporal_r1([real], [moved], [torch.ones(1, 1)]).backward()
    assert real.grad is not None and moved.grad is not None
    assert (real.grad.item(), moved.grad.item()) == (-4, 4)


def test_all_samples_are_judged_in_one_pass_under_the_same_noise_and_time() -> None:
    seen: list[tuple[list[float], list[float], list[int]]] = []

    def judge(x_t: Tensor, t: Tensor, clips: Tensor) -> list[Tensor]:
        seen.append((x_t.flatten().tolist(), t.tolist(), clips.tolist()))
        return [x_t.flatten(1), 10 * x_t.flatten(1)]

    judged = equilibrium.discriminator_logits(judge, [(clip(0), FIRST), (clip(8), FIRST)], EPS, torch.tensor([0.25]))
    assert seen == [([1, 7], [0.25, 0.25], [0, 0])]
    assert [[head.item() for head in heads] for heads in judged] == [[1, 10], [7, 70]]


def test_batches_come_back_apart_and_in_order() -> None:
    first, second = torch.arange(3.0), torch.arange(3.0) + 10
    samples = [(values.view(3, 1, 1, 1, 1), torch.arange(3)) for values in (first, second)]
    nothing = torch.zeros(3)
    judged = equilibrium.discriminator_logits(lambda x_t, t, clips: [x_t.flatten(1)], samples, samples[0][0], nothing)
    assert [heads[0].flatten().tolist() for heads in judged] == [first.tolist(), second.tolist()]


def test_the_discriminators_gradient_stops_before_the_sample() -> None:
    weight, x0_hat = torch.tensor(1.0, requires_grad=True), clip(2).requires_grad_()
    t = torch.tensor([0.5])
    real, fake = equilibrium.discriminator_logits(
        lambda x_t, t, clips: [weight * x_t], [(clip(1), FIRST), (x0_hat, FIRST)], EPS, t
    )
    equilibrium.discriminator_hinge(real, fake).backward()
    assert x0_hat.grad is None
    # Real logit 2.5 is past the margin; fake logit 3 grows by 3 a unit of weight.
    assert weight.grad is not None
    assert weight.grad.item() == 3


def test_the_generators_gradient_passes_the_judge_and_reaches_the_sample() -> None:
    x0_hat = clip(2).requires_grad_()
    # x_t = 0.75 * 2 + 0.25 * 4 = 2.5.
    loss = equilibrium.generator_adversarial(lambda x_t, t, clips: [5 * x_t], x0_hat, EPS, torch.tensor([0.25]))
    loss.backward()
    assert loss.item() == -12.5
    assert x0_hat.grad is not None
    assert x0_hat.grad.item() == -5 * 0.75


def test_what_stems_from_a_clip_has_its_noise_and_time() -> None:
    seen: list[list[float]] = []

    def judge(x_t: Tensor, t: Tensor, clips: Tensor) -> list[Tensor]:
        seen.append([*clips.tolist(), *t.tolist(), *x_t.flatten().tolist()])
        return [x_t.flatten(1)]

    whole, one = torch.zeros(2, 1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1)
    eps, t = torch.tensor([4.0, 8.0]).view(2, 1, 1, 1, 1), torch.tensor([0.5, 0.25])
    judged = equilibrium.discriminator_logits(judge, [(whole, torch.arange(2)), (one, torch.tensor([1]))], eps, t)
    assert seen == [[0, 1, 1, 0.5, 0.25, 0.25, 2, 2, 2.75]]
    assert [len(heads[0]) for heads in judged] == [2, 1]


def test_a_loss_through_the_sample_moves_nothing_else() -> None:
    weight, x0_hat = torch.tensor(3.0, requires_grad=True), torch.tensor([2.0], requires_grad=True)
    loss = equilibrium.through_sample(lambda sample: (weight * sample.square()).sum(), 1 * x0_hat)
    loss.backward()
    assert loss.item() == 12
    assert weight.grad is None
    assert x0_hat.grad is not None and x0_hat.grad.item() == 12
