"""Which optimiser moves which parameters, and how far Muon's step goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from phases import ONE_BASE, build_phase
from torch import nn

from pose_core import config
from pose_core.training import build
from pose_core.training.muon import Muon
from pose_core.training.optimizers import ADAM_MOMENTS, MUON_MOMENTS, group_of

WAYS = {"full": [], "lora": ["training.generator=lora", "training.lora_rank=2"], "one base": ONE_BASE}


@pytest.mark.parametrize("way", WAYS)
def test_muon_moves_the_matrices_of_the_generators_blocks_and_adamw_the_rest(tiny_folder: Path, way: str) -> None:
    phase = build_phase("priming", tiny_folder, "priming.muon_scale=4", "priming.learning_rate=0.002", *WAYS[way])
    generator = phase.networks.groups()["generator"]
    muon, adamw = phase.optimizers["generator/matrices"], phase.optimizers.get("generator")
    by_muon, by_adamw = names(generator, muon), names(generator, adamw)
    assert isinstance(muon, Muon)
    assert (adamw is None) == (way != "full")  # a LoRA is matrices alone
    layers = [name for name, layer in phase.networks.generator.module.named_modules() if isinstance(layer, nn.Linear)]
    linear = {f"{name}.weight" for name in layers if "blocks." in name}
    assert by_muon == linear & generator.keys() and by_muon
    assert by_muon | by_adamw == generator.keys() and not by_muon & by_adamw
    assert muon.param_groups[0]["lr"] == pytest.approx(0.008)
    assert adamw is None or (adamw.param_groups[0]["lr"], type(adamw)) == (0.002, torch.optim.AdamW)
    assert isinstance(phase.optimizers["fake_score"], torch.optim.AdamW)
    assert {group_of(name) for name in phase.optimizers} == {"generator", "fake_score"}


def names(group: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None) -> set[str]:
    moved = [] if optimizer is None else optimizer.param_groups[0]["params"]
    return {name for name, parameter in group.items() if any(parameter is each for each in moved)}


def test_without_a_scale_adamw_moves_everything(tiny_folder: Path) -> None:
    assert build_phase("priming", tiny_folder).optimizers.keys() == {"generator", "fake_score"}


@pytest.mark.parametrize("method", ["pose", "dmd2", "apt", "ladd", "lcm"])
def test_a_methods_scale_is_that_of_the_section_it_reads(method: str) -> None:
    own = "priming.muon_scale=1", "equilibrium.muon_scale=2", "rivals.muon_scale=3"
    settings = config.load("", [f"method.name={method}", *own])
    turns = [build.phase_turns(phase, settings) for phase in ("priming", "equilibrium")]
    found = [{turn.muon_scale for turn in each if "generator" in turn.updates} for each in turns]
    assert found == {"pose": [{1}, {2}], "dmd2": [{1}, {1}]}.get(method, [{3}, {3}])
    assert all(turn.muon_scale == 0 for each in turns for turn in each if "generator" not in turn.updates)


def test_a_first_step_of_muon_goes_as_far_along_every_direction_of_the_gradient(tiny_folder: Path) -> None:
    phase = build_phase("priming", tiny_folder, "priming.muon_scale=4", "priming.learning_rate=0.001")
    muon = phase.optimizers["generator/matrices"]
    (weight, *_), rate = muon.param_groups[0]["params"], 0.004
    before = weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(weight.shape[0], 3, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(weight.shape[1], 3, generator=generator))
    weight.grad = left @ torch.diag(torch.tensor([1.0, 0.5, 0.25])) @ right.T
    muon.step()
    along = (left.T @ (before - weight.detach()) @ right) / (0.2 * rate * max(weight.shape) ** 0.5)
    # Five steps of Newton and Schulz bring singular values near 1, not to it.
    assert along.diagonal().tolist() == pytest.approx([1, 1, 1], abs=0.35)
    assert (along - torch.diag(along.diagonal())).abs().max() < 0.05


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_steps_are_those_of_torchs_muon_bit_by_bit(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    same = {"lr": 0.01, "momentum": 0.5, "weight_decay": 0.1}
    optimizers = Muon([ours], **same), torch.optim.Muon([theirs], **same, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(ours, theirs)


def test_state_is_what_the_plan_counts(tiny_folder: Path) -> None:
    phase = build_phase("priming", tiny_folder, "priming.muon_scale=4")
    phase.train(0, 1)
    for name, numbers in (("generator", ADAM_MOMENTS), ("generator/matrices", MUON_MOMENTS)):
        optimizer = phase.optimizers[name]
        moved = sum(p.numel() for p in optimizer.param_groups[0]["params"])
        kept = sum(v.numel() for state in optimizer.state.values() for v in state.values() if v.ndim)
        assert kept == numbers * moved
