"""What the workers of a phase tell its driver while they train: steps, lines worth reading, and why they end.

It stands in the cluster's own key-value store, as Ray's libraries keep what they know there: no process holds it that
could die, or that would wake up beside the training.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.experimental import internal_kv

from pose_core.runtime.progress import Display

DRAW_SECONDS = 1.0
_NEWEST, _NOTES, _RINGS, _KILLS = "newest", "note/", "ring/", "kills/"


class Board:
    """The board of one phase; travels to every worker.

    What a person sees, ``update`` and ``note``, is lost while the cluster's head does not answer; all else raises
    ``RayError`` then.
    """

    def __init__(self) -> None:
        self._namespace = f"pose-{uuid.uuid4().hex}"

    def update(self, step: int, values: dict[str, float]) -> None:
        """For rank 0: the newest step and its losses; no values mean that it has just begun, at ``step``."""
        with suppress(ray.exceptions.RayError):
            if not values and (step or self.newest()[0]):
                self.note(f"goes on from step {step}")
            self._put(_NEWEST, [step, values])

    def newest(self) -> tuple[int, dict[str, float]]:
        """What ``update`` was told last; step 0 without losses before that."""
        step, values = self._get(_NEWEST) or (0, {})
        return step, values

    def note(self, text: str) -> None:
        """For rank 0: one line for the person who watches."""
        with suppress(ray.exceptions.RayError):
            self._put(_in_order(_NOTES), text)

    def notes(self) -> dict[str, str]:
        """All lines, oldest first, by names that stay theirs."""
        return self._under(_NOTES)

    def ring(self, reason: str, stacks: str) -> None:
        """For the watchdog of a rank that ends: why, and what its threads did."""
        self._put(_in_order(_RINGS), [reason, stacks])

    def rung(self) -> int:
        """How often a rank's watchdog has ended it, in all attempts."""
        return len(self._keys(_RINGS))

    def rings(self) -> dict[str, tuple[str, str]]:
        """All reasons with stacks, oldest first, by names that stay theirs."""
        return {key: tuple(value) for key, value in self._under(_RINGS).items()}

    def at_work(self, node: str, kernel_kills: int) -> None:
        """For every rank of every attempt as it begins; a node's first number stays."""
        self._put(_KILLS + node, kernel_kills, overwrite=False)

    def kills(self) -> dict[str, int]:
        """By node id, how many processes its kernel had killed before the phase began there."""
        return {key.removeprefix(_KILLS): value for key, value in self._under(_KILLS).items()}

    def clear(self) -> None:
        """Forget everything."""
        internal_kv._internal_kv_del("", del_by_prefix=True, namespace=self._namespace)

    def _put(self, key: str, value: Any, *, overwrite: bool = True) -> None:
        internal_kv._internal_kv_put(key, json.dumps(value), overwrite, namespace=self._namespace)

    def _get(self, key: str) -> Any:
        found = internal_kv._internal_kv_get(key, namespace=self._namespace)
        return None if found is None else json.loads(found)

    def _keys(self, prefix: str) -> list[str]:
        return sorted(key.decode() for key in internal_kv._internal_kv_list(prefix, namespace=self._namespace))

    def _under(self, prefix: str) -> dict[str, Any]:
        return {key: self._get(key) for key in self._keys(prefix)}


def _in_order(prefix: str) -> str:
    """A new key under ``prefix``; keys sort by when they were made."""
    return f"{prefix}{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"


@contextmanager
def drawn(display: Display, stage: str, steps: int) -> Iterator[Board]:
    """A board whose content a thread keeps drawing until the block ends; then it is cleared."""
    board, ended = Board(), threading.Event()
    last, seen = -1, set[str]()

    def draw() -> None:
        nonlocal last
        for key, (reason, stacks) in board.rings().items():
            if key not in seen:
                display.note(f"{stage:<24} ended by the watchdog, {reason}; its stacks are in this stage's log")
                print(stacks, flush=True)
                seen.add(key)
        for key, text in board.notes().items():
            if key not in seen:
                display.note(f"{stage:<24} {text}")
                seen.add(key)
        step, values = board.newest()
        if step != last:
            display.update(stage, step, steps, **values)
            last = step

    def keep_drawing() -> None:
        while not ended.wait(DRAW_SECONDS):
            with suppress(ray.exceptions.RayError):
                draw()

    thread = threading.Thread(target=keep_drawing, daemon=True)
    thread.start()
    try:
        yield board
    finally:
        ended.set()
        thread.join(timeout=5)
        # Also after a failure: the lines before it may say why.
        with suppress(ray.exceptions.RayError):
            draw()
            board.clear()
