"""Chunks of raw clips, decoded and encoded by Ray tasks and actors on whatever nodes have room; nothing is stored.

One feed, an actor, knows the order and keeps a few chunks in the making before the workers ask for them. It passes
references only; a worker fetches the chunks that hold its own rows.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from pose_core.data.clip_list import Clip
from pose_core.data.order import Chunk, Order, Position
from pose_core.errors import PoseError
from pose_core.runtime.batches import ClosedError
from pose_core.runtime.raw_clips import RawClips


@dataclass(frozen=True)
class RawPlan:
    """How raw clips become batches: what is read, in which order, by how many tasks, and who encodes it.

    ``encoder`` makes, in an actor with these resources, a function from columns of one bucket (``key``, ``prompt``, and
    ``video``, uint8 ``[F, H, W, 3]`` a cell) to the columns that training reads. Without one clips stay pixels.
    """

    clips: RawClips
    order: Order
    chunk_clips: int
    ahead: int
    """Chunks in the making that no worker has asked for yet."""
    decode_cpus: float
    encoder: Callable[[], Callable[[dict[str, Any]], dict[str, Any]]] | None = None
    encoders: int = 1
    encoder_cpus: float = 1.0
    encoder_gpus: float = 0.0


_POLL_SECONDS = 0.5
Contents = tuple[dict[str, int], list[str]]
"""Clips by bucket, and the lines of the quarantine."""
Blocks = dict[str, dict[str, Any]]
"""Columns by bucket."""


def _decode(raw: RawClips, clips: Sequence[Clip]) -> tuple[Contents, Blocks]:
    decoded = raw.decode(clips)
    return (decoded.counts, decoded.quarantine), decoded.blocks


_decode_task = ray.remote(_decode)


class _Encoder:
    """An actor that encodes chunks, one bucket's clips at a time."""

    def __init__(self, encoder: Callable[[], Callable[[dict[str, Any]], dict[str, Any]]]):
        self._encode = encoder()

    def encode(self, blocks: Blocks) -> Blocks:
        """The same chunk, encoded."""
        return {bucket: self._encode(columns) for bucket, columns in blocks.items()}


@dataclass
class _Entry:
    contents: Any = None
    """Reference to ``Contents``; none where the shard has ended."""
    blocks: Any = None
    asked: int = 0


