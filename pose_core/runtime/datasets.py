"""Ray Data plans over the plain functions of ``data/`` and ``models/``: raw shards in, training shards out and read.

Rows stream from the store through the cluster and back; no stage holds more than its blocks in flight.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from pose_core.data.clips import ClipRules, clips_of
from pose_core.data.shards import from_table, parquet_bytes, quarantine_line, read_parquet_bytes, to_table
from pose_core.errors import DataError
from pose_core.runtime.storage import Store
from pose_core.settings import DataSettings, ModelSettings

TRAINED_ON = ("latents", "text", "image", "first_frame")
NULL_TEXT = "null_text.parquet"
HELDOUT = ("validation", "test")
"""Splits that are kept from training: what is watched while training, and what is reported."""
SPLITS = ("train", *HELDOUT)


def clip_rules(data: DataSettings) -> ClipRules:
    """The curation rules that the settings ask for."""
    return ClipRules(
        frames=data.frames,
        height=data.height,
        width=data.width,
        frames_per_second=data.frames_per_second,
        min_side_pixels=data.min_side_pixels,
        min_brightness_range=data.min_brightness_range,
        min_motion=data.min_motion,
    )


def prepare(
    raw: Store, tars: list[str], out: Store, data: DataSettings, model: ModelSettings
) -> Iterator[dict[str, Any]]:
    """Stream raw tars into training shards below ``out``; yields what each writer wrote and refused.

    A report holds ``shard`` and ``rows`` of the files of each split and the ``quarantine`` lines.
    """
    _in_order_and_quiet()
    filesystem, base = raw.arrow()
    rules = clip_rules(data)
    rows = ray.data.read_webdataset(
        [f"{base}/{tar}" for tar in tars],
        filesystem=filesystem,
        decoder=None,
        include_paths=True,
        override_num_blocks=len(tars),
    ).flat_map(lambda sample: clips_of(_with_shard(sample), rules), num_cpus=0.5)
    encoded = rows.map_batches(
        Encoder,
        fn_constructor_args=(model, data.text_tokens, out),
        batch_size=data.encoder_batch_clips,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=data.encoder_actors),
        num_cpus=data.encoder_cpus,
        num_gpus=data.encoder_gpus,
    )
    reports = encoded.map_batches(
        write_shard,
        fn_args=(out, data.heldout_fraction),
        batch_size=data.clips_per_shard,
        num_cpus=0.25,
    )
    for report in reports.iter_rows():
        yield json.loads(report["report"])


def _in_order_and_quiet() -> None:
    """Set up the plans that this process makes from here on."""
    context = ray.data.DataContext.get_current()
    # What a resumed phase skips must be what the first attempt saw.
    context.execution_options.preserve_order = True
    # Ray Data's own bars move the cursor in the job's log, and lines of ours that follow would not be found.
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def _with_shard(sample: dict[str, Any]) -> dict[str, Any]:
    """A WebDataset row with its shard's address where ``clips_of`` expects it."""
    return sample | {"__url__": sample.get("path", sample.get("__url__", ""))}


class Encoder:
    """An actor of the encoding pool: holds the frozen encoders, turns clips into what training reads."""

    def __init__(self, model: ModelSettings, text_tokens: int, out: Store):
        # Here and not above: tasks that only decode, write or read shards start seconds sooner, 400 MB smaller.
        import torch

        from pose_core.models import families
        from pose_core.runtime.teachers import teacher_folder

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.task = model.task
        self.codec = families.get(model.family).load_codec(teacher_folder(model), text_tokens, device)
        out.write_bytes(
            NULL_TEXT, parquet_bytes(to_table({"text": self.codec.encode_text([""]).float().cpu().numpy()}))
        )

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        video = np.stack(list(rows["video"]))
        first_frames = video[:, 0] if self.task == "i2v" else None
        condition = self.codec.encode_condition(list(rows["prompt"]), first_frames, video.shape[1])
        encoded = {"latents": self.codec.encode_video(video), "text": condition.text}
        given = {"image": condition.image, "first_frame": condition.first_frame}
        encoded |= {name: value for name, value in given.items() if value is not None}
        return rows | {"video": video} | {name: value.float().cpu().numpy() for name, value in encoded.items()}


