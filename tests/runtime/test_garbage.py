"""Cyclic garbage is looked for between steps, and what was there before training is left alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from pose_core.runtime.garbage import Garbage


class Cycle:
    """Holds itself."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_inside_python_collects_nothing_by_itself_and_a_step_collects_what_it_left() -> None:
    with Garbage() as garbage:
        left = weakref.ref(Cycle())
        assert not gc.isenabled() and left() is not None
        garbage.end_step()
        assert left() is None
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_a_checkpoint_collects_what_outlived_a_step() -> None:
    with Garbage() as garbage:
        for _ in range(4):
            held = Cycle()
            left = weakref.ref(held)
            garbage.end_step()
            del held
            garbage.end_step()
            assert left() is not None
            garbage.before_checkpoint()
            assert left() is None


def test_only_the_first_two_checkpoints_set_aside_what_is_there() -> None:
    set_aside = []
    with Garbage() as garbage:
        for _ in range(4):
            held = Cycle()
            left = weakref.ref(held)
            garbage.before_checkpoint()
            del held
            gc.collect()
            set_aside.append(left() is not None)
    assert set_aside == [True, True, False, False]
