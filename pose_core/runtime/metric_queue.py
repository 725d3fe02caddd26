"""A bounded queue of metric points that a background thread sends in batches, so that no training step waits."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

FLUSH_SECONDS = 3.0
RETRY_SECONDS = 10.0
BATCH_POINTS = 500
QUEUE_POINTS = 100_000


class Point(NamedTuple):
    """One value of one curve."""

    name: str
    value: float
    milliseconds: int
    """Unix time at which it was measured."""
    step: int


class MetricQueue:
    """Keeps points in order until ``send`` takes them; a full queue drops its oldest points.

    ``send`` gets 1 to ``BATCH_POINTS`` points and returns false if they should be offered again later; it must not
    raise. It is called from one thread at a time.
    """

    def __init__(self, send: Callable[[list[Point]], bool]):
        self._send = send
        self._points: deque[Point] = deque(maxlen=QUEUE_POINTS)
        self._batch: list[Point] = []
        self._sending = threading.Lock()
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, points: Iterable[Point]) -> None:
        """Queue points; they are sent within ``FLUSH_SECONDS``, or at once when a batch is full."""
        self._points.extend(points)
        if self._thread is None:
            self._closing.clear()
            self._thread = threading.Thread(target=self._deliver, name="metric-queue", daemon=True)
            self._thread.start()
        if len(self._points) >= BATCH_POINTS:
            self._wake.set()

    def flush(self) -> bool:
        """Send everything now; false if ``send`` did not take it, which leaves the rest queued."""
        with self._sending:
            while self._batch or self._points:
                while self._points and len(self._batch) < BATCH_POINTS:
                    self._batch.append(self._points.popleft())
                if not self._send(self._batch):
                    return False
                self._batch = []
            return True

    def close(self) -> int:
        """Stop the thread, send everything, and return how many points ``send`` did not take."""
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return 0 if self.flush() else len(self._batch) + len(self._points)

    def _deliver(self) -> None:
        while not self._closing.is_set():
            self._wake.wait(FLUSH_SECONDS)
            self._wake.clear()
            if not self.flush():
                self._closing.wait(RETRY_SECONDS)
