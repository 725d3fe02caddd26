"""Time and memory of steps are told apart without a gap or an overlap, and telling changes nothing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from phases import PHASES, build_phase, differing
from spawned import run_ranks
from telling import ranks_tell

from pose_core.training import collectives, loop
from pose_core.training.devices import peak_teraflops
from pose_core.training.telemetry import PARTS, HostClock, Memory, StepTimes

CPU = torch.device("cpu")


class Moments:
    """A clock that a test sets; what lies behind ``finished`` has not been reached by the device."""

    def __init__(self) -> None:
        self.now, self.finished = 0.0, float("inf")

    def mark(self) -> float:
        return self.now

    def passed(self, mark: float) -> bool:
        return mark <= self.finished

    def seconds(self, first: float, second: float) -> float:
        return second - first


def spend(times: StepTimes, clock: Moments) -> None:
    """A step of 1 s of data, 2 forward, 4 + 8 backward around 16 of communication, 32 of the rest."""
    with times.part("data"):
        clock.now += 1
    with times.part("forward"):
        clock.now += 2
    with times.part("backward"):
        clock.now += 4
        with times.part("communication"):
            clock.now += 16
        clock.now += 8
    clock.now += 32
    times.end_step()


SPENT = dict.fromkeys(PARTS, 0.0) | {"data": 1, "forward": 2, "backward": 12, "communication": 16, "other": 32}


def test_a_part_within_another_is_taken_out_of_it_and_nothing_is_lost() -> None:
    clock = Moments()
    times = StepTimes(clock)
    for _ in range(3):
        spend(times, clock)
    steps, seconds = times.take()
    assert steps == 3 and seconds == {part: 3 * value for part, value in SPENT.items()}
    assert sum(seconds.values()) == clock.now
    assert times.take() == (0, dict.fromkeys(PARTS, 0.0))


def test_times_are_read_only_once_the_device_has_got_there() -> None:
    clock = Moments()
    times = StepTimes(clock)
    clock.finished = 0.0
    spend(times, clock)
    assert times.take()[0] == 0
    clock.finished = clock.now
    spend(times, clock)
    assert times.take() == (1, SPENT)


def test_what_another_thread_does_beside_the_steps_is_not_told() -> None:
    clock = Moments()
    times = StepTimes(clock)

    def beside() -> None:
        with times.part("communication"):
            clock.now += 5

    with times.part("forward"):
        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()
    times.end_step()
    assert times.take()[1] == dict.fromkeys(PARTS, 0.0) | {"forward": 5}


def test_an_error_within_a_part_ends_it() -> None:
    clock = Moments()
    times = StepTimes(clock)
    with pytest.raises(KeyError), times.part("forward"), times.part("communication"):
        raise KeyError
    clock.now += 5
    times.end_step()
    assert times.take()[1]["other"] == 5


@pytest.mark.parametrize("name", PHASES)
def test_telling_changes_no_bit_and_every_part_of_the_loop_is_told(tiny_folder: Path, name: str) -> None:
    plain, told = (build_phase(name, tiny_folder) for _ in range(2))
    times, memory = StepTimes(HostClock()), memory_of(told)
    plain.train(0, 2)
    memory.begin_step()
    with collectives.recorded(times.part, CPU):
        told.train(0, 2, record=times.part)
    memory.end_step()
    times.end_step()
    assert differing(plain.tensors(), told.tensors()) == []
    assert plain.history == told.history
    seconds = times.take()[1]
    assert all(seconds[part] > 0 for part in ("data", "forward", "backward", "optimiser"))
    assert seconds["communication"] == seconds["checkpoint"] == 0


def memory_of(phase: Any) -> Memory:
    groups = phase.networks.groups()
    return Memory(phase.networks, phase.optimizers, [loop.updated_by(turn, groups) for turn in phase.turns], CPU)


def test_memory_by_role_is_what_the_networks_weigh(tiny_folder: Path) -> None:
    phase = build_phase("priming", tiny_folder)
    memory = memory_of(phase)
    memory.begin_step()
    phase.train(0, 1)
    memory.end_step()
    found = memory.roles()
    generator = sum(each.numel() for each in phase.networks.generator.weights().values())
    adapter = sum(each.numel() for each in phase.networks.groups()["fake_score"].values())
    buffers = sum(each.nbytes for module in phase.networks.modules() for each in module.buffers())
    assert found["average"] == found["gradients"] == 4 * generator
    assert found["weights"] == 4 * (2 * generator + adapter) + buffers
    tensors = len([each for group in phase.optimizers.values() for each in group.state.values()])
    assert found["optimiser"] == 8 * (generator + adapter) + 4 * tensors  # two moments, and a count of steps
    assert found["activations"] >= 0


def test_ranks_wait_for_each_other_in_communication(tiny_folder: Path, tmp_path: Path) -> None:
    for found in run_ranks(ranks_tell, tiny_folder, tmp_path):
        assert found["same"]
        assert all(found["seconds"][part] > 0 for part in ("communication", "forward", "backward", "optimiser"))


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5),
        ("NVIDIA L40S", "bfloat16", 362.05),
        ("NVIDIA GB200", "bfloat16", 2500.0),
        ("Somebody's GPU", "bfloat16", None),
    ],
)
def test_a_peak_is_that_of_the_named_device(name: str, precision: str, teraflops: float | None) -> None:
    assert peak_teraflops(name, precision) == teraflops
