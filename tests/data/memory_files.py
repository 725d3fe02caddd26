"""Objects in a dictionary, as sources see a store."""

from __future__ import annotations

import hashlib
import io
from typing import BinaryIO

from pose_core.data.sources import SOURCES, claim
from pose_core.data.sources.source import Sample, Stored


class MemoryFiles:
    """What ``data/sources`` reads; every version is a digest of the content."""

    def __init__(self, objects: dict[str, bytes]):
        self.objects = objects

    def listing(self) -> list[Stored]:
        return [
            Stored(key, len(content), hashlib.sha256(content).hexdigest())
            for key, content in sorted(self.objects.items())
        ]

    def open(self, stored: Stored) -> BinaryIO:
        return io.BytesIO(self.objects[stored.key])

    def read(self, stored: Stored, start: int, size: int) -> bytes:
        return self.objects[stored.key][start : start + size]

    def samples(self, max_bytes: int = 1 << 30) -> list[Sample]:
        """Every video that the sources find."""
        units = claim(self.listing(), self)
        return [sample for unit in units for sample in SOURCES[unit.source].samples(unit, self, max_bytes)]
