"""What a benchmark whose sides take turns makes of their steps: drift falls out, a checkpoint's cost does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import orchestration_overhead as benchmark
import psutil
import pytest
from orchestration_overhead import Pair, Turn

from pose_core.errors import PoseError


@pytest.mark.parametrize(
    ("first", "last", "whole"),
    [
        (60, 80, 0),
        (98, 112, 1),  # 100 to 104
        (94, 102, None),  # not yet stored at the end
        (52, 70, None),  # begun before it
        (44, 110, 2),
    ],
)
def test_a_checkpoint_counts_where_it_is_whole(first: int, last: int, whole: int | None) -> None:
    assert Turn({first: 1.0, last: 2.0}).checkpoints() == whole


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
    assert [pair.ratio for pair in benchmark.in_pairs(bare, whole)] == pytest.approx([1.05] * 4, rel=0.002)


def test_a_checkpoint_costs_what_turns_with_one_take_longer() -> None:
    """One step's time in ten, over fifty steps; turns that hold a part of one are left out."""
    pairs = [Pair(1.0, 12, 0), Pair(1.1, 10, 1), Pair(1.0, 11, 0), Pair(1.1, 20, 2), Pair(3.0, 10, None)]
    assert benchmark.checkpoint_share(pairs) == pytest.approx(1 / 50)
    for too_few in (pairs[:1], pairs[-1:], pairs[::2]):
        with pytest.raises(PoseError, match="--rounds"):
            benchmark.checkpoint_share(too_few)


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
