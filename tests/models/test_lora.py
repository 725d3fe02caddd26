"""The fake score starts as the teacher, trains nothing but itself and can be taken off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pose_core.models import wan
from pose_core.models.lora import add_fake_score, fake_score_parameters, without_fake_score
from pose_core.models.video_model import Condition
from pose_core.models.wan import Wan

RANK = 3


@pytest.fixture
def model(tiny_folder: Path) -> Wan:
    return wan.load(tiny_folder)


@torch.no_grad()
def velocity(model: Wan) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 8, 3, 4, 4), (1, 4, 32), (1, 5, 32), (1, 10, 3, 4, 4)
    x_t, *condition = (torch.randn(shape, generator=generator) for shape in shapes)
    return model.velocity(x_t, torch.tensor([0.5]), Condition(*condition))


def move(model: Wan) -> None:
    for parameter in fake_score_parameters(model.module).values():
        parameter.data.add_(0.1)


def test_a_new_fake_score_is_the_teacher_bit_by_bit(model: Wan) -> None:
    before = velocity(model)
    add_fake_score(model.module, RANK)
    assert torch.equal(velocity(model), before)


def test_only_the_lora_is_trainable_and_it_covers_attention_and_feed_forward_of_every_block(model: Wan) -> None:
    add_fake_score(model.module, RANK)
    own = fake_score_parameters(model.module)
    trainable = {name for name, parameter in model.module.named_parameters() if parameter.requires_grad}
    assert trainable == set(own)
    # Two attentions of four projections and a feed-forward of two, a pair of matrices each.
    assert len(own) == 2 * 2 * (2 * 4 + 2)
    assert all(RANK in parameter.shape for parameter in own.values())


def test_taken_off_it_leaves_the_teacher_and_put_back_it_is_as_before(model: Wan) -> None:
    teacher = velocity(model)
    add_fake_score(model.module, RANK)
    move(model)
    fake = velocity(model)
    assert (fake - teacher).abs().max() > 1e-3
    with without_fake_score(model.module):
        assert torch.equal(velocity(model), teacher)
    assert torch.equal(velocity(model), fake)


def test_it_is_put_back_when_the_forward_pass_fails(model: Wan) -> None:
    add_fake_score(model.module, RANK)
    move(model)
    fake = velocity(model)
    with pytest.raises(ZeroDivisionError), without_fake_score(model.module):
        raise ZeroDivisionError
    assert torch.equal(velocity(model), fake)


def test_a_network_without_one_may_be_asked_all_the_same(model: Wan) -> None:
    before = velocity(model)
    with without_fake_score(model.module):
        assert torch.equal(velocity(model), before)
    assert fake_score_parameters(model.module) == {}
