"""Raw videos in a store, as the sources of ``data/sources`` read them: whole objects read ahead, and parts of them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import BinaryIO, cast

from pose_core.data.sources.source import Stored
from pose_core.runtime.storage import Store

READ_AHEAD_BYTES = 8 << 20


@dataclass(frozen=True)
class RawFiles:
    """Objects of a store. A store that fails raises ``StorageError``, which no source takes for a bad video."""

    store: Store

    def open(self, stored: Stored) -> BinaryIO:
        """The object as a seekable file that fetches ``READ_AHEAD_BYTES`` at a time."""
        raw = _Ranges(self.store, stored)
        return cast(BinaryIO, io.BufferedReader(raw, min(READ_AHEAD_BYTES, max(stored.size, 1))))

    def read(self, stored: Stored, start: int, size: int) -> bytes:
        """Bytes of an object; fewer only at its end."""
        return self.store.read_range(stored, start, size)


class _Ranges(io.RawIOBase):
    """An object of known size, read by ranges."""

    def __init__(self, store: Store, stored: Stored):
        self._store, self._stored, self._at = store, stored, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._stored.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        content = self._store.read_range(self._stored, self._at, len(buffer))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)
