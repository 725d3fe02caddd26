"""Two FSDP2 ranks over gloo do what one process does, resume bit by bit, and compute in bfloat16 when asked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from phases import CASES, LAST_BIASES, PHASES, Phase, build_phase, differing, load
from ranks import INPUTS, LAST_STEP, SAVED_STEP, moved_by_turn, share, work
from spawned import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint import default_planner

from pose_core.training import parallel

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(tiny_folder: Path, out: Path) -> list[dict[str, Any]]:
    """What each of two ranks found; spawned once for all tests."""
    return run_ranks(work, tiny_folder, out)


@pytest.fixture(scope="module")
def alone(tiny_folder: Path) -> dict[str, Phase]:
    """The same phases in this process, not sharded."""
    phases = {name: build_phase(name, tiny_folder) for name in CASES}
    for phase in phases.values():
        phase.train(0, LAST_STEP)
    return phases


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """This process is a group of its own."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tolerance(name: str, curve: str, finished_steps: int) -> dict[str, float]:
    """How far two sums over the same clips in another order may lie apart, relative (``rel``) or absolute (``abs``)."""
    name = name.split(",")[0]
    if (name, curve) in {("equilibrium", "generator/adversarial"), ("equilibrium", "generator/loss")}:
        # A head's last bias has no gradient while all logits are within the hinge's margins: what is left is rounding,
        # and AdamW turns its sign into a step of a whole learning rate (1e-3). It moves logits, and no other weight.
        return {"abs": 2 * 1e-3 * finished_steps}
    if (name, curve) == ("priming", "generator/matching_gradient"):
        # The mean over ranks of each rank's root mean square is not quite that of the whole batch.
        return {"rel": 0.05}
    if name == "priming" and curve.startswith("generator/"):
        # Fake and real estimate begin equal: their difference, about 1e-3 of either, keeps 1e-3 of the precision.
        return {"rel": 1e-4}
    return {"rel": 1e-5}


def test_a_group_for_another_thread_has_no_thread_that_wakes_up_for_its_sockets(tmp_path: Path) -> None:
    same = {"told": ["rank 0", "rank 0, too"], "socket_threads": 1}
    assert run_ranks(share, tmp_path, tmp_path) == [same, same]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_report_the_losses_and_gradient_norms_of_one_process(ranks, alone, name: str) -> None:
    history = ranks[0][name]["history"]
    assert len(history) == LAST_STEP
    for step, (two, one) in enumerate(zip(history, alone[name].history, strict=True), start=1):
        assert two.keys() == one.keys()
        for curve in one:
            assert two[curve] == pytest.approx(one[curve], **tolerance(name, curve, step)), (step, curve)


def test_the_first_discriminator_turn_agrees_to_the_last_digits(ranks, alone) -> None:
    two, one = ranks[0]["equilibrium"]["history"][0], alone["equilibrium"].history[0]
    for curve in ("discriminator/loss", "discriminator/gradient_norm", "generator/conditional_sds"):
        assert two[curve] == pytest.approx(one[curve], rel=1e-6), curve


@pytest.mark.parametrize("name", CASES)
def test_every_rank_reports_the_same_means(ranks, name: str) -> None:
    assert ranks[0][name]["history"] == ranks[1][name]["history"]


@pytest.mark.parametrize("name", PHASES)
def test_two_ranks_end_with_the_weights_and_the_average_of_one_process(ranks, alone, name: str) -> None:
    for role in ("generator", "average"):
        gathered = ranks[0][name][role]
        module = getattr(alone[name].networks, role).module
        assert gathered.keys() == module.state_dict().keys()
        for key, value in module.state_dict().items():
            # AdamW moves a weight whose gradient is rounding alone by up to a learning rate a step (here 5e-4).
            assert (gathered[key] - value).abs().max() <= 2 * LAST_STEP * 5e-4, (role, key)
            assert (gathered[key] - value).abs().mean() <= 1e-5, (role, key)


