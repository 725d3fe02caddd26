"""An alarm rings for what was once healthy and is no longer, and for nothing else."""

from __future__ import annotations

import math

import pytest

from pose_core.training.alarms import Alarms, Collapse

TEACHER = {"motion": 8.0, "diversity": 20.0}


def healthy(**changed: float) -> dict[str, float]:
    return {"motion": 8.0, "diversity": 20.0} | changed


def test_a_generator_that_has_not_yet_learned_to_move_raises_no_alarm() -> None:
    alarms = Alarms(TEACHER, 0.5)
    for motion in (0.0, 1.0, 3.9):
        assert alarms.look(healthy(motion=motion)) == []
    assert alarms.armed == {"diversity"} and not alarms.collapsed


def test_a_figure_that_falls_below_its_share_rings_once_and_stays_collapsed_until_it_is_back() -> None:
    alarms = Alarms(TEACHER, 0.5)
    assert alarms.look(healthy(motion=4.0)) == []  # the share itself is enough
    assert alarms.look(healthy(motion=3.9)) == [Collapse("motion", 3.9, 8.0)]
    assert alarms.look(healthy(motion=1.0)) == []
    assert alarms.collapsed == {"motion": Collapse("motion", 1.0, 8.0)}
    assert alarms.look(healthy(motion=5.0)) == [] and not alarms.collapsed
    assert alarms.look(healthy(motion=2.0)) == [Collapse("motion", 2.0, 8.0)]


def test_figures_ring_each_for_itself() -> None:
    alarms = Alarms(TEACHER, 0.5)
    alarms.look(healthy())
    assert [collapse.figure for collapse in alarms.look(healthy(diversity=1.0))] == ["diversity"]
    assert [collapse.figure for collapse in alarms.look(healthy(diversity=1.0, motion=1.0))] == ["motion"]
    assert set(alarms.collapsed) == {"motion", "diversity"}


def test_a_phase_that_goes_on_remembers_what_was_healthy() -> None:
    before = Alarms(TEACHER, 0.5)
    before.look(healthy(diversity=1.0))
    after = Alarms(TEACHER, 0.5, before.armed)
    assert [collapse.figure for collapse in after.look({"motion": 1.0, "diversity": 1.0})] == ["motion"]


def test_a_value_that_is_not_a_number_is_a_collapse() -> None:
    alarms = Alarms(TEACHER, 0.5)
    alarms.look(healthy())
    assert [collapse.figure for collapse in alarms.look(healthy(motion=math.nan))] == ["motion"]


@pytest.mark.parametrize(("teacher", "share"), [({"motion": 0.0}, 0.5), ({"motion": 8.0}, 0.0)])
def test_a_still_teacher_or_a_share_of_nothing_never_rings(teacher: dict[str, float], share: float) -> None:
    alarms = Alarms(teacher, share)
    assert not alarms.look({"motion": 3.0}) and not alarms.look({"motion": 0.0})
