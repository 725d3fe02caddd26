"""Ray Data plans over the plain functions of ``data/`` and ``models/``: raw shards in, training shards out and read.

Rows stream from the store through the cluster and back; no stage holds more than its blocks in flight.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from pose_core.data.clips import ClipRules, clips_of
from pose_core.data.moving_digits import SPLITS
from pose_core.data.shards import (
    HELDOUT,
    from_table,
    may_be_heldout,
    parquet_bytes,
    quarantine_line,
    read_parquet_bytes,
    split_of,
    to_table,
)
from pose_core.errors import DataError
from pose_core.runtime.storage import Store
from pose_core.settings import DataSettings

if TYPE_CHECKING:
    from pose_core.models.codec import WanCodec

TRAINED_ON = ("latents", "text", "image", "first_frame")
NULL_TEXT = "null_text.parquet"


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


def prepare(raw: Store, tars: list[str], out: Store, data: DataSettings, teacher: Path) -> Iterator[dict[str, Any]]:
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
    )
    if data.train_from == "raw":
        rows = rows.filter(lambda sample: may_be_heldout(sample, data.heldout_fraction))
    rows = rows.flat_map(lambda sample: clips_of(_with_shard(sample), rules), num_cpus=0.5)
    encoded = rows.map_batches(
        Encoder,
        fn_constructor_args=(teacher, data.text_tokens, out),
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

    def __init__(self, teacher: Path, text_tokens: int, out: Store):
        # Here and not above: tasks that only decode, write or read shards start seconds sooner, 400 MB smaller.
        import torch

        from pose_core.models.codec import WanCodec

        self.codec = WanCodec.load(teacher, text_tokens, "cuda" if torch.cuda.is_available() else "cpu")
        out.write_bytes(
            NULL_TEXT, parquet_bytes(to_table({"text": self.codec.encode_text([""]).float().cpu().numpy()}))
        )

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        video = np.stack(list(rows["video"]))
        return rows | {"video": video} | encode_clips(self.codec, list(rows["prompt"]), video)


def encode_clips(codec: WanCodec, prompts: list[str], video: np.ndarray) -> dict[str, np.ndarray]:
    """Clips ``[B, F, H, W, 3]`` uint8 and their prompts to the columns that training reads, float32."""
    condition = codec.encode_condition(prompts, video[:, 0], video.shape[1])
    encoded = {"latents": codec.encode_video(video), "text": condition.text}
    if condition.image is not None and condition.first_frame is not None:
        encoded |= {"image": condition.image, "first_frame": condition.first_frame}
    return {name: value.float().cpu().numpy() for name, value in encoded.items()}


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


@dataclass(frozen=True)
class Prepared:
    """The training shards of a run: where they are and how many rows each holds."""

    store: Store
    shards: dict[str, int]

    def rows(self, split: str) -> int:
        """Clips in a split."""
        return sum(rows for name, rows in self.shards.items() if name.startswith(f"{split}/"))

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
