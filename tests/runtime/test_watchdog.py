"""A step far too long, or a collective that never returns, ends every rank with its stacks; nothing else does."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.multiprocessing as mp
from hanging import FileBell, hang

from pose_core import config
from pose_core.runtime import watchdog
from pose_core.runtime.watchdog import EXIT_CODE, KNOWN_STEPS, Limits, Watchdog

LIMITS = Limits(factor=3, least=0.4, pause=2.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(watchdog, "GATHER_SECONDS", 0.5)


def test_the_limit_is_a_multiple_of_the_median_once_there_is_one() -> None:
    limits = Limits(factor=10, least=60, pause=3600)
    assert limits.step([1.0] * (KNOWN_STEPS - 1)) == 3600
    assert limits.step([1.0, 2.0, 300.0]) == 60
    assert limits.step([7.0, 20.0, 900.0]) == 200
    assert limits.step([1000.0, 1000.0, 1000.0]) == 3600


def test_ranks_may_wait_for_one_that_still_tries_to_read() -> None:
    settings = config.load("", ["training.slow_step_seconds=30", "storage.retry_seconds=45"])
    assert Limits.of(settings).least == 75


def ended(tmp_path: Path, steps: Callable[[Watchdog], None], limits: Limits = LIMITS) -> tuple[list[int], str]:
    """Exit codes that a watchdog asked for while ``steps`` ran, and what it told."""
    codes: list[int] = []
    with Watchdog(limits, FileBell(tmp_path), 0, 1, end=codes.append) as dog:
        steps(dog)
    return codes, "".join(file.read_text() for file in tmp_path.glob("rank*"))


def quick_steps(dog: Watchdog, bucket: str = "") -> None:
    for step in range(1, KNOWN_STEPS + 2):
        dog.begin_step(step, bucket)
        dog.end_step()


def test_a_slow_step_ends_the_process_with_the_stacks_of_its_threads(tmp_path: Path) -> None:
    def slow(dog: Watchdog) -> None:
        quick_steps(dog)
        dog.begin_step(7, "")
        time.sleep(1.0)

    codes, told = ended(tmp_path, slow)
    assert codes == [EXIT_CODE]
    assert told.startswith("rank 0: step 7 has taken more than 0 s\n")
    assert "thread MainThread" in told and "time.sleep(1.0)" in told


@pytest.mark.parametrize("what", ["first", "other bucket", "samples", "behind samples", "batch"])
def test_what_takes_long_by_its_nature_ends_nothing(tmp_path: Path, what: str) -> None:
    def steps(dog: Watchdog) -> None:
        if what == "first":
            dog.begin_step(1, "")
            return time.sleep(0.8)
        quick_steps(dog)
        if what in ("samples", "behind samples"):
            dog.excuse()
        if what in ("samples", "batch"):
            return time.sleep(0.8)
        dog.begin_step(8, "another" if what == "other bucket" else "")
        time.sleep(0.8)

    assert ended(tmp_path, steps) == ([], "")


def test_even_that_must_end_some_day_and_an_excuse_is_for_one_step(tmp_path: Path) -> None:
    assert ended(tmp_path, lambda _: time.sleep(2.5))[0] == [EXIT_CODE]

    def steps(dog: Watchdog) -> None:
        quick_steps(dog)
        dog.excuse()
        dog.begin_step(8, "")
        dog.end_step()
        dog.begin_step(9, "")
        time.sleep(0.8)

    assert ended(tmp_path, steps)[0] == [EXIT_CODE]


def test_a_factor_of_nothing_watches_nothing(tmp_path: Path) -> None:
    def steps(dog: Watchdog) -> None:
        quick_steps(dog)
        dog.begin_step(7, "")
        time.sleep(0.8)

    assert ended(tmp_path, steps, Limits(factor=0, least=0.1, pause=0.1)) == ([], "")


def test_one_rank_that_hangs_ends_all_with_the_stacks_of_all(tmp_path: Path) -> None:
    context = mp.spawn(hang, (str(tmp_path),), nprocs=2, join=False)
    assert context is not None
    try:
        for process in context.processes:
            process.join(120)
        assert [process.exitcode for process in context.processes] == [EXIT_CODE, EXIT_CODE]
    finally:
        for process in context.processes:
            process.kill()
    waiting, sleeping = ((tmp_path / f"rank {rank}").read_text() for rank in range(2))
    assert "dist.all_reduce(torch.ones(1))" in waiting and waiting.startswith("rank 0: it is at step 5")
    assert "time.sleep(600)" in sleeping and sleeping.startswith("rank 1: step 5 has taken more than 1 s")
