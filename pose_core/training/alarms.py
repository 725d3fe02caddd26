"""Decides whether a generator in training has collapsed, from figures of its samples and of its teacher's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Collapse(NamedTuple):
    """A figure that has fallen too far below the teacher's."""

    figure: str
    value: float
    teacher: float


class Alarms:
    """Watches figures that are higher where a generator is healthier.

    A figure has collapsed when it was once at ``lowest_share`` of the teacher's value or above, and is below it now. A
    generator that has only begun may well be below: it learns, and has lost nothing yet. So each figure is armed by the
    first value that is high enough, and stays armed.

    Args:
        teacher: the teacher's value by figure; one of zero never raises an alarm.
        lowest_share: in [0, 1].
        armed: figures that were high enough before, where a phase goes on from a checkpoint.
    """

    def __init__(self, teacher: Mapping[str, float], lowest_share: float, armed: Iterable[str] = ()):
        self.teacher, self.lowest_share = dict(teacher), lowest_share
        self.armed = set(armed)
        self.collapsed: dict[str, Collapse] = {}

    def look(self, values: Mapping[str, float]) -> list[Collapse]:
        """Take one measurement; the figures that have collapsed since the last. ``collapsed`` holds all of now."""
        before, self.collapsed = self.collapsed, {}
        for figure, teacher in self.teacher.items():
            # A value that is not a number is below, too.
            if values[figure] >= self.lowest_share * teacher:
                self.armed.add(figure)
            elif figure in self.armed:
                self.collapsed[figure] = Collapse(figure, values[figure], teacher)
        return [collapse for figure, collapse in self.collapsed.items() if figure not in before]