class Feed:
    """The actor; ``ranks`` workers ask it for every chunk of the order, from ``position`` on, once each."""

    def __init__(self, plan: RawPlan, encoders: Sequence[Any], position: Position, ranks: int):
        self._plan, self._ranks = plan, ranks
        self._encoders = itertools.cycle(encoders)
        self._entries: dict[Chunk, _Entry] = {}
        self._changed = threading.Condition()
        self._error: Exception | None = None
        self._quarantine: dict[str, None] = {}
        self._shards = plan.clips.shards()
        threading.Thread(target=self._run, args=(position,), daemon=True).start()

    def chunk(self, chunk: Chunk) -> tuple[dict[str, int], list[Any]] | None:
        """Clips by bucket and a list with the reference to the chunk's blocks; None behind the shard's end."""
        with self._changed:
            self._changed.wait_for(lambda: chunk in self._entries or self._error)
            if self._error:
                raise self._error
            entry = self._entries[chunk]
        if entry.contents is not None:
            counts, quarantine = ray.get(entry.contents)
        with self._changed:
            entry.asked += 1
            if entry.asked == self._ranks:
                del self._entries[chunk]
                self._changed.notify_all()
            if entry.contents is None:
                return None
            if chunk.epoch == 0:
                self._quarantine |= dict.fromkeys(quarantine)
            return counts, [entry.blocks]

    def quarantine(self) -> list[str]:
        """A line for every clip of the first epoch that could not be used, as far as chunks were asked for."""
        return list(self._quarantine)

    def _run(self, position: Position) -> None:
        try:
            self._make_left(position)
            self._make(position)
        except Exception as error:
            with self._changed:
                self._error = ours(error)
                self._changed.notify_all()

    def _make_left(self, position: Position) -> None:
        """The chunks of earlier windows that clips were left over of."""
        for chunk in sorted({place.chunk for place in position.left}):
            self._start(chunk)

    def _make(self, position: Position) -> None:
        order, size, first = self._plan.order, self._plan.chunk_clips, position.window
        for epoch, group in order.groups_from(position.epoch, position.group):
            shards = order.group(epoch, group)
            windows = max(-(-len(self._shards[shard].clips) // size) for shard in shards)
            # One more than there are: the workers learn of the end by asking for what is behind it.
            for number in range(first, max(first, windows) + 1):
                for shard in shards:
                    self._start(Chunk(epoch, shard, number))
            first = 0

    def _start(self, chunk: Chunk) -> None:
        """Have a chunk made, as soon as there is room for one more, unless it is behind its shard's end."""
        entry, size = _Entry(), self._plan.chunk_clips
        if clips := self._shards[chunk.shard].clips[chunk.number * size : (chunk.number + 1) * size]:
            with self._changed:
                self._changed.wait_for(lambda: self._made() < self._plan.ahead)
            task = _decode_task.options(num_cpus=self._plan.decode_cpus, num_returns=2)
            entry.contents, entry.blocks = task.remote(self._plan.clips, clips)
            if encoder := next(self._encoders, None):
                entry.blocks = encoder.encode.remote(entry.blocks)
        with self._changed:
            self._entries[chunk] = entry
            self._changed.notify_all()

    def _made(self) -> int:
        return sum(entry.contents is not None for entry in self._entries.values())


class RawChunks:
    """A worker's view of the feed, as ``Batches`` asks for it."""

    def __init__(self, feed: Any, position: Position):
        self._feed = feed
        self._closed = threading.Event()
        self._blocks: dict[tuple[Chunk, str], Any] = {}
        self._fetched: dict[tuple[Chunk, str], dict[str, Any]] = {}
        for chunk in sorted({place.chunk for place in position.left}):
            self.counts(chunk)

    def counts(self, chunk: Chunk) -> dict[str, int] | None:
        """Clips by bucket; None behind the shard's end. Waits until they are decoded."""
        answer = self._get(self._feed.chunk.remote(chunk))
        if answer is None:
            return None
        counts, (blocks,) = answer
        self._blocks |= {(chunk, bucket): blocks for bucket in counts}
        return counts

    def want(self, chunk: Chunk, bucket: str) -> None:
        """Begin to bring a chunk to this node."""
        ray.wait([self._blocks[chunk, bucket]], timeout=0)

    def rows(self, chunk: Chunk, bucket: str) -> dict[str, Any]:
        """Columns of a bucket's clips in a chunk; waits until they are made."""
        if (chunk, bucket) not in self._fetched:
            self._fetched[chunk, bucket] = self._get(self._blocks[chunk, bucket])[bucket]
        return self._fetched[chunk, bucket]

    def drop(self, chunk: Chunk, bucket: str) -> None:
        """Forget a bucket's clips in a chunk, so that their memory can be used again."""
        self._blocks.pop((chunk, bucket), None)
        self._fetched.pop((chunk, bucket), None)

    def _get(self, reference: Any) -> Any:
        while not self._closed.is_set():
            try:
                return ray.get(reference, timeout=_POLL_SECONDS)
            except ray.exceptions.GetTimeoutError:
                continue
            except ray.exceptions.RayTaskError as error:
                raise ours(error) from None
        # Asking on would start a cluster of its own, once this process has left the one it was in.
        raise ClosedError

    def refused(self) -> list[str]:
        """Lines of the quarantine, see ``Feed.quarantine``."""
        return self._get(self._feed.quarantine.remote())

    def close(self) -> None:
        """Whoever waits here is told that it is over. The feed ends with the process that made it."""
        self._closed.set()


def start_feed(plan: RawPlan, position: Position, ranks: int) -> Any:
    """The feed of ``ranks`` workers; it lives as long as the process that calls this."""
    # The encoders take longest to start, so they are the first.
    encoders = _start_encoders(plan)
    # Each worker waits in one call, and the quarantine may be asked for beside them.
    options = {"num_cpus": 0, "max_concurrency": ranks + 2}
    return ray.remote(Feed).options(**options).remote(plan, encoders, position, ranks)


def _start_encoders(plan: RawPlan) -> list[Any]:
    if plan.encoder is None:
        return []
    kind = ray.remote(_Encoder).options(
        num_cpus=plan.encoder_cpus, num_gpus=plan.encoder_gpus, max_restarts=-1, max_task_retries=-1
    )
    return [kind.remote(plan.encoder) for _ in range(plan.encoders)]


def ours(error: Exception) -> Exception:
    """The error of ours that a task ended with, through however many tasks it came; else ``error``."""
    cause: Any = error
    while isinstance(cause, ray.exceptions.RayTaskError):
        cause = cause.cause
    return cause if isinstance(cause, PoseError) else error
