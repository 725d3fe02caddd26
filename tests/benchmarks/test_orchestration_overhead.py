"""What a benchmark whose sides take turns makes of their steps: drift falls out, a checkpoint's cost does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import orchestration_overhead as benchmark
import psutil
import pytest
from orchestration_overhead import Turn


def turn_of_steps(first: int, last: int, slower: float = 0.0, every: int = 2) -> Turn:
    """Steps of 0.8 s, every second one told of; those that a checkpoint is written in take longer by ``slower``."""
    times, now = {}, 0.0
    for step in range(first, last + 1):
        if step % every == 0:
            times[step] = now
        now += 0.8 + (slower if step >= 50 and step % 50 < 6 else 0.0)
    return Turn(times)


@pytest.mark.parametrize(
    ("first", "last", "whole"),
    [
        (60, 80, 0),
        (10, 40, 0),  # nothing is stored at the beginning
        (98, 112, 1),  # 100 to 106
        (94, 104, 0),  # not yet stored at the end
        (52, 70, 0),  # begun before it
        (44, 110, 2),
        (50, 56, 0),  # no other step to compare with
    ],
)
def test_a_checkpoint_costs_what_its_steps_take_longer(first: int, last: int, whole: int) -> None:
    """Six steps, each longer by a tenth of a second, of fifty; where it is whole, told of every second step or not."""
    for every in (1, 2):
        shares = turn_of_steps(first, last, 0.1, every).checkpoint_shares()
        assert shares == pytest.approx([0.6 / (50 * 0.8)] * whole)
    assert turn_of_steps(first, last).checkpoint_shares() == pytest.approx([0.0] * whole, abs=1e-12)


@pytest.mark.parametrize("slower_every_second", [0.0, 0.001])
def test_a_machine_that_grows_slower_does_so_for_both_sides(slower_every_second: float) -> None:
    bare, whole, now, done = [], [], 0.0, 0
    for turn in range(9):
        times = {}
        for _ in range(12):
            now += (0.8 if turn % 2 == 0 else 0.84) * (1 + slower_every_second * now)
            done += 1
            times[done] = now
        (bare if turn % 2 == 0 else whole).append(Turn(times))
    assert benchmark.over_those_around(bare, whole) == pytest.approx([1.05] * 4, rel=0.002)


def test_a_side_is_all_that_it_has_started_marked_or_not(tmp_path: Path) -> None:
    """As those of Ray's processes that write their title over their environment."""
    program = "import subprocess; subprocess.run(['env', '-i', 'sleep', '60'])"
    side = benchmark.start("side", tmp_path / "side", [sys.executable, "-c", program])
    other = subprocess.Popen(["env", "-i", "sleep", "60"])
    try:
        family = psutil.Process(side.process.pid)
        while not any(child.name() == "sleep" for child in family.children()):
            assert side.process.poll() is None
        whole = {family, *family.children()}
        assert set(benchmark.marked(side.folder)) == whole
        benchmark.end(side)
        assert psutil.wait_procs(whole, timeout=30)[1] == [] and other.poll() is None
    finally:
        benchmark.end(side)
        other.kill()
        other.wait()
