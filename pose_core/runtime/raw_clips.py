"""Raw clips as training reads them: the list that ``prepare_data`` left, in shards, and the pixels of some of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from pose_core.data.buckets import Bucket
from pose_core.data.captions import TRAIN
from pose_core.data.clip_list import Clip, ShardPlan, plan_shards, read_table, split_of
from pose_core.data.clips import read_clip
from pose_core.data.sources import SOURCES
from pose_core.data.sources.source import Address
from pose_core.errors import DataError
from pose_core.runtime.raw_files import RawFiles
from pose_core.runtime.storage import Store

CLIP_LIST = "curation/clips.parquet"
"""The list's place in the artifact of ``prepare_data``."""
_READERS = 4
"""Videos of a chunk that are fetched at once; it hides the store's latency."""


@dataclass
class Decoded:
    """Clips of a chunk: columns by bucket, one line of JSON a clip that cannot be used."""

    blocks: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    quarantine: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Clips by bucket."""
        return {bucket: len(columns["key"]) for bucket, columns in self.blocks.items()}


@dataclass(frozen=True)
class RawClips:
    """Where the raw videos and the list of their clips are; light, for it travels into every task that decodes."""

    files: RawFiles
    listed: Store
    """The artifact of ``prepare_data``."""
    clips_per_shard: int
    heldout_fraction: float
    frames_per_second: float

    def shards(self) -> Sequence[ShardPlan]:
        """The training clips that curation kept, grouped as prepared shards would be; read once a process."""
        return _shards(self)

    def decode(self, clips: Sequence[Clip]) -> Decoded:
        """Read, cut and bring to size these clips."""
        decoded = Decoded()
        with ThreadPoolExecutor(_READERS) as pool:
            videos = [(address, list(group)) for address, group in itertools.groupby(clips, lambda c: c.address)]
            fetched = _few_ahead(pool, self._fetch, [address for address, _ in videos])
            for (_, group), content in zip(videos, fetched, strict=True):
                for clip in group:
                    self._add(decoded, clip, content)
        return decoded

    def _fetch(self, address: Address) -> bytes | DataError:
        try:
            return SOURCES[address.source].fetch(address, self.files)
        except DataError as error:
            return error

    def _add(self, decoded: Decoded, clip: Clip, content: bytes | DataError) -> None:
        bucket = Bucket.named(clip.measures.bucket, self.frames_per_second)
        try:
            if isinstance(content, DataError):
                raise content
            video = read_clip(content, bucket, clip.measures.start)
        except DataError as error:
            shard = self.files.store.url(clip.address.stored.key)
            decoded.quarantine.append(json.dumps({"key": clip.key, "shard": shard, "reason": str(error)}))
            return
        columns = decoded.blocks.setdefault(bucket.name, {"key": [], "prompt": [], "video": []})
        for name, cell in (("key", clip.key), ("prompt", clip.prompt), ("video", video)):
            columns[name].append(cell)


@lru_cache(maxsize=1)
def _shards(raw: RawClips) -> Sequence[ShardPlan]:
    clips = [clip for clip in read_table(raw.listed.read_bytes(CLIP_LIST)) if not clip.problem]
    trained = [clip for clip in clips if split_of(clip, raw.heldout_fraction) == TRAIN]
    buckets = len({clip.measures.bucket for clip in trained})
    return plan_shards(trained, raw.clips_per_shard, raw.heldout_fraction, buckets, recipe="raw")


def _few_ahead(pool: ThreadPoolExecutor, function: Any, items: Sequence[Any]) -> Iterator[Any]:
    """``map`` in order that begins no more than ``_READERS`` items before they are taken, to hold few at a time."""
    started = [pool.submit(function, item) for item in items[:_READERS]]
    for index in range(len(items)):
        result = started.pop(0).result()
        if index + _READERS < len(items):
            started.append(pool.submit(function, items[index + _READERS]))
        yield result
