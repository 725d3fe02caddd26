"""Networks by role, and random numbers that are the same for any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from phases import Phase, batches, build_phase

from pose_core.training.state import Draws

CPU = torch.device("cpu")
LIKE = torch.zeros(2, 3, 4, 5, 6)


def draws(*, seed: int = 0, step: int = 7, label: str = "generator/0", first_clip: int = 0) -> Draws:
    return Draws(seed, step, label, first_clip, CPU)


def test_two_ranks_together_draw_what_one_draws_for_the_whole_batch() -> None:
    whole, (first, second) = draws(), (draws(first_clip=first) for first in (0, 2))
    both = torch.zeros(4, 3, 4, 5, 6)
    for _ in range(2):
        assert torch.equal(whole.uniform(both), torch.cat([first.uniform(LIKE), second.uniform(LIKE)]))
        assert torch.equal(whole.normal(both), torch.cat([first.normal(LIKE), second.normal(LIKE)]))
        whole_pattern = whole.normal(both, T=1)
        assert torch.equal(whole_pattern, torch.cat([first.normal(LIKE, T=1), second.normal(LIKE, T=1)]))


@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 8}, {"label": "generator/1"}, {"label": "fake/0"}])
def test_another_seed_step_or_turn_draws_other_numbers(other: dict) -> None:
    assert torch.equal(draws().normal(LIKE), draws().normal(LIKE))
    assert not torch.equal(draws().normal(LIKE), draws(**other).normal(LIKE))


def test_draws_do_not_disturb_the_global_random_numbers() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    draws().normal(LIKE)
    assert torch.equal(torch.rand(3), expected)


def test_shapes_ranges_and_spread() -> None:
    drawn = draws()
    assert drawn.normal(LIKE, T=1).shape == (2, 3, 1, 5, 6)
    assert drawn.normal(LIKE, H=1, W=1).shape == (2, 3, 4, 1, 1)
    uniform, normal = drawn.uniform(torch.zeros(10000)), drawn.normal(torch.zeros(10000, 1, 1, 1, 1))
    assert uniform.shape == (10000,)
    assert 0 <= uniform.min() < 0.01 and 0.99 < uniform.max() < 1
    assert abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.05


@pytest.fixture
def phase(tiny_folder: Path) -> Phase:
    phase = build_phase("priming", tiny_folder)
    assert phase.networks.fake is not None
    for parameter in phase.networks.fake.weights().values():
        parameter.data.add_(0.05)
    return phase


@torch.no_grad()
def test_the_real_score_is_the_guided_teacher_without_the_fake_scores_lora(phase: Phase) -> None:
    networks, batch, t = phase.networks, next(batches(0)), torch.tensor([0.2, 0.5, 0.8, 1.0])
    conditional = networks.teacher.velocity(batch.x_0, t, batch.condition)
    null = batch.condition.with_text(networks.null_text)
    unconditional = networks.teacher.velocity(batch.x_0, t, null)
    guided = networks.v_real(batch.condition, 3.0)(batch.x_0, t)
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional))
    assert torch.equal(networks.v_real(batch.condition, 1.0)(batch.x_0, t), conditional)
    # The generator starts as a copy of the teacher.
    assert torch.equal(networks.v_theta(batch.condition)(batch.x_0, t), conditional)


@torch.no_grad()
def test_the_fake_score_wears_its_lora(phase: Phase) -> None:
    networks, batch, t = phase.networks, next(batches(0)), torch.full((4,), 0.5)
    fake = networks.v_phi(batch.condition)(batch.x_0, t)
    real = networks.v_real(batch.condition, 1.0)(batch.x_0, t)
    assert (fake - real).abs().max() > 1e-4
    assert torch.equal(networks.v_phi(batch.condition)(batch.x_0, t), fake)


def test_roles_that_do_not_exist_have_no_parameters(tiny_folder: Path) -> None:
    assert build_phase("priming", tiny_folder).networks.groups().keys() == {"generator", "fake_score"}
    assert build_phase("equilibrium", tiny_folder).networks.groups().keys() == {"generator", "heads"}


def test_the_teacher_and_the_average_are_frozen(tiny_folder: Path) -> None:
    for name in ("priming", "equilibrium"):
        networks = build_phase(name, tiny_folder).networks
        frozen = [*networks.average.weights().values(), *networks.teacher.weights().values()]
        assert not any(parameter.requires_grad for parameter in frozen)


def test_on_the_meta_device_nothing_holds_memory(tiny_folder: Path) -> None:
    from pose_core import config
    from pose_core.training.build import build_networks

    settings = config.load("", ["equilibrium.feature_blocks=[0, 1]"])
    null_text = torch.zeros(1, 6, 32, device="meta")
    with null_text.device:
        networks = build_networks(
            "equilibrium", settings, tiny_folder, tiny_folder, null_text, device=null_text.device, meta=True
        )
    assert networks.heads is not None
    assert all(parameter.is_meta for module in networks.modules() for parameter in module.parameters())
