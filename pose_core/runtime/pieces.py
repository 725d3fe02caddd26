"""A part of an object that is read request by request: what came before an interruption is kept."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any

_PACE_SECONDS, _PACE_BYTES = 15, 64 << 10
"""What a store must send in that time for a reader to stay with its answer."""
_STEP_BYTES = 1 << 20


@dataclass
class Piece:
    """Bytes ``start`` to ``stop`` of an object, or to its end if that comes first, as far as they have been read.

    ``version`` changes whenever the object does; an empty one takes the object as it is at the first attempt.
    """

    key: str
    start: int = 0
    stop: int = sys.maxsize
    version: str = ""
    size: int = -1
    """Of the whole object, once it is known."""
    data: bytearray = field(default_factory=bytearray)

    @property
    def at(self) -> int:
        """Where reading goes on."""
        return self.start + len(self.data)

    @property
    def range(self) -> str:
        """What is missing, as HTTP says it; empty for a whole object."""
        last = "" if self.stop == sys.maxsize else str(self.stop - 1)
        return f"bytes={self.at}-{last}" if self.at or last else ""

    @property
    def whole(self) -> bool:
        return self.size >= 0 and self.at >= min(self.stop, self.size)


def receive(body: Any, piece: Piece, length: int) -> None:
    """Append ``length`` bytes of an answer to ``piece``, as long as they come at a bearable pace."""
    due, at_least = time.monotonic() + _PACE_SECONDS, _PACE_BYTES
    while length > 0:
        step = body.read(min(length, _STEP_BYTES))
        if not step:
            raise ConnectionError("cut off")
        piece.data += step
        length -= len(step)
        at_least -= len(step)
        if length and time.monotonic() > due:
            if at_least > 0:
                raise ConnectionError("too slow")
            due, at_least = time.monotonic() + _PACE_SECONDS, _PACE_BYTES