def write_shard(rows: dict[str, np.ndarray], out: Store, heldout_fraction: float) -> dict[str, np.ndarray]:
    """Write the good rows of a batch as at most one training shard a split; one row that reports on all of them."""
    good = rows["reason"] == ""
    splits = np.array([split_of(s, k, heldout_fraction) for s, k in zip(rows["split"], rows["key"], strict=True)])
    report: dict[str, Any] = {"shards": {}, "quarantine": []}
    for split in SPLITS:
        chosen = good & (splits == split)
        if chosen.any():
            names = ["key", "prompt", *(name for name in TRAINED_ON if name in rows)]
            columns = {name: rows[name][chosen] for name in names + ["video"] * (split != "train")}
            digest = hashlib.sha256("\n".join(columns["key"]).encode()).hexdigest()[:16]
            out.write_bytes(f"{split}/{digest}.parquet", parquet_bytes(to_table(columns)))
            report["shards"][f"{split}/{digest}.parquet"] = int(chosen.sum())
    for index in np.flatnonzero(~good):
        report["quarantine"].append(quarantine_line({name: rows[name][index] for name in ("key", "shard", "reason")}))
    return {"report": np.array([json.dumps(report)])}


def split_of(split: str, key: str, heldout_fraction: float) -> str:
    """A clip's own split; or else, by the hash of its key, ``validation`` and ``test`` for half of the share each."""
    if split:
        return split
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32
    return "validation" if place < heldout_fraction / 2 else "test" if place < heldout_fraction else "train"


@dataclass(frozen=True)
class Prepared:
    """The training shards of a run: where they are and how many rows each holds."""

    store: Store
    shards: dict[str, int]

    def rows(self, split: str) -> int:
        """Clips in a split."""
        return sum(rows for name, rows in self.shards.items() if name.startswith(f"{split}/"))

    def stream(self, rows: int, seed: int) -> ray.data.Dataset:
        """At least ``rows`` training rows: epoch after epoch, shards and the rows in them in a new order each."""
        names = sorted(name for name in self.shards if name.startswith("train/"))
        if not names:
            raise DataError("no clip was prepared for training: see the quarantine file", in_call=True)
        parts: list[dict[str, Any]] = []
        epoch = planned = 0
        while planned < rows:
            for index in np.random.default_rng([seed, epoch]).permutation(len(names)):
                parts.append({"shard": names[index], "seed": [seed, epoch, int(index)]})
                planned += self.shards[names[index]]
            epoch += 1
        _in_order_and_quiet()
        source = ray.data.from_items(parts, override_num_blocks=len(parts))
        return source.map_batches(read_shard, fn_args=(self.store,), batch_size=1, num_cpus=0.25)

    def heldout(self, split: str, rows: int) -> dict[str, Any]:
        """The first ``rows`` rows of ``validation`` or ``test``, every column; fewer where there are fewer.

        Where a split is empty, which happens to small datasets, the other one stands in for it.

        Raises:
            DataError: both are empty (correctable in the call).
        """
        tables: list[dict[str, Any]] = []
        names = [sorted(name for name in self.shards if name.startswith(f"{each}/")) for each in (split, *HELDOUT)]
        for name in next(filter(None, names), []):
            if sum(len(table["key"]) for table in tables) >= rows:
                break
            tables.append(from_table(read_parquet_bytes(self.store.read_bytes(name))))
        if not tables:
            raise DataError("no clip was held out: raise data.heldout_fraction or add clips", in_call=True)
        joined: dict[str, Any] = {}
        for name in tables[0]:
            cells = [cell for table in tables for cell in table[name]][:rows]
            joined[name] = cells if isinstance(cells[0], str) else np.stack(cells)
        return joined

    def null_text(self) -> np.ndarray:
        """Embeddings of the empty prompt, ``[1, L, D]``."""
        return np.asarray(from_table(read_parquet_bytes(self.store.read_bytes(NULL_TEXT)))["text"])


def read_shard(part: dict[str, np.ndarray], store: Store) -> dict[str, np.ndarray]:
    """The tensor columns of one shard, its rows shuffled by the part's seed."""
    columns = from_table(read_parquet_bytes(store.read_bytes(str(part["shard"][0]))))
    order = np.random.default_rng(np.asarray(part["seed"][0]).tolist()).permutation(len(columns["key"]))
    return {name: np.asarray(columns[name])[order] for name in TRAINED_ON if name in columns}
