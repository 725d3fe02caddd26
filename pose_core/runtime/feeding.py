"""What a train worker trains on: prepared shards, or raw ones that other processes decode and encode meanwhile.

Light to import: Ray Train's own processes carry it too, and need neither torch nor the models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pose_core.data.order import Order, Place, Position
from pose_core.errors import DataError
from pose_core.runtime.batches import Batches, Chunks
from pose_core.runtime.clip_encoder import clip_encoder
from pose_core.runtime.datasets import TRAINED_ON, Prepared
from pose_core.runtime.prepared_chunks import PreparedChunks
from pose_core.runtime.raw_chunks import RawChunks, RawPlan, start_feed
from pose_core.runtime.raw_clips import RawClips
from pose_core.runtime.steady_files import SteadyFiles
from pose_core.settings import Settings


@dataclass(frozen=True)
class Workers:
    """Who trains, as one of them sees it."""

    rank: int
    count: int
    from_first: Callable[[Any], Any]
    """Every worker calls it, and gets what the first one gave."""


@dataclass(frozen=True)
class TrainingData:
    """Where training clips come from: the prepared shards or, if ``raw`` is there, its clips. Travels to workers."""

    settings: Settings
    prepared: Prepared
    raw: RawClips | None = None
    raw_shards: int = 0
    """Shards that the raw clips are grouped in."""
    encoders: int = 1
    """Actors that encode raw clips."""

    def batches(self, position: Position, reader: int, readers: int, workers: Workers) -> Batches:
        """A reader's part of every batch from ``position`` on. Every worker must call it, as one of ``workers``.

        Raises:
            DataError: (correctable in the call) there is nothing to train on.
        """
        training = self.settings.training
        batch, side_by_side = readers * training.batch_per_worker, training.shuffle_shards
        shards = self._train_shards()
        order = Order(self.raw_shards if self.raw else len(shards), side_by_side, self.settings.run.seed)
        if not order.shards:
            raise DataError("no clip was prepared for training: see the quarantine file", in_call=True)
        chunks: Chunks
        if self.raw is None:
            files = SteadyFiles(self.prepared.store, self.settings.storage.retry_seconds)
            chunks = PreparedChunks(files, shards, ("key", *TRAINED_ON), training.shuffle_clips)
        else:
            chunks = RawChunks(self._feed(order, position, workers), position)
        window = side_by_side * training.shuffle_clips
        return Batches(chunks, order, position, batch=batch, rank=reader, ranks=readers, ahead=max(1, window // batch))

    def names(self, places: Sequence[Place]) -> list[str]:
        """What a person calls these clips: ``epoch:shard#number``, the number as the shard's clips are counted."""
        paths = [shard.path for shard in self.raw.shards()] if self.raw else sorted(self._train_shards())
        size = self.settings.training.shuffle_clips
        return [f"{p.chunk.epoch}:{paths[p.chunk.shard]}#{p.chunk.number * size + p.row}" for p in places]

    def _train_shards(self) -> dict[str, int]:
        return {name: rows for name, rows in self.prepared.shards.items() if name.startswith("train/")}

    def _feed(self, order: Order, position: Position, workers: Workers) -> Any:
        """The feed that all workers ask, which the first one starts."""
        assert self.raw is not None
        data, training = self.settings.data, self.settings.training
        plan = RawPlan(
            self.raw,
            order,
            training.shuffle_clips,
            ahead=training.raw_chunks_ahead,
            decode_cpus=training.raw_decode_cpus,
            encoder=partial(clip_encoder, self.settings),
            encoders=self.encoders,
            encoder_cpus=data.encoder_cpus,
            encoder_gpus=data.encoder_gpus,
        )
        return workers.from_first(start_feed(plan, position, workers.count) if workers.rank == 0 else None)
