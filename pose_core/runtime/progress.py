"""What a person sees while a stage runs: a bar with loss and time left on a terminal, lines elsewhere.

A stage that runs as a job has no terminal; it prints events, one JSON line each, which whoever tails its log draws.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

EVENT_PREFIX = "@pose "
EVENTS_VARIABLE = "POSE_EVENTS"
"""Set in a stage's job: print events instead of drawing."""


class Display(Protocol):
    """Where progress goes."""

    def update(self, stage: str, done: int, total: int, **values: float) -> None:
        """``done`` of ``total`` units of a stage are finished; ``values`` (losses) stand beside the bar."""
        ...

    def note(self, text: str) -> None:
        """One line worth reading."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was."""
        ...


class Events:
    """Prints every call as one line for the tailer of a job's log."""

    def update(self, stage: str, done: int, total: int, **values: float) -> None:
        self._print(event="update", stage=stage, done=done, total=total, values=values)

    def note(self, text: str) -> None:
        self._print(event="note", text=text)

    def close(self) -> None:
        """Nothing was opened."""

    def _print(self, **event: Any) -> None:
        print(EVENT_PREFIX + json.dumps(event), flush=True)


class Terminal:
    """Draws one bar a stage; without a terminal, a line at every tenth of the way."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._tasks: dict[str, Any] = {}
        self._tenths: dict[str, int] = {}
        self._started: dict[str, float] = {}
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
        )
        self._bars = Progress(*columns, console=self.console) if self.console.is_terminal else None

    def update(self, stage: str, done: int, total: int, **values: float) -> None:
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._bars is not None:
            if stage not in self._tasks:
                self._bars.start()
                self._tasks[stage] = self._bars.add_task(stage, total=total, values="")
            self._bars.update(self._tasks[stage], completed=done, total=total, values=text)
            return
        tenth, started = (10 * done) // max(total, 1), self._started.setdefault(stage, time.monotonic())
        if tenth > self._tenths.get(stage, -1):
            self._tenths[stage] = tenth
            self.note(f"{stage:<24} {done:>5}/{total}  {time.monotonic() - started:5.0f} s  {text}")

    def note(self, text: str) -> None:
        self.console.print(text, markup=False)

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()


def display() -> Display:
    """The display that fits this process."""
    return Events() if os.environ.get(EVENTS_VARIABLE) else Terminal()


def replay(line: str, target: Display) -> bool:
    """Draw one line of a job's log if it is an event; whether it was."""
    if not line.startswith(EVENT_PREFIX):
        return False
    try:
        event = json.loads(line.removeprefix(EVENT_PREFIX))
        if event["event"] == "update":
            target.update(event["stage"], event["done"], event["total"], **event["values"])
        else:
            target.note(event["text"])
    except (ValueError, TypeError, KeyError):
        return False
    return True
