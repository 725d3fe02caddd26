"""The clips of a comparison in local files, so that its row processes need neither the object store nor Ray."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save as save_tensors
from torch import Tensor

from pose_core.data.captions import HELDOUT, TRAIN
from pose_core.data.shards import from_table, read_parquet_bytes
from pose_core.errors import DataError
from pose_core.evaluation.scoring import with_reference
from pose_core.models.video_model import Condition
from pose_core.runtime.datasets import TRAINED_ON, Prepared
from pose_core.runtime.local_files import write_whole
from pose_core.training.state import Batch

NULL_TEXT = "null_text"


@dataclass(frozen=True)
class Heldout:
    """The held-out clips that are generated, and the real ones that figures are measured against."""

    batch: Batch
    """Latents (for their shape alone) and conditions of the ``N`` clips to generate."""
    videos: np.ndarray
    """Their real videos ``[N, T, H, W, 3]`` uint8."""
    prompts: list[str]
    reference: np.ndarray
    """Other real videos ``[M, T, H, W, 3]`` uint8; the same ones where there are too few others."""


def write_clips(folder: Path, prepared: Prepared, key: str) -> None:
    """Copy what training and evaluation read to ``folder``, marked with ``key``."""
    shards = sorted(name for name in prepared.shards if name.startswith("train/"))
    tables = [from_table(read_parquet_bytes(prepared.store.read_bytes(name))) for name in shards]
    columns = {name: np.concatenate([table[name] for table in tables]) for name in TRAINED_ON if name in tables[0]}
    _write(folder, TRAIN, columns | {NULL_TEXT: prepared.null_text()}, {"key": key})
    for split in HELDOUT:
        rows = prepared.heldout(split, sum(prepared.shards.values()))
        columns = {name: np.asarray(rows[name]) for name in (*TRAINED_ON, "video") if name in rows}
        _write(folder, split, columns, {"key": key, "prompts": json.dumps(rows["prompt"])})


def has_clips(folder: Path, key: str) -> bool:
    """Whether ``folder`` holds every split, written with ``key``."""
    files = [_file(folder, split) for split in (TRAIN, *HELDOUT)]
    return all(file.is_file() for file in files) and all(_metadata(file)["key"] == key for file in files)


def read_training(folder: Path) -> tuple[Batch, Tensor]:
    """All training clips as one batch, and the embeddings of the empty prompt ``[1, L, D]``."""
    columns = _read(folder, TRAIN)
    return _batch(columns), columns[NULL_TEXT]


def read_heldout(folder: Path, split: str, clips: int) -> Heldout:
    """The first ``clips`` clips of a split, and as many others as reference.

    Raises:
        DataError: there are fewer than two clips.
    """
    columns, prompts = _read(folder, split), json.loads(_metadata(_file(folder, split))["prompts"])
    count, videos = min(clips, len(prompts)), columns["video"].numpy()
    if count < 2:
        raise DataError(
            f"{split} has {count} clip to compare on and figures need two: raise evaluation.clips and data.…"
        )
    generated, reference = with_reference(videos, clips)
    batch = _batch({name: value[:count] for name, value in columns.items()})
    return Heldout(batch, generated, prompts[:count], reference)


def _batch(columns: dict[str, Tensor]) -> Batch:
    return Batch(columns["latents"], Condition.of(columns))


def _file(folder: Path, split: str) -> Path:
    return folder / f"clips-{split}.safetensors"


def _write(folder: Path, split: str, columns: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    whole = {name: np.ascontiguousarray(value) for name, value in columns.items()}
    write_whole(_file(folder, split), save_tensors(whole, metadata))


def _read(folder: Path, split: str) -> dict[str, Tensor]:
    with safe_open(_file(folder, split), framework="pt") as file:
        return {name: torch.as_tensor(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="np") as opened:
        return opened.metadata() or {"key": ""}
