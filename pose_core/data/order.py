"""The order in which clips are trained on: a pure function of the seed, the epoch, the shards and what they hold.

Each epoch takes the shards in a new order, a few side by side (a group). The next few clips of each shard of a group (a
chunk of each) are a window, in which clips are shuffled. A bucket's clips, window after window and epoch after epoch,
are one endless line, cut into batches; what is left of a window goes before the next one's. So each clip comes once an
epoch, no batch is short or of two buckets, and neither timing nor the number of workers can change a thing: a worker's
rows are its slice of each batch. Only the chunks of one window have to be known at a time.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pose_core.errors import CheckpointError, DataError


class Chunk(NamedTuple):
    """The clips of a shard that enter a window together; ``shard`` and ``number`` count from 0."""

    epoch: int
    shard: int
    number: int


class Place(NamedTuple):
    """Where one clip is: row ``row`` of those of ``bucket`` in ``chunk``."""

    chunk: Chunk
    bucket: str
    row: int


Counts = Callable[[Chunk], dict[str, int] | None]
"""Rows by bucket in a chunk; None where the shard has ended before it. May wait for whoever finds out."""


@dataclass(frozen=True)
class Position:
    """How far training is: all that a checkpoint has to keep of its data.

    ``window`` of ``group`` of ``epoch`` is being read, ``taken`` rows by bucket of it and of what was ``left`` over by
    earlier windows are trained on.
    """

    epoch: int = 0
    group: int = 0
    window: int = 0
    taken: dict[str, int] = field(default_factory=dict)
    left: tuple[Place, ...] = ()

    def to_json(self) -> str:
        """As text that ``from_json`` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Position:
        """Inverse of ``to_json``.

        Raises:
            CheckpointError: the text is something else.
        """
        try:
            value = json.loads(text)
            left = tuple(Place(Chunk(*map(int, chunk)), str(bucket), int(row)) for chunk, bucket, row in value["left"])
            taken = {str(bucket): int(rows) for bucket, rows in value["taken"].items()}
            return cls(int(value["epoch"]), int(value["group"]), int(value["window"]), taken, left)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint's data position is damaged ({error}); remove that step") from None


@dataclass(frozen=True)
class Order:
    """``shards`` shards, ``side_by_side`` of them read at a time, in the order that ``seed`` decides."""

    shards: int
    side_by_side: int
    seed: int

    @property
    def groups(self) -> int:
        """Groups of an epoch."""
        return math.ceil(self.shards / self.side_by_side)

    def group(self, epoch: int, group: int) -> list[int]:
        """The shards of a group."""
        return _shuffled(self.shards, self.seed, epoch)[group * self.side_by_side : (group + 1) * self.side_by_side]

    def groups_from(self, epoch: int, group: int) -> Iterator[tuple[int, int]]:
        """Epoch and number of this group and of all that follow, without end."""
        while True:
            for each in range(group, self.groups):
                yield epoch, each
            epoch, group = epoch + 1, 0

    def line_up(self, chunks: dict[Chunk, dict[str, int]]) -> dict[str, list[Place]]:
        """The clips of a window by bucket: each chunk's in a random order, all chunks spread evenly over it."""
        times: dict[str, list[tuple[float, Place]]] = {}
        for chunk, counts in chunks.items():
            for bucket, rows in sorted(counts.items()):
                draws = np.random.default_rng([self.seed, *chunk, zlib.crc32(bucket.encode())])
                places = (Place(chunk, bucket, int(row)) for row in draws.permutation(rows))
                times.setdefault(bucket, []).extend(((at + 0.5) / rows, place) for at, place in enumerate(places))
        return {bucket: [place for _, place in sorted(timed)] for bucket, timed in times.items()}


@lru_cache(maxsize=2)
def _shuffled(shards: int, seed: int, epoch: int) -> list[int]:
    return np.random.default_rng([seed, epoch]).permutation(shards).tolist()


@dataclass(frozen=True)
class Planned:
    """A batch of all workers: where its clips are, chunk by chunk, and the position behind it."""

    bucket: str
    places: tuple[Place, ...]
    after: Position
    window: frozenset[tuple[Chunk, str]]
    """What later batches may still need of the chunks that are known now."""

    def slice(self, rank: int, ranks: int) -> tuple[Place, ...]:
        """A worker's clips; the same few chunks are its own for a whole window."""
        rows = len(self.places) // ranks
        return self.places[rank * rows : (rank + 1) * rows]


def plan(order: Order, counts: Counts, batch: int, position: Position) -> Iterator[Planned]:
    """Batches of ``batch`` clips from ``position`` on, without end.

    The size of a batch decides where the lines are cut, not how they go: another one may go on from any position.

    Raises:
        DataError: a whole epoch has no clip.
    """
    left, taken, number = position.left, position.taken, position.window
    empty_since: int | None = None
    for epoch, group in order.groups_from(position.epoch, position.group):
        while True:
            every = {chunk: counts(chunk) for chunk in (Chunk(epoch, s, number) for s in order.group(epoch, group))}
            known = {chunk: found for chunk, found in every.items() if found is not None}
            if not known:
                break
            lines = _lines(left, order.line_up(known))
            if any(known.values()):
                empty_since = None
            at = Position(epoch, group, number, taken, left)
            yield from _cut(order, lines, batch, at)
            left = _left_over(lines, batch, taken)
            taken, number = {}, number + 1
        empty_since = epoch if empty_since is None else empty_since
        if epoch > empty_since + 1:
            raise DataError("no clip is usable for training: see the reasons in the quarantine file", in_call=True)
        number = 0


def _lines(left: tuple[Place, ...], window: dict[str, list[Place]]) -> dict[str, list[Place]]:
    lines: dict[str, list[Place]] = {}
    for place in left:
        lines.setdefault(place.bucket, []).append(place)
    for bucket in sorted(window):
        lines.setdefault(bucket, []).extend(window[bucket])
    return lines


def _cut(order: Order, lines: dict[str, list[Place]], batch: int, at: Position) -> Iterator[Planned]:
    taken = dict(at.taken)
    window = frozenset((place.chunk, place.bucket) for line in lines.values() for place in line)
    while True:
        whole = {bucket: (len(line) - taken.get(bucket, 0)) // batch for bucket, line in sorted(lines.items())}
        whole = {bucket: batches for bucket, batches in whole.items() if batches > 0}
        if not whole:
            return
        bucket = _choose(whole, [order.seed, at.epoch, at.group, at.window, sum(taken.values())])
        start = taken.get(bucket, 0)
        taken = taken | {bucket: start + batch}
        places = tuple(sorted(lines[bucket][start : start + batch]))
        yield Planned(bucket, places, Position(at.epoch, at.group, at.window, taken, at.left), window)


def _choose(batches: dict[str, int], seed: list[int]) -> str:
    """A bucket, by the batches it has: as if the window's batches had been shuffled."""
    draw = int(np.random.default_rng(seed).integers(sum(batches.values()))) if len(batches) > 1 else 0
    for bucket, count in batches.items():
        draw -= count
        if draw < 0:
            return bucket
    raise AssertionError("unreachable")


def _left_over(lines: dict[str, list[Place]], batch: int, taken: dict[str, int]) -> tuple[Place, ...]:
    """What is left of a window when no bucket has a whole batch any more."""
    left: list[Place] = []
    for bucket, line in lines.items():
        start = taken.get(bucket, 0)
        left += line[start + (len(line) - start) // batch * batch :]
    return tuple(left)
