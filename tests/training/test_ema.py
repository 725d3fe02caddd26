"""The running average in numbers that a person can check."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pose_core.training import ema


def linear(value: float) -> nn.Linear:
    module = nn.Linear(2, 2)
    for parameter in module.parameters():
        nn.init.constant_(parameter, value)
    return module


def test_each_call_moves_the_average_by_what_the_decay_leaves() -> None:
    average, module = linear(0), linear(8)
    ema.follow(dict(average.named_parameters()), dict(module.named_parameters()), 0.75)
    assert average.weight.unique().tolist() == [2] and average.bias.unique().tolist() == [2]
    ema.follow(dict(average.named_parameters()), dict(module.named_parameters()), 0.75)
    assert average.weight.unique().tolist() == [3.5]
    assert module.weight.unique().tolist() == [8]


def test_a_decay_of_zero_copies() -> None:
    average, module = linear(1), linear(3)
    ema.follow(dict(average.named_parameters()), dict(module.named_parameters()), 0.0)
    assert torch.equal(average.weight, module.weight)


def test_what_is_averaged_carries_no_gradient() -> None:
    average, module = linear(0), linear(8)
    average.requires_grad_(False)
    ema.follow(dict(average.named_parameters()), dict(module.named_parameters()), 0.5)
    assert not average.weight.requires_grad and average.weight.grad_fn is None


def test_networks_of_different_depth_are_refused() -> None:
    with pytest.raises(ValueError):
        ema.follow(
            dict(linear(0).named_parameters()), dict(nn.Sequential(linear(0), linear(0)).named_parameters()), 0.5
        )
