"""The loop takes one batch and every turn a step, repeats bit by bit, and reports what it did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from phases import PHASES, batches, build_phase, differing

from pose_core.training import loop

CURVES = {
    "priming": {
        "fake/loss",
        "fake/gradient_norm",
        "generator/loss",
        "generator/gradient_norm",
        "generator/matching_gradient",
    },
    "equilibrium": {
        "discriminator/loss",
        "discriminator/gradient_norm",
        "discriminator/hinge",
        "discriminator/r1",
        "discriminator/accuracy",
        "generator/loss",
        "generator/gradient_norm",
        "generator/adversarial",
        "generator/conditional_sds",
    },
}


@pytest.mark.parametrize("name", PHASES)
def test_the_same_seed_repeats_bit_by_bit_and_another_does_not(tiny_folder: Path, name: str) -> None:
    first, again, other = (build_phase(name, tiny_folder) for _ in range(3))
    for phase, seed in ((first, 5), (again, 5), (other, 6)):
        phase.train(0, 2, seed=seed)
    assert differing(first.tensors(), again.tensors()) == []
    assert first.history == again.history
    assert first.history != other.history


@pytest.mark.parametrize("name", PHASES)
def test_going_on_from_a_step_is_the_same_as_never_having_stopped(tiny_folder: Path, name: str) -> None:
    straight, in_two = build_phase(name, tiny_folder), build_phase(name, tiny_folder)
    straight.train(0, 3)
    in_two.train(0, 1)
    in_two.train(1, 3)
    assert differing(straight.tensors(), in_two.tensors()) == []
    assert straight.history == in_two.history


@pytest.mark.parametrize("name", PHASES)
def test_every_step_reports_its_curves_as_finite_numbers(tiny_folder: Path, name: str) -> None:
    phase = build_phase(name, tiny_folder)
    phase.train(0, 2)
    for values in phase.history:
        assert values.keys() == CURVES[name]
        assert all(torch.isfinite(torch.tensor(list(values.values()))))


@pytest.mark.parametrize(("first", "steps"), [(0, 3), (2, 4), (3, 3)])
def test_it_takes_one_batch_a_step_and_counts_finished_steps(tiny_folder: Path, first: int, steps: int) -> None:
    phase = build_phase("equilibrium", tiny_folder)
    taken, finished = [], []

    def counted():
        for batch in batches(first):
            taken.append(batch)
            yield batch

    loop.train(
        phase.networks,
        phase.optimizers,
        phase.turns[:1],
        counted(),
        first_step=first,
        steps=steps,
        seed=0,
        gradient_clip=1.0,
        ema_decay=0.9,
        after_step=lambda step, _: finished.append(step),
    )
    assert finished == list(range(first + 1, steps + 1))
    assert len(taken) == steps - first


def test_each_turns_optimizer_holds_its_own_parameters_and_learning_rate(tiny_folder: Path) -> None:
    overrides = "priming.learning_rate=0.002", "priming.fake_learning_rate=0.004"
    phase = build_phase("priming", tiny_folder, *overrides)
    optimizers = loop.build_optimizers(phase.networks, phase.turns, weight_decay=0.25)
    groups = phase.networks.groups()
    for name, rate in (("generator", 0.002), ("fake_score", 0.004)):
        (group,) = optimizers[name].param_groups
        assert [id(parameter) for parameter in group["params"]] == [id(p) for p in groups[name].values()]
        assert (group["lr"], group["weight_decay"]) == (rate, 0.25)


def test_more_fake_updates_move_the_fake_score_further_and_the_generator_still_once(tiny_folder: Path) -> None:
    once, thrice = (build_phase("priming", tiny_folder, f"priming.fake_updates={count}") for count in (1, 3))
    for phase in (once, thrice):
        phase.train(0, 1)
    steps = {
        name: [optimizer.state_dict()["state"][0]["step"].item() for optimizer in (a, b)]
        for name, a, b in ((name, once.optimizers[name], thrice.optimizers[name]) for name in once.optimizers)
    }
    assert steps == {"fake_score": [1, 3], "generator": [1, 1]}


def test_the_fake_score_and_the_heads_start_the_same_whatever_was_drawn_before(tiny_folder: Path) -> None:
    for name in PHASES:
        torch.manual_seed(1)
        first = build_phase(name, tiny_folder).tensors()
        torch.manual_seed(2)
        assert differing(first, build_phase(name, tiny_folder).tensors()) == []
        assert differing(first, build_phase(name, tiny_folder, "run.seed=1").tensors()) != []
