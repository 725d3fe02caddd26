"""The parts of a diffusers folder: whether all are there, how large they are and which shapes go through them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from pose_core.errors import CheckpointError
from pose_core.models import families
from pose_core.models.folders import missing, read_config, read_index, read_json
from pose_core.models.video_model import ClipShapes

ENCODERS = ("vae", "text_encoder", "text_encoder_2", "image_encoder")
"""The networks of a folder that stay frozen and run before training."""
_NETWORKS = ("transformer", "transformer_2", *ENCODERS)
_DESCRIBED_BY = {
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
    "image_processor": "preprocessor_config.json",
    "feature_extractor": "preprocessor_config.json",
    "guider": "guider_config.json",
}
_SHARD_INDEX = "*.safetensors.index.json"
_WEIGHTS = "*.safetensors"


def stock_class(name: str) -> Any:
    """A class of diffusers: a pipeline, a scheduler, a network."""
    return getattr(diffusers, name)


def clip_shapes(
    folder: Path, *, frames: int, height: int, width: int, text_tokens: int, task: str | None = None
) -> ClipShapes:
    """Shapes of a clip of ``frames`` frames of ``height`` x ``width`` pixels, from the folder's configs alone.

    Without a ``task`` it is the first that the model can do.

    Raises:
        CheckpointError: a config is missing, or the clip's size is not a multiple of what the model compresses by.
    """
    family = families.of(folder)
    size = {"frames": frames, "height": height, "width": width, "text_tokens": text_tokens}
    return family.clip_shapes(folder, task=task or family.tasks(folder)[0], **size)


def check_parts(folder: Path, *, weights: bool, files: Collection[str] | None = None, name: str = "") -> None:
    """Check that every part ``model_index.json`` names is there; ``weights=False`` asks for the networks' configs only.

    Where ``folder`` holds the configs of a folder elsewhere, ``files`` are the paths of what that one holds, and
    ``name`` is what it is called.

    Raises:
        CheckpointError: names the first file that is missing or not JSON (correctable in the call).
    """
    if files is None:
        files = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    place = name or str(folder)
    for part in _index(folder):
        if part in _NETWORKS:
            read_config(folder, part)
            if weights:
                _check_weights(folder, part, files, place)
        elif weights and part in _DESCRIBED_BY and f"{part}/{_DESCRIBED_BY[part]}" not in files:
            raise missing(place, f"{part}/{_DESCRIBED_BY[part]}")


def build_encoders(folder: Path) -> dict[str, nn.Module]:
    """The frozen networks around the transformer, by part, on the meta device: stock classes, no weights, no memory.

    Raises:
        CheckpointError: a config is missing, or its class is one that the installed libraries do not have.
    """
    index = _index(folder)
    return {part: _build(folder, part, *index[part]) for part in ENCODERS if part in index}


def _index(folder: Path) -> dict[str, tuple[str, str]]:
    """Library and class of every part that a folder has."""
    entries = read_index(folder).items()
    return {part: (entry[0], entry[1]) for part, entry in entries if isinstance(entry, list) and entry[0] is not None}


def _check_weights(folder: Path, part: str, files: Collection[str], place: str) -> None:
    for index in (folder / part).glob(_SHARD_INDEX):
        for shard in sorted(set(read_json(index)["weight_map"].values())):
            if f"{part}/{shard}" not in files:
                raise missing(place, f"{part}/{shard}")
    if not any(PurePosixPath(file).match(f"{part}/{_WEIGHTS}") for file in files):
        raise missing(place, f"{part}/{_WEIGHTS}")


def _build(folder: Path, part: str, library: str, name: str) -> nn.Module:
    kind: Any = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), name, None)
    if kind is None:
        raise CheckpointError(
            f"{folder}/model_index.json asks for {library}.{name} as {part}, which is not installed: "
            "name another model.teacher, or upgrade that library",
            in_call=True,
        )
    config = read_config(folder, part)
    with torch.device("meta"):
        return kind.from_config(config) if library == "diffusers" else kind(kind.config_class.from_dict(config))
