"""The clocks of a benchmark whose sides run by turns: what they count, and that a machine's drift falls out."""

from __future__ import annotations

from pathlib import Path

import orchestration_overhead as benchmark
import pytest


class Told(benchmark.Side):
    """A side whose steps are known beforehand."""

    def __init__(self, slices: list[tuple[float, float]], steps: benchmark.Times):
        super().__init__("side", Path(), None, slices)  # type: ignore[arg-type]
        self.told = steps

    def steps(self) -> benchmark.Times:
        return self.told


def by_turns(bare_step: float, whole_step: float, drift: float) -> tuple[Told, Told]:
    """Two sides in slices of ten seconds of a machine that does everything ``drift`` times slower every second."""
    sides = Told([], {}), Told([], {})
    done, now = [0.0, 0.0], 0.0
    for turn in range(120):
        side, step_seconds = sides[turn % 2], (bare_step, whole_step)[turn % 2]
        side.slices.append((now, now + 10))
        for _ in range(1000):
            now += 0.01
            before, done[turn % 2] = done[turn % 2], done[turn % 2] + 0.01 / (step_seconds * drift**now)
            if int(done[turn % 2]) > int(before):
                side.told[int(done[turn % 2])] = now
    return sides


def test_a_clock_stands_still_between_slices() -> None:
    side = Told([(10, 20), (30, 40)], {1: 12.0, 2: 18.0, 3: 34.0, 4: 39.0})
    assert side.ran(0, 100) == 20
    assert side.ran(18, 34) == 6
    assert side.step_seconds(0, 100) == (8 + 9) / 3


@pytest.mark.parametrize("drift", [1.0, 1.0005])
def test_a_part_is_compared_with_the_bare_steps_of_its_own_minutes(drift: float) -> None:
    bare, whole = by_turns(0.8, 0.84, drift)
    for first in (40, 90, 140):
        assert benchmark.part(bare, whole, first).ratio == pytest.approx(1.05, rel=0.01)
