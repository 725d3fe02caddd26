"""The loop takes one batch and every turn a step, repeats bit by bit, and reports what it did."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import spoiling
import torch
from phases import PHASES, batches, build_phase, differing
from spawned import run_ranks
from spoiling import beside_a_bad_loss, everywhere, in_the_gradient, spoiled
from torch import Tensor

from pose_core import config
from pose_core.errors import PoseError
from pose_core.training import build, loop
from pose_core.training.optimizers import build_optimizers

CURVES = {
    "priming": {
        "fake/loss",
        "fake/gradient_norm",
        "fake/skipped",
        "generator/loss",
        "generator/gradient_norm",
        "generator/skipped",
        "generator/matching_gradient",
    },
    "equilibrium": {
        "discriminator/loss",
        "discriminator/gradient_norm",
        "discriminator/skipped",
        "discriminator/hinge",
        "discriminator/r1",
        "discriminator/accuracy",
        "generator/loss",
        "generator/gradient_norm",
        "generator/skipped",
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
        non_finite_steps=3,
    )
    assert finished == list(range(first + 1, steps + 1))
    assert len(taken) == steps - first


def test_each_turns_optimizer_holds_its_own_parameters_and_learning_rate(tiny_folder: Path) -> None:
    overrides = "priming.learning_rate=0.002", "priming.fake_learning_rate=0.004", "priming.adam_beta1=0.5"
    phase = build_phase("priming", tiny_folder, *overrides)
    optimizers = build_optimizers(phase.networks, phase.turns, weight_decay=0.25)
    groups = phase.networks.groups()
    for name, rate in (("generator", 0.002), ("fake_score", 0.004)):
        (group,) = optimizers[name].param_groups
        assert [id(parameter) for parameter in group["params"]] == [id(p) for p in groups[name].values()]
        assert (group["lr"], group["betas"][0], group["weight_decay"]) == (rate, 0.5, 0.25)


@pytest.mark.parametrize("method", ["pose", "dmd2", "apt", "ladd", "lcm"])
def test_a_methods_momentum_is_that_of_the_section_it_reads(method: str) -> None:
    own = "priming.adam_beta1=0.1", "equilibrium.adam_beta1=0.2", "rivals.adam_beta1=0.3"
    settings = config.load("", [f"method.name={method}", *own])
    found = [{turn.adam_beta1 for turn in build.phase_turns(phase, settings)} for phase in ("priming", "equilibrium")]
    assert found == {"pose": [{0.1}, {0.2}], "dmd2": [{0.1}, {0.1}]}.get(method, [{0.3}, {0.3}])


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


@pytest.mark.parametrize("spoil", [beside_a_bad_loss, in_the_gradient, everywhere])
@pytest.mark.parametrize("name", PHASES)
def test_a_turn_with_a_bad_loss_or_gradient_leaves_weights_and_optimiser_as_they_were(
    tiny_folder: Path, name: str, spoil: Callable[[Tensor], Tensor]
) -> None:
    skipping, without = build_phase(name, tiny_folder), build_phase(name, tiny_folder)
    for phase in (skipping, without):
        phase.train(0, 1)
    first, second = skipping.turns
    once = dataclasses.replace(first, repeats=1)
    skipping.train(1, 2, turns=[spoiled(once, {1: spoil}), second])
    without.train(1, 2, turns=[second])
    assert differing(skipping.tensors(), without.tensors()) == []
    assert skipping.history[1][f"{first.name}/skipped"] == 1
    assert skipping.history[1][f"{second.name}/skipped"] == 0
    assert skipping.history[1][f"{second.name}/loss"] == without.history[1][f"{second.name}/loss"]


def test_skipped_updates_are_counted_and_the_turns_go_on_where_they_are_good(tiny_folder: Path) -> None:
    phase = build_phase("equilibrium", tiny_folder)
    first, second = phase.turns
    spoil = {step: everywhere for step in (1, 2, 4, 5)}
    phase.train(0, 7, turns=[spoiled(first, spoil), second])
    assert [values[f"{first.name}/skipped"] for values in phase.history] == [0, 1, 2, 2, 3, 4, 4]
    taken = {group: optimizer.state_dict()["state"][0]["step"].item() for group, optimizer in phase.optimizers.items()}
    assert taken == {"heads": 3, "generator": 7}
    assert all(tensor.isfinite().all() for tensor in phase.tensors().values())


def test_three_skipped_in_a_row_stop_the_run_with_turn_and_step(tiny_folder: Path) -> None:
    phase = build_phase("equilibrium", tiny_folder)
    first, second = phase.turns
    with pytest.raises(PoseError) as caught:
        phase.train(0, 9, turns=[first, spoiled(second, {step: everywhere for step in (1, 3, 4, 5)})])
    assert str(caught.value).startswith("step 6: ")
    assert f"the {second.name} turn" in str(caught.value) and "learning rate" in str(caught.value)
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    assert len(phase.history) == 5


def test_a_repeated_turn_counts_each_of_its_updates(tiny_folder: Path) -> None:
    phase = build_phase("priming", tiny_folder, "priming.fake_updates=3")
    with pytest.raises(PoseError, match="^step 2: .* the fake turn .* 3 updates in a row"):
        phase.train(0, 3, turns=[spoiled(phase.turns[0], {1: everywhere})])


def test_it_ends_where_the_watcher_says_so(tiny_folder: Path) -> None:
    phase, short = build_phase("equilibrium", tiny_folder), build_phase("equilibrium", tiny_folder)
    loop.train(
        phase.networks,
        phase.optimizers,
        phase.turns,
        batches(0),
        first_step=0,
        steps=5,
        seed=0,
        gradient_clip=1.0,
        ema_decay=0.75,
        after_step=lambda step, _: step == 2,
        non_finite_steps=3,
    )
    short.train(0, 2)
    assert differing(phase.tensors(), short.tensors()) == []


def test_a_loss_that_is_bad_on_one_rank_skips_the_update_on_both(tiny_folder: Path, tmp_path: Path) -> None:
    for found in run_ranks(spoiling.work, tiny_folder, tmp_path):
        assert found["differs"] == []
        assert found["skipped"] == [0, 1, 0, 1, 2]
        assert found["error"].startswith("step 6: ")
