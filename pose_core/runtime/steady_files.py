"""Reads and writes that outlast trouble with the store: retried with backoff for a set time; a cut read goes on."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import tenacity

from pose_core.data.sources.source import Stored
from pose_core.errors import DataError, ReplacedError, StorageError, StorageGoneError
from pose_core.runtime.pieces import Piece
from pose_core.runtime.s3_client import forget_credentials
from pose_core.runtime.storage import Store

PIECE_BYTES = 16 << 20
"""Most bytes asked for at once; ``retry_seconds`` are for each."""
READ_AHEAD_BYTES = 4 << 20
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.2, 5.0
T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SteadyFiles:
    """The objects of a store, read and written steadily; it holds only its settings, so that it travels into tasks.

    A store that does not answer, answers 500 or 503, sends too slowly or cuts an answer off, and credentials that it
    refuses, are tried again, with credentials read anew, for up to ``retry_seconds``. All bytes of one read are of one
    version of the object: one replaced meanwhile is begun again, as long as nobody has seen any of it.
    """

    store: Store
    retry_seconds: float

    @property
    def uri(self) -> str:
        """Where the store is."""
        return self.store.uri

    def child(self, prefix: str) -> SteadyFiles:
        """The same below ``prefix``."""
        return SteadyFiles(self.store.child(prefix), self.retry_seconds)

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Write an object whole, or not at all. A full disk is waited for, too: somebody may free it.

        Raises:
            StorageGoneError: after ``retry_seconds`` of trying; it says what was wrong last.
            StorageError: at once, where waiting would not help.
        """
        self._steadily(self.store.write_bytes, key, data)

    def stored(self, prefix: str = "") -> list[Stored]:
        """All objects below ``prefix``, as ``Store.stored`` gives them."""
        return self._steadily(self.store.stored, prefix)

    def read(self, key: str, start: int = 0, stop: int = sys.maxsize, version: str = "") -> bytearray:
        """Bytes ``start`` to ``stop`` of an object, to its end without one.

        Raises:
            StorageGoneError: after ``retry_seconds`` without progress; it says what was wrong last.
            StorageError: at once, where waiting would not help.
        """
        return self.piece(key, start, stop, version).data

    def open(self, key: str, version: str = "") -> BinaryIO:
        """An object as a seekable file that reads ahead; it fails once the object is not the same any more."""
        return io.BufferedReader(_SteadyFile(self, key, version), READ_AHEAD_BYTES)

    def parse(self, key: str, parse: Callable[[bytearray], T]) -> T:
        """What ``parse`` makes of a whole object; one that it refuses with ``DataError`` is read again for a while.

        Raises:
            DataError: what ``parse`` said last, after ``retry_seconds``.
        """
        refused = tenacity.retry_if_exception_type(DataError)
        return self._retrying(refused, reraise=True)(lambda: parse(self.read(key)))

    def piece(self, key: str, start: int, stop: int, version: str) -> Piece:
        """A part of an object, with the version and size of the whole."""
        whole, until = Piece(key, start, stop, version), time.monotonic() + self.retry_seconds
        while not whole.whole:
            step = Piece(key, whole.at, min(stop, whole.at + PIECE_BYTES), whole.version, whole.size)
            try:
                self._steadily(self.store.fill, step)
            except ReplacedError:
                if version or time.monotonic() > until:
                    raise
                whole = Piece(key, start, stop)
                continue
            whole.version, whole.size = step.version, step.size
            whole.data = whole.data + step.data if whole.data else step.data
        return whole

    def _steadily(self, request: Callable[..., T], *arguments: Any) -> T:
        passing = tenacity.retry_if_exception(lambda error: isinstance(error, StorageError) and error.passing)
        try:
            return self._retrying(passing)(request, *arguments)
        except tenacity.RetryError as error:
            last = error.last_attempt.exception()
            message = f"{last}; gave up after {self.retry_seconds:g} s (storage.retry_seconds)"
            raise StorageGoneError(message, in_call=getattr(last, "exit_code", 1) == 2) from last

    def _retrying(self, condition: tenacity.retry_base, reraise: bool = False) -> tenacity.Retrying:
        def before_sleep(state: tenacity.RetryCallState) -> None:
            forget_credentials()
            if state.attempt_number == 1:
                error = state.outcome.exception() if state.outcome else None
                _log.warning("%s; trying again for up to %g s", error, self.retry_seconds)

        return tenacity.Retrying(
            retry=condition,
            wait=tenacity.wait_random_exponential(multiplier=_FIRST_WAIT_SECONDS, max=_LONGEST_WAIT_SECONDS),
            stop=tenacity.stop_after_delay(self.retry_seconds),
            before_sleep=before_sleep,
            reraise=reraise,
        )


class _SteadyFile(io.RawIOBase):
    """The raw file behind ``SteadyFiles.open``."""

    def __init__(self, files: SteadyFiles, key: str, version: str):
        self._files, self._key, self.version = files, key, version
        self._at, self._size = 0, -1

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self._size < 0:
            self._fetch(0, 1)
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if 0 <= self._size <= self._at or not len(buffer):
            return 0
        data = self._fetch(self._at, self._at + len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _fetch(self, start: int, stop: int) -> bytearray:
        piece = self._files.piece(self._key, start, stop, self.version)
        self.version, self._size = piece.version, piece.size
        return piece.data
