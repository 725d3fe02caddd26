"""The rivals train through the same loop: who moves in which turn, and that their losses are finite and repeat."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from phases import PHASES, build_phase, differing

from pose_core.training import rival_turns

RIVALS = ["lcm", "apt", "ladd", "dmd2"]
OWNERS = {"fake_score": "teacher"}


def moved_by(tiny_folder: Path, rival: str, phase_name: str) -> dict[str, set[str]]:
    """Groups that each turn alone moves, by the turn's name."""
    found = {}
    for index in range(len(build_phase(phase_name, tiny_folder, f"method.name={rival}").turns)):
        phase = build_phase(phase_name, tiny_folder, f"method.name={rival}")
        turn = phase.turns[index]
        before = phase.tensors()
        phase.train(0, 1, turns=[turn])
        after = phase.tensors()
        changed = differing(before, {name: after[name] for name in before})
        groups = phase.networks.groups()
        found[turn.name] = {
            group for group in groups for name in groups[group] if f"{OWNERS.get(group, group)}/{name}" in changed
        }
        allowed = {f"{OWNERS.get(group, group)}/{name}" for group in turn.updates for name in groups[group]}
        assert {name for name in changed if not name.startswith("average/")} <= allowed
    return found


@pytest.mark.parametrize("rival", RIVALS)
def test_the_table_in_the_source_says_what_the_turns_move(tiny_folder: Path, rival: str) -> None:
    lines = [line for line in (rival_turns.__doc__ or "").splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = {turn: set(updates.split(", ")) for name, turn, updates, _ in rows if name == rival}
    assert moved_by(tiny_folder, rival, "equilibrium") == table


def test_apt_primes_by_consistency_distillation(tiny_folder: Path) -> None:
    assert moved_by(tiny_folder, "apt", "priming") == {"generator": {"generator"}}


@pytest.mark.parametrize("method", ["pose", "apt", "ladd", "dmd2"])
def test_every_turn_that_samples_tells_the_generator_the_time_that_is_set(tiny_folder: Path, method: str) -> None:
    phase = build_phase("equilibrium", tiny_folder, f"method.name={method}", "method.conditioning_time=0.875")
    told: list[float] = []

    def note(_module: torch.nn.Module, _given: tuple[Any, ...], named: dict[str, Any]) -> None:
        told.extend(set(named["timestep"].tolist()))

    phase.networks.generator.module.register_forward_pre_hook(note, with_kwargs=True)
    for turn in phase.turns:
        told.clear()
        phase.train(0, 1, turns=[turn])
        assert set(told) == {875}, turn.name


def test_consistency_distillation_calls_every_time_by_its_name(tiny_folder: Path) -> None:
    histories = []
    for told in (1, 0.875):
        phase = build_phase("priming", tiny_folder, "method.name=lcm", f"method.conditioning_time={told}")
        phase.train(0, 3)
        histories.append(phase.history)
    assert histories[0] == histories[1]


@pytest.mark.parametrize("name", PHASES)
@pytest.mark.parametrize("rival", RIVALS)
def test_a_run_repeats_and_stays_finite(tiny_folder: Path, rival: str, name: str) -> None:
    histories = []
    for _ in range(2):
        phase = build_phase(name, tiny_folder, f"method.name={rival}")
        phase.train(0, 3)
        histories.append(phase.history)
    assert histories[0] == histories[1]
    assert all(math.isfinite(value) for values in histories[0] for value in values.values())


@pytest.mark.parametrize(
    ("rival", "own"), [("dmd2", "rivals.matching_guidance"), ("lcm", "rivals.consistency_guidance")]
)
def test_a_rival_is_guided_by_a_setting_of_its_own(tiny_folder: Path, rival: str, own: str) -> None:
    losses = []
    for changed in ("priming.guidance=5", "priming.guidance=2", f"{own}=5"):
        phase = build_phase("priming", tiny_folder, f"method.name={rival}", changed)
        phase.train(0, 1)
        losses.append(phase.history)
    assert losses[0] == losses[1] != losses[2]
