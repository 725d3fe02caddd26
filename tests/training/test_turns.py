"""Whose turn it is: exactly the parameters that a turn names move, bit by bit, and its draws are its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from phases import LAST_BIASES, PHASES, Phase, batches, build_phase, differing, modules
from torch import Tensor

from pose_core.models import small
from pose_core.models.video_model import Condition
from pose_core.training import turns as turns_module
from pose_core.training.state import Batch, Draws

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


def draws_of(label: str, seed: int = 0) -> Draws:
    return Draws(seed, 0, label, 0, torch.device("cpu"))


def named_by(phase: Phase, turns: list[turns_module.Turn]) -> set[str]:
    """Names in ``weights`` of the parameters that ``turns`` say they update."""
    owner = {"fake_score": "teacher"}
    groups = phase.networks.groups()
    return {f"{owner.get(group, group)}/{name}" for turn in turns for group in turn.updates for name in groups[group]}


def test_the_table_in_the_source_says_what_the_turns_do(tiny_folder: Path) -> None:
    rows = [line.strip("|").split("|") for line in (turns_module.__doc__ or "").splitlines() if line.startswith("| ")]
    table = [tuple(cell.strip() for cell in row[:3]) for row in rows[1:]]
    phases = {name: build_phase(name, tiny_folder) for name in PHASES}
    assert table == [
        (name, turn.name, ", ".join(turn.updates)) for name, phase in phases.items() for turn in phase.turns
    ]


@pytest.mark.parametrize(("name", "taken"), CASES)
def test_one_step_changes_exactly_what_its_turns_name(tiny_folder: Path, name: str, taken: list[str]) -> None:
    phase = build_phase(name, tiny_folder)
    turns = [turn for turn in phase.turns if turn.name in taken]
    before = weights(phase)
    phase.train(0, 1, turns=turns)
    after = weights(phase)
    changed = {key for key in differing(before, after) if not key.startswith("average/")}
    named = named_by(phase, turns)
    assert changed <= named and named - changed <= LAST_BIASES


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


@pytest.mark.parametrize(
    ("name", "turn", "evaluations"),
    [
        ("priming", 0, {"generator": 1, "average": 0, "teacher": 1}),
        # The fake score once, the guided real score twice; both are the teacher.
        ("priming", 1, {"generator": 1, "average": 0, "teacher": 3}),
        ("equilibrium", 0, {"generator": 1, "average": 1, "teacher": 0}),
        # Conditional SDS asks the teacher without guidance.
        ("equilibrium", 1, {"generator": 1, "average": 1, "teacher": 1}),
    ],
)
def test_a_turn_evaluates_each_network_as_often_as_it_must(
    tiny_folder: Path, name: str, turn: int, evaluations: dict[str, int]
) -> None:
    """And the judge's backbone is the averaged generator, not the one that learns."""
    phase = build_phase(name, tiny_folder)
    found = dict.fromkeys(evaluations, 0)

    def count(role: str) -> None:
        def hook(*_: object) -> None:
            found[role] += 1

        modules(phase.networks)[role].register_forward_hook(hook)

    for role in evaluations:
        count(role)
    phase.turns[turn].loss(phase.networks, next(batches(0)), draws_of("any"))
    assert found == evaluations


@pytest.mark.parametrize(("name", "taken"), [case for case in CASES if len(case[1]) == 1])
def test_a_turns_loss_depends_on_the_seed_and_nothing_else(tiny_folder: Path, name: str, taken: list[str]) -> None:
    phase = build_phase(name, tiny_folder)
    turn = next(turn for turn in phase.turns if turn.name == taken[0])
    batch = next(batches(0))

    def loss(seed: int) -> float:
        return turn.loss(phase.networks, batch, draws_of(turn.name, seed)).total.item()

    assert loss(1) == loss(1) != loss(2)


def test_the_generators_loss_is_the_weighted_sum_of_its_parts_and_no_weight_costs_nothing(tiny_folder: Path) -> None:
    for weight, parts in ((10, {"adversarial", "conditional_sds"}), (0, {"adversarial"})):
        phase = build_phase("equilibrium", tiny_folder, f"equilibrium.conditional_sds_weight={weight}")
        losses = phase.turns[1].loss(phase.networks, next(batches(0)), draws_of("generator"))
        assert losses.parts.keys() == parts
        expected = losses.parts["adversarial"] + weight * losses.parts.get("conditional_sds", 0)
        torch.testing.assert_close(losses.total, expected)


@pytest.mark.parametrize("name", PHASES)
def test_text_to_video_has_no_semantic_head_and_no_conditional_sds(tmp_path: Path, name: str) -> None:
    text_only = small.build_transformer("t2v", heads=1, layers=2, channels=8, text_width=32)
    text_only.save_pretrained(tmp_path / "transformer")
    phase, batch = build_phase(name, tmp_path), next(batches(0))
    batch = Batch(batch.x_0, Condition(batch.condition.text))
    losses = [turn.loss(phase.networks, batch, draws_of(turn.name)) for turn in phase.turns]
    assert all(torch.isfinite(loss.total) for loss in losses)
    if phase.networks.heads is not None:
        assert phase.networks.heads.semantic_head is None
        assert losses[1].parts.keys() == {"adversarial"}


def test_the_discriminators_loss_is_the_hinge_plus_the_weighted_penalty(tiny_folder: Path) -> None:
    phase = build_phase("equilibrium", tiny_folder, "equilibrium.r1_weight=3")
    losses = phase.turns[0].loss(phase.networks, next(batches(0)), draws_of("discriminator"))
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


def test_the_last_share_of_priming_is_trained_as_if_times_were_never_shifted(tiny_folder: Path) -> None:
    def losses(step: int, *overrides: str) -> list[float]:
        phase, batch = build_phase("priming", tiny_folder, "priming.steps=4", *overrides), next(batches(0))
        draws = [Draws(0, step, turn.name, 0, torch.device("cpu")) for turn in phase.turns]
        pairs = zip(phase.turns, draws, strict=True)
        return [turn.loss(phase.networks, batch, drawn).total.item() for turn, drawn in pairs]

    shifted, both = "priming.timestep_shift=3", ("priming.timestep_shift=3", "priming.unshifted_share=0.5")
    assert losses(1, *both) == losses(1, shifted) != losses(1)
    assert losses(2, *both) == losses(2) != losses(2, shifted)


def test_a_window_that_moves_stops_where_a_phase_goes_on_behind_its_steps(tiny_folder: Path) -> None:
    settings = build_phase("priming", tiny_folder, "priming.steps=4").settings.priming
    done = [Draws(0, step, "", 0, torch.device("cpu")) for step in (0, 3, 4, 9)]
    assert [turns_module.progress(settings, draws) for draws in done] == [0, 0.75, 1, 1]
