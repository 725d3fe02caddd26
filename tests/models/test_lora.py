"""Adapters start as the base, train nothing but themselves, share it without meeting, and can be merged into it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pose_core.errors import CheckpointError
from pose_core.models import wan
from pose_core.models.lora import ADAPTER_FILE, Role, add_adapter, checkpoint_activations, load_adapter
from pose_core.models.video_model import Condition
from pose_core.models.wan import Wan

RANK = 3


@pytest.fixture
def model(tiny_folder: Path) -> Wan:
    return wan.load(tiny_folder)


def inputs() -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 8, 3, 4, 4), (1, 4, 32), (1, 5, 32), (1, 10, 3, 4, 4)
    x_t, *condition = (torch.randn(shape, generator=generator) for shape in shapes)
    return x_t, torch.tensor([0.5]), Condition(*condition)


@torch.no_grad()
def velocity(model: Wan | Role) -> Tensor:
    return model.velocity(*inputs())


def move(role: Role, by: float = 0.1) -> None:
    for parameter in role.weights().values():
        parameter.data.add_(by)


def test_a_new_adapter_is_the_base_bit_by_bit(model: Wan) -> None:
    before = velocity(model)
    assert torch.equal(velocity(add_adapter(model, "fake_score", RANK)), before)


def test_only_the_lora_is_trainable_and_it_covers_attention_and_feed_forward_of_every_block(model: Wan) -> None:
    own = add_adapter(model, "fake_score", RANK).weights()
    trainable = {name for name, parameter in model.module.named_parameters() if parameter.requires_grad}
    assert trainable == set(own)
    # Two attentions of four projections and a feed-forward of two, a pair of matrices each.
    assert len(own) == 2 * 2 * (2 * 4 + 2)
    assert all(RANK in parameter.shape for parameter in own.values())


def test_roles_on_one_base_do_not_touch_each_other(model: Wan) -> None:
    base = Role(model)
    before = velocity(base)
    first, second = (add_adapter(model, name, RANK) for name in ("generator", "fake_score"))
    move(first)
    moved = velocity(first)
    assert (moved - before).abs().max() > 1e-3
    assert torch.equal(velocity(second), before) and torch.equal(velocity(base), before)
    move(second, 0.2)
    assert torch.equal(velocity(first), moved) and torch.equal(velocity(base), before)
    assert not first.weights().keys() & second.weights().keys()
    assert not base.weights().keys() & first.weights().keys()


def test_the_switch_is_put_back_when_the_forward_pass_fails(model: Wan) -> None:
    role = add_adapter(model, "fake_score", RANK)
    move(role)
    fake, base = velocity(role), velocity(Role(model))
    handle = model.module.blocks[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        velocity(Role(model))
    handle.remove()
    assert torch.equal(velocity(role), fake) and torch.equal(velocity(Role(model)), base)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_go_to_the_adapter_that_the_forward_pass_went_through(model: Wan, recompute: bool) -> None:
    first, second = (add_adapter(model, name, RANK) for name in ("generator", "fake_score"))
    move(first)
    move(second, 0.2)
    if recompute:
        model.module.train()
        checkpoint_activations(model)
    outputs = [role.velocity(*inputs()) for role in (first, second, Role(model))]
    assert torch.equal(outputs[0], velocity(first))
    (outputs[0].square().sum()).backward()
    assert all(parameter.grad is not None for parameter in first.weights().values())
    assert all(parameter.grad is None for parameter in second.weights().values())
    alone = [parameter.grad.clone() for parameter in first.weights().values() if parameter.grad is not None]
    for parameter in first.weights().values():
        parameter.grad = None
    first.velocity(*inputs()).square().sum().backward()
    for parameter, gradient in zip(first.weights().values(), alone, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_what_is_saved_is_stock_and_merged_and_the_adapter_lies_beside_it(model: Wan, tmp_path: Path) -> None:
    role = add_adapter(model, "average", RANK)
    add_adapter(model, "fake_score", RANK)
    move(role, 0.02)
    role.save(tmp_path / "transformer", dict(model.module.state_dict()))
    merged = wan.load(tmp_path, image_tokens=5)
    torch.testing.assert_close(velocity(merged), velocity(role), rtol=1e-4, atol=1e-5)
    again = add_adapter(wan.load(tmp_path, image_tokens=5), "generator", RANK)
    load_adapter(again, tmp_path / ADAPTER_FILE)
    for loaded, saved in zip(again.weights().values(), role.weights().values(), strict=True):
        assert torch.equal(loaded, saved)
    with pytest.raises(CheckpointError, match="lora_rank"):
        load_adapter(add_adapter(wan.load(tmp_path, image_tokens=5), "generator", RANK + 1), tmp_path / ADAPTER_FILE)
