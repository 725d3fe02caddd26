"""A worker's rows of every batch, read ahead in the background: the order is planned, chunks come, rows are picked."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np

from pose_core.data.order import Chunk, Order, Place, Planned, Position, plan

Item = TypeVar("Item")
READY_BATCHES = 2
"""Batches that wait, ready, for the training step."""
_CLOSE_SECONDS = 5


class Chunks(Protocol):
    """Where chunks come from. Methods are called from several threads."""

    def counts(self, chunk: Chunk) -> dict[str, int] | None:
        """Rows by bucket; None where the shard has ended before it. Waits until that is known."""
        ...

    def want(self, chunk: Chunk, bucket: str) -> None:
        """Rows of this bucket of the chunk will be asked for."""
        ...

    def rows(self, chunk: Chunk, bucket: str) -> dict[str, Any]:
        """Columns, each with as many cells as ``counts`` said; waits for them."""
        ...

    def drop(self, chunk: Chunk, bucket: str) -> None:
        """These rows are not needed any more; they may never have been wanted."""
        ...

    def refused(self) -> list[str]:
        """A line of JSON for each clip of the first epoch that could not be used, as far as it has been read."""
        ...

    def close(self) -> None:
        """Nothing will be asked any more."""
        ...


@dataclass(frozen=True)
class RankBatch:
    """A worker's rows of one batch, all of one ``bucket``, and the position behind the batch.

    ``columns`` holds a stacked array or a list of texts a name; ``places`` is where the whole batch's clips are.
    """

    bucket: str
    columns: dict[str, Any]
    places: tuple[Place, ...]
    after: Position


class Batches:
    """Iterates over a worker's part of the batches from ``position`` on, without end.

    Every one of ``ranks`` workers must be given the same order, batch size and position. ``batch`` is of all workers.
    ``ahead`` batches are planned, and their chunks loaded, before they are needed. Close it, or use it as a context.
    An error of the background comes out of ``next`` in place of the batch that it concerns.
    """

    def __init__(
        self, chunks: Chunks, order: Order, position: Position, *, batch: int, rank: int, ranks: int, ahead: int
    ):
        self.position = position
        """Behind the batch that was last given out."""
        self.waited_seconds = 0.0
        """How long ``next`` has waited for data, all calls together."""
        self._chunks, self._rank, self._ranks = chunks, rank, ranks
        self._planned = _Handover[Planned](ahead)
        self._ready = _Handover[RankBatch](READY_BATCHES)
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._pending: Counter[tuple[Chunk, str]] = Counter()
        self._window: frozenset[tuple[Chunk, str]] = frozenset()
        self._known: set[tuple[Chunk, str]] = set()
        plans = plan(order, chunks.counts, batch, position)
        self._threads = [
            threading.Thread(target=self._run, args=(work, out), daemon=True)
            for work, out in ((lambda: map(self._announce, plans), self._planned), (self._assembled, self._ready))
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> RankBatch:
        started = time.monotonic()
        batch = self._ready.take()
        self.waited_seconds += time.monotonic() - started
        self.position = batch.after
        return batch

    def refused(self) -> list[str]:
        """See ``Chunks.refused``."""
        return self._chunks.refused()

    def close(self) -> None:
        """Stop reading ahead; returns when nothing is read any more, or soon."""
        self._closed.set()
        self._planned.close()
        self._ready.close()
        self._chunks.close()
        for thread in self._threads:
            thread.join(_CLOSE_SECONDS)

    def _run(self, work: Callable[[], Iterator[Any]], out: _Handover[Any]) -> None:
        """Put what ``work`` gives into ``out``, at last the error that ended it."""
        try:
            for item in work():
                out.put(item)
        except ClosedError:
            pass
        except BaseException as error:
            with suppress(ClosedError):
                out.put(error)

    def _announce(self, planned: Planned) -> Planned:
        if self._closed.is_set():
            raise ClosedError
        own = Counter((place.chunk, place.bucket) for place in planned.slice(self._rank, self._ranks))
        with self._lock:
            self._window = planned.window
            self._known |= planned.window
            self._pending.update(own.keys())
            for chunk, bucket in own:
                self._chunks.want(chunk, bucket)
        return planned

    def _assembled(self) -> Iterator[RankBatch]:
        while True:
            planned = self._planned.take()
            own = planned.slice(self._rank, self._ranks)
            columns = self._pick(own)
            yield RankBatch(planned.bucket, columns, planned.places, planned.after)
            del columns
            with self._lock:
                self._pending -= Counter({(place.chunk, place.bucket) for place in own})
                done = self._known - self._pending.keys() - self._window
                self._known -= done
            for chunk, bucket in done:
                self._chunks.drop(chunk, bucket)

    def _pick(self, places: Sequence[Place]) -> dict[str, Any]:
        """The columns of these rows. They are ordered by chunk, so each chunk's are together."""
        found = [(self._chunks.rows(place.chunk, place.bucket), place.row) for place in places]
        return {name: _column([columns[name][row] for columns, row in found]) for name in found[0][0]}


class ClosedError(Exception):
    """Nobody listens any more."""


class _Handover(Generic[Item]):
    """A queue of at most ``size`` items, or of errors in place of items, that can be closed under those who wait at it.

    Before Python 3.13 ``queue.Queue`` cannot, so that its users look now and then, beside a training that shares the
    core and the interpreter with them.
    """

    def __init__(self, size: int):
        self._size = size
        self._items: deque[Item | BaseException] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: Item | BaseException) -> None:
        """Wait for room. Raises ``ClosedError``."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._size)
            if self._closed:
                raise ClosedError
            self._items.append(item)
            self._changed.notify_all()

    def take(self) -> Item:
        """The oldest item, waited for. Raises ``ClosedError``, or the error that was put."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._items)
            if self._closed:
                raise ClosedError
            item = self._items.popleft()
            self._changed.notify_all()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """From now on both raise, also for those who wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _column(cells: list[Any]) -> Any:
    return np.stack(cells) if isinstance(cells[0], np.ndarray) else cells
