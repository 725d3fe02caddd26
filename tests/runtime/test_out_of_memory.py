"""Running out of memory ends in one line with the settings that help; the CPU's allocator is really driven there."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from phases import TINY
from ray.exceptions import ActorDiedError, OutOfMemoryError

from pose_core import config
from pose_core.runtime import out_of_memory, planning
from pose_core.runtime.failures import final_error
from pose_core.runtime.out_of_memory import MemoryExhausted, is_out_of_memory, kernel_kills, of_dead_worker, with_advice
from pose_core.settings import Settings
from pose_core.training.simulation import simulate

ATTEMPT = """
import resource, sys
from pathlib import Path
import torch
from phases import build_phase
from pose_core.models.video_model import Condition
from pose_core.runtime.out_of_memory import MemoryExhausted, told
from pose_core.training import loop
from pose_core.training.state import Batch

phase = build_phase("priming", Path(sys.argv[1]))
for clips in map(int, sys.argv[2:]):
    image = torch.zeros(clips, 5, 32), torch.zeros(clips, 10, 3, 32, 32)
    batch = Batch(torch.zeros(clips, 8, 3, 32, 32), Condition(torch.zeros(clips, 6, 32), *image))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (192 << 20), resource.RLIM_INFINITY))
    try:
        with told(torch.device("cpu")):
            loop.train(phase.networks, phase.optimizers, phase.turns, iter([batch]), first_step=0, steps=1, seed=0,
                       gradient_clip=1.0, ema_decay=0.9, after_step=lambda step, values: None, non_finite_steps=1)
        print("it fitted")
    except MemoryExhausted as error:
        print(error)
"""


def attempts(folder: Path, *clips: int) -> list[str]:
    """What a process with an address space of its own size and 192 MiB says after a step on each number of clips."""
    command = [sys.executable, "-c", ATTEMPT, str(folder), *map(str, clips)]
    paths = ":".join(path for path in sys.path if path)
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def settings(folder: Path, clips: int, *overrides: str) -> Settings:
    own = [f"model.teacher={folder}", f"training.batch_per_worker={clips}", "training.workers=1"]
    size = ["data.frames=5", "data.height=128", "data.width=128", "data.text_tokens=6"]
    return config.load("", [*TINY, *own, *size, *overrides])


def test_the_cpus_allocator_is_understood_and_what_helps_is_named_with_its_peak(tiny_folder: Path) -> None:
    fitted, told = attempts(tiny_folder, 1, 64)
    assert fitted == "it fitted"
    assert re.fullmatch(r"rank 0 of 1 ran out of memory, its machine's [\d.]+ GiB, when it asked for .* GiB more", told)
    asked = settings(tiny_folder, 64)
    line = str(with_advice(MemoryExhausted(told), "priming", asked))
    assert line.startswith(told) and "\n" not in line
    found = re.search(
        r"; (training\.\S+) lowers the peak .* in priming from ([\d.]+) to ([\d.]+) GiB by the plan$", line
    )
    assert found is not None, line
    for overrides, gibibytes in (((), found[2]), ((found[1],), found[3])):
        changed = settings(tiny_folder, 64, *overrides)
        assert f"{simulate('priming', changed, tiny_folder).peak_bytes / 2**30:.2f}" == gibibytes
    assert float(found[3]) < 0.9 * float(found[2])


def test_a_change_must_fit_the_device_where_its_memory_is_known(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "simulate", lambda *_: pytest.fail("no change is left to try"))
    least = "activation_checkpointing=full", "generator=one_base", "precision=bfloat16", "accumulation=8"
    asked = settings(tiny_folder, 8, *(f"training.{each}" for each in least))
    none = str(with_advice(MemoryExhausted("out", gibibytes=1e-6), "priming", asked))
    assert "no other memory settings need enough less: take more training.workers" in none


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: ..."), True),
        (MemoryError(), True),
        (RuntimeError("Tried to allocate too much patience"), False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), False),
    ],
)
def test_only_allocators_tell_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected
    with pytest.raises(MemoryExhausted if expected else type(error)), out_of_memory.told(torch.device("cpu")):
        raise error


def test_it_comes_back_after_a_restart_so_it_ends_the_phase_at_once() -> None:
    error = pickle.loads(pickle.dumps(MemoryExhausted("rank 3 of 8", 79.1)))
    assert (str(error), error.gibibytes) == ("rank 3 of 8", 79.1)
    assert final_error([error]) is error


def test_a_worker_that_ray_killed_for_memory_is_told_from_one_that_died() -> None:
    killed = OutOfMemoryError("Task was killed due to the node running low on memory.")
    assert str(of_dead_worker([killed], {})) == "Ray killed a worker because its machine ran out of memory"
    assert of_dead_worker([ActorDiedError()], {}) is None


def test_the_kernels_kills_are_counted_from_when_the_workers_began(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_kills() >= 0
    monkeypatch.setattr(out_of_memory, "_kills_now", lambda nodes: dict.fromkeys(nodes, 4))
    assert of_dead_worker([ActorDiedError()], {"a": 4}) is None
    assert "the kernel killed" in str(of_dead_worker([ActorDiedError()], {"a": 4, "b": 3}))