@pytest.mark.parametrize("name", CASES)
def test_a_turn_moves_the_same_weights_on_two_ranks_as_in_one_process(ranks, tiny_folder: Path, name: str) -> None:
    alone = moved_by_turn(name, tiny_folder, sharded=False)
    for turn, moved in alone.items():
        # A rank may hold no row of a small weight: what moved is what moved on any of them.
        both = {key for rank in ranks for key in rank[name]["moved"][turn]}
        assert both ^ set(moved) <= LAST_BIASES, turn


@pytest.mark.parametrize("name", PHASES)
def test_gathered_weights_are_rank_zeros_alone_and_each_rank_holds_half(ranks, alone, name: str) -> None:
    assert ranks[1][name]["generator"] == {}
    whole = sum(parameter.numel() for parameter in alone[name].networks.generator.module.parameters())
    assert [rank[name]["held"] / whole for rank in ranks] == pytest.approx([0.5, 0.5], abs=0.05)


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_two_ranks_goes_on_bit_by_bit(ranks, name: str) -> None:
    for rank in ranks:
        assert rank[name]["step"] == SAVED_STEP
        assert rank[name]["resumed_differs"] == []
        assert rank[name]["resumed_history"] == rank[name]["history"][SAVED_STEP:]


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_two_ranks_goes_on_in_one_process(ranks, tiny_folder: Path, out: Path, name: str) -> None:
    phase = build_phase(name, tiny_folder)
    step = load(out / name, phase)
    phase.train(step, LAST_STEP)
    for curve, value in ranks[0][name]["history"][-1].items():
        assert phase.history[0][curve] == pytest.approx(value, **tolerance(name, curve, 1)), curve


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_two_ranks_goes_on_on_one_though_both_parts_of_a_weight_are_read_at_once(
    ranks, one_rank: None, tiny_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    narrow = default_planner.narrow_tensor_by_index

    def while_another_writes(tensor: Tensor, *part: Any) -> Tensor:
        tensor.detach().mul_(1)
        return narrow(tensor, *part)

    monkeypatch.setattr(default_planner, "narrow_tensor_by_index", while_another_writes)
    shrunk, whole = build_phase(name, tiny_folder, sharded=True), build_phase(name, tiny_folder)
    assert load(out / name, shrunk) == load(out / name, whole) == SAVED_STEP
    assert differing(whole.tensors(), shrunk.tensors()) == []


@pytest.mark.parametrize("name", PHASES)
def test_bfloat16_computes_in_bfloat16_and_keeps_weights_times_and_positions_in_float32(ranks, name: str) -> None:
    for rank in ranks:
        assert rank[name]["bfloat16_inputs"] == INPUTS
        assert rank[name]["bfloat16_weights"] == ["torch.float32"]
        assert all(math.isfinite(value) for value in rank[name]["bfloat16_history"][0].values())
    loss = {"priming": "fake/loss", "equilibrium": "discriminator/hinge"}[name]
    exact = ranks[0][name]["history"][0][loss]
    assert ranks[0][name]["bfloat16_history"][0][loss] == pytest.approx(exact, rel=1e-2)


def test_clipping_returns_the_norm_before_and_scales_to_the_limit() -> None:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for parameter, gradient in zip(parameters, (3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([gradient])
    assert parallel.clip_gradients(parameters, 1.0).item() == pytest.approx(5)
    assert [p.grad.item() for p in parameters if p.grad is not None] == pytest.approx([0.6, 0.8], rel=1e-5)
    assert parallel.clip_gradients(parameters, 10.0).item() == pytest.approx(1)
    assert [p.grad.item() for p in parameters if p.grad is not None] == pytest.approx([0.6, 0.8], rel=1e-5)


def test_one_process_is_rank_zero_of_one_and_its_own_mean() -> None:
    assert (parallel.rank(), parallel.ranks()) == (0, 1)
    assert parallel.mean_over_ranks({"loss": torch.tensor(2.5), "norm": torch.tensor(1)}) == {"loss": 2.5, "norm": 1.0}
    assert parallel.mean_over_ranks({}) == {}
