"""Raw videos in a store, as the sources of ``data/sources`` read them: whole objects read ahead, and parts of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

from pose_core.data.sources.source import Stored
from pose_core.runtime.steady_files import SteadyFiles
from pose_core.runtime.storage import Store


@dataclass(frozen=True)
class RawFiles:
    """Objects of a store, read steadily. What is wrong with the store raises ``StorageError``, which no source takes
    for a bad video; so does an object that is not the one listed any more.
    """

    files: SteadyFiles

    @property
    def store(self) -> Store:
        """Where the objects are."""
        return self.files.store

    def open(self, stored: Stored) -> BinaryIO:
        """The object as a seekable file that reads ahead."""
        return self.files.open(stored.key, stored.version)

    def read(self, stored: Stored, start: int, size: int) -> bytes:
        """Bytes of an object; fewer only at its end."""
        stop = min(start + size, stored.size)
        return bytes(self.files.read(stored.key, start, stop, stored.version)) if start < stop else b""
