"""Whose turn it is: exactly the parameters that a turn names move, bit by bit, and its draws are its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from phases import PHASES, Phase, batches, build_phase, differing
from torch import Tensor

from pose_core.training import turns as turns_module
from pose_core.training.state import Draws

CASES = [
    ("priming", ["fake", "generator"]),
    ("priming", ["fake"]),
    ("priming", ["generator"]),
    ("equilibrium", ["discriminator", "generator"]),
    ("equilibrium", ["discriminator"]),
    ("equilibrium", ["generator"]),
]


def weights(phase: Phase) -> dict[str, Tensor]:
    return {name: value for name, value in phase.tensors().items() if ".adamw/" not in name}


def named_by(phase: Phase, turns: list[turns_module.Turn]) -> set[str]:
    """Names in ``weights`` of the parameters that ``turns`` say they update."""
    owner = {"generator": "generator", "fake_score": "teacher", "heads": "heads"}
    groups = phase.networks.groups()
    return {f"{owner[turn.updates]}/{name}" for turn in turns for name in groups[turn.updates]}


def test_the_table_in_the_source_says_what_the_turns_do(tiny_folder: Path) -> None:
    rows = [line.strip("|").split("|") for line in (turns_module.__doc__ or "").splitlines() if line.startswith("| ")]
    table = [tuple(cell.strip() for cell in row[:3]) for row in rows[1:]]
    phases = {name: build_phase(name, tiny_folder) for name in PHASES}
    assert table == [(name, turn.name, turn.updates) for name, phase in phases.items() for turn in phase.turns]


@pytest.mark.parametrize(("name", "taken"), CASES)
def test_one_step_changes_exactly_what_its_turns_name(tiny_folder: Path, name: str, taken: list[str]) -> None:
    phase = build_phase(name, tiny_folder)
    turns = [turn for turn in phase.turns if turn.name in taken]
    before = weights(phase)
    phase.train(0, 1, turns=turns)
    after = weights(phase)
    changed = {key for key in differing(before, after) if not key.startswith("average/")}
    assert changed == named_by(phase, turns)


@pytest.mark.parametrize("name", PHASES)
def test_the_average_follows_the_generator_by_its_decay(tiny_folder: Path, name: str) -> None:
    phase = build_phase(name, tiny_folder)
    before = weights(phase)
    phase.train(0, 1)
    after = weights(phase)
    for key in after:
        role, _, parameter = key.partition("/")
        if role == "average":
            expected = 0.75 * before[key] + 0.25 * after[f"generator/{parameter}"]
            torch.testing.assert_close(after[key], expected, msg=key)
            assert not torch.equal(after[key], before[key]), key


@pytest.mark.parametrize("name", PHASES)
def test_no_turn_leaves_a_gradient_behind(tiny_folder: Path, name: str) -> None:
    phase = build_phase(name, tiny_folder)
    phase.train(0, 1)
    groups = phase.networks.groups().values()
    assert all(parameter.grad is None for group in groups for parameter in group.values())


@pytest.mark.parametrize(("name", "taken"), [case for case in CASES if len(case[1]) == 1])
def test_a_turns_loss_depends_on_the_seed_and_nothing_else(tiny_folder: Path, name: str, taken: list[str]) -> None:
    phase = build_phase(name, tiny_folder)
    turn = next(turn for turn in phase.turns if turn.name == taken[0])
    batch = next(batches(0))

    def loss(seed: int) -> float:
        draws = Draws(seed, 0, turn.name, 0, 1, torch.device("cpu"))
        return turn.loss(phase.networks, batch, draws).total.item()

    # In equilibrium the heads' first logits are small, so the loss is near its start whatever the seed.
    assert loss(1) == loss(1) != loss(2)


def test_text_to_video_has_no_conditional_sds_and_a_weight_of_zero_switches_it_off(tiny_folder: Path) -> None:
    for weight, parts in ((10, {"adversarial", "conditional_sds"}), (0, {"adversarial"})):
        phase = build_phase("equilibrium", tiny_folder, f"equilibrium.conditional_sds_weight={weight}")
        draws = Draws(0, 0, "generator", 0, 1, torch.device("cpu"))
        losses = phase.turns[1].loss(phase.networks, next(batches(0)), draws)
        assert losses.parts.keys() == parts
        expected = sum({"adversarial": 1, "conditional_sds": weight}[name] * value for name, value in losses.parts.items())
        torch.testing.assert_close(losses.total, expected)


def test_the_discriminators_loss_is_the_hinge_plus_the_weighted_penalty(tiny_folder: Path) -> None:
    phase = build_phase("equilibrium", tiny_folder, "equilibrium.r1_weight=3")
    draws = Draws(0, 0, "discriminator", 0, 1, torch.device("cpu"))
    losses = phase.turns[0].loss(phase.networks, next(batches(0)), draws)
    torch.testing.assert_close(losses.total, losses.parts["hinge"] + 3 * losses.parts["r1"])
    assert losses.parts["hinge"] > 1
    assert losses.parts["r1"] > 0
    assert 0 <= losses.parts["accuracy"] <= 1


def test_the_heads_learn_to_tell_real_from_generated(tiny_folder: Path) -> None:
    overrides = "equilibrium.renoise_time_max=0.3", "equilibrium.heads_learning_rate=0.01"
    phase = build_phase("equilibrium", tiny_folder, *overrides)
    phase.train(0, 60, turns=phase.turns[:1])
    accuracy = [values["discriminator/accuracy"] for values in phase.history]
    assert sum(accuracy[:2]) / 2 < 0.6
    assert sum(accuracy[-20:]) / 20 > 0.65
