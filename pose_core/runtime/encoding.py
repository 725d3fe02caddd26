"""The second pass of ``prepare_data``: an autoscaling pool of actors that each make whole training shards.

An actor reads its shard's clips, a batch ahead of the encoders, and writes one file; pixels never leave it. A record
beside each shard says what is in it, so that the next time only missing shards are made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from pose_core.data.buckets import Bucket
from pose_core.data.captions import TRAIN
from pose_core.data.clip_list import Clip, ShardPlan, digest, plan_shards
from pose_core.data.clips import read_clip
from pose_core.data.shards import SHARD_VERSION, parquet_bytes, to_table
from pose_core.data.sources import SOURCES
from pose_core.data_settings import DataSettings
from pose_core.errors import DataError
from pose_core.runtime.clip_encoder import ClipEncoder
from pose_core.runtime.curating import read_records
from pose_core.runtime.data_plans import work_through
from pose_core.runtime.datasets import NULL_TEXT
from pose_core.runtime.raw_files import RawFiles
from pose_core.runtime.storage import Store
from pose_core.settings import ModelSettings

RECORDS = "records"


@dataclass(frozen=True)
class Recipe:
    """How shards are made, besides which clips are in them; travels to the actors."""

    files: RawFiles
    out: Store
    model: ModelSettings
    buckets: tuple[Bucket, ...]
    text_tokens: int
    batch_clips: int
    decoders: int
    """Clips that an actor decodes at once."""
    encoders: Mapping[str, str]
    """Fingerprints of the encoders, by the part's name."""
    heldout_fraction: float

    @property
    def id(self) -> str:
        """Changes with anything that a shard's content depends on besides its clips."""
        rates = sorted({bucket.frames_per_second for bucket in self.buckets})
        placed = [self.heldout_fraction, len(self.buckets) > 1]
        return digest([SHARD_VERSION, dict(self.encoders), self.text_tokens, rates, placed])


class ShardMaker:
    """An actor of the encoding pool: holds the frozen encoders, makes one shard a call."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.encoder = recipe, ClipEncoder(recipe.model, recipe.text_tokens)
        self.buckets = {bucket.name: bucket for bucket in recipe.buckets}
        self.pool = ThreadPoolExecutor(recipe.decoders)
        recipe.out.write_bytes(NULL_TEXT, parquet_bytes(to_table({"text": self.encoder.null_text()})))

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One plan to its shard, which is written, and its record, which is written and returned."""
        plan = _plan(json.loads(rows["item"][0]))
        failed: list[dict[str, str]] = []
        parts = [self._encode(clips, video, plan.split) for clips, video in self._batches(plan, failed)]
        record: dict[str, Any] = {
            "path": plan.path,
            "rows": sum(len(part["key"]) for part in parts),
            "clips": [clip.identity for clip in plan.clips],
            "failed": failed,
            "recipe": self.recipe.id,
        }
        if parts:
            columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            content = parquet_bytes(to_table(columns, {"encoders": dict(self.recipe.encoders), "bucket": plan.bucket}))
            record["sha256"] = hashlib.sha256(content).hexdigest()
            self.recipe.out.write_bytes(plan.path, content)
        self.recipe.out.write_json(f"{RECORDS}/{plan.id}.json", record)
        return {"result": np.array([json.dumps(record)], dtype=object)}

    def _batches(self, plan: ShardPlan, failed: list[dict[str, str]]) -> Iterator[tuple[list[Clip], np.ndarray]]:
        """Clips and their pixels for the encoders, the next batch being decoded meanwhile."""
        size, bucket = self.recipe.batch_clips, self.buckets[plan.bucket]
        chunks = [plan.clips[start : start + size] for start in range(0, len(plan.clips), size)]
        ahead = [self.pool.submit(self._read, clip, bucket) for clip in chunks[0]]
        for index, chunk in enumerate(chunks):
            current: list[Future[np.ndarray]] = ahead
            following = chunks[index + 1] if index + 1 < len(chunks) else ()
            ahead = [self.pool.submit(self._read, clip, bucket) for clip in following]
            good, pixels = [], []
            for clip, future in zip(chunk, current, strict=True):
                try:
                    pixels.append(future.result())
                    good.append(clip)
                except DataError as error:
                    failed.append({"key": clip.key, "shard": clip.address.stored.key, "reason": str(error)})
            if good:
                yield good, np.stack(pixels)

    def _read(self, clip: Clip, bucket: Bucket) -> np.ndarray:
        content = SOURCES[clip.address.source].fetch(clip.address, self.recipe.files)
        return read_clip(content, bucket, clip.measures.start)

    def _encode(self, clips: list[Clip], video: np.ndarray, split: str) -> dict[str, np.ndarray]:
        prompts = [clip.prompt for clip in clips]
        texts = {"key": [clip.key for clip in clips], "source": [clip.source for clip in clips], "prompt": prompts}
        columns = {name: np.array(values, dtype=object) for name, values in texts.items()}
        columns |= self.encoder(prompts, video)
        return columns if split == TRAIN else columns | {"video": video}


def _plan(value: dict[str, Any]) -> ShardPlan:
    return ShardPlan(value["path"], value["bucket"], value["split"], tuple(map(Clip.from_json, value["clips"])))


def encode(
    clips: Sequence[Clip], recipe: Recipe, data: DataSettings, advance: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """Records of the shards that hold ``clips``, those that are there already kept and the missing ones made.

    Shards with a clip that is not among ``clips`` any more, or made by another recipe, are deleted. ``advance`` is told
    of clips done, of all.
    """
    wanted = {clip.identity: clip for clip in clips}
    there = set(recipe.out.list())
    records = []
    for name, record in read_records(recipe.out, RECORDS):
        whole = not record["rows"] or record["path"] in there
        if record["recipe"] == recipe.id and whole and set(record["clips"]) <= wanted.keys():
            records.append(record)
            for done in record["clips"]:
                del wanted[done]
        else:
            recipe.out.delete_prefix(name)
            recipe.out.delete_prefix(record["path"])
    missing = [clip for clip in clips if clip.identity in wanted]
    plans = plan_shards(missing, data.clips_per_shard, recipe.heldout_fraction, len(recipe.buckets), recipe.id)
    done = len(clips) - len(missing)
    made = work_through(
        [_as_item(plan) for plan in plans],
        ShardMaker,
        fn_constructor_args=(recipe,),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=data.encoder_actors),
        num_cpus=data.encoder_cpus,
        num_gpus=data.encoder_gpus,
    )
    for record in made:
        records.append(record)
        done += len(record["clips"])
        advance(done, len(clips))
    return records


def _as_item(plan: ShardPlan) -> dict[str, Any]:
    clips = [clip.to_json() for clip in plan.clips]
    return {"path": plan.path, "bucket": plan.bucket, "split": plan.split, "clips": clips}
