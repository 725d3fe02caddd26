"""Reading ahead: what closing does to those who wait, and where an error comes out."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from pose_core.data.order import Chunk, Order, Position
from pose_core.runtime.batches import READY_BATCHES, Batches, ClosedError


class Shards:
    """Two chunks of four rows a shard; rows of ``broken`` cannot be read, all others are held back until ``given``."""

    def __init__(self, broken: Chunk | None = None, given: bool = True):
        self.broken, self.given = broken, threading.Event()
        self.asked = threading.Event()
        if given:
            self.given.set()

    def counts(self, chunk: Chunk) -> dict[str, int] | None:
        return {"": 4} if chunk.number < 2 else None

    def want(self, chunk: Chunk, bucket: str) -> None:
        pass

    def rows(self, chunk: Chunk, bucket: str) -> dict[str, Any]:
        self.asked.set()
        self.given.wait()
        if chunk == self.broken:
            raise OSError("unreadable")
        return {"latents": np.full((4, 1), chunk.shard)}

    def drop(self, chunk: Chunk, bucket: str) -> None:
        pass

    def refused(self) -> list[str]:
        return []

    def close(self) -> None:
        self.given.set()


def reader(shards: Shards) -> Batches:
    return Batches(shards, Order(3, 2, seed=0), Position(), batch=2, rank=0, ranks=1, ahead=3)


def test_closing_ends_those_who_wait_for_room() -> None:
    batches = reader(Shards())
    next(batches)
    # Nobody takes more, so both threads come to wait for room.
    while len(batches._ready._items) < READY_BATCHES or len(batches._planned._items) < 3:
        threading.Event().wait(0.01)
    batches.close()
    assert not any(thread.is_alive() for thread in batches._threads)
    with pytest.raises(ClosedError):
        next(batches)


def test_closing_ends_one_who_waits_for_a_batch() -> None:
    shards = Shards(given=False)
    batches, told = reader(shards), []

    def wait() -> None:
        try:
            next(batches)
        except ClosedError as error:
            told.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    shards.asked.wait()
    batches.close()
    thread.join(10)
    assert not thread.is_alive() and len(told) == 1


def test_an_error_comes_in_place_of_its_batch() -> None:
    with reader(Shards()) as batches:
        first = next(batches).places[0].chunk
    with reader(Shards(broken=first)) as batches, pytest.raises(OSError, match="unreadable"):
        next(batches)
