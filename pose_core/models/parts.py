"""The parts of a diffusers folder: whether all are there, how large they are and which shapes go through them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from pose_core.errors import CheckpointError
from pose_core.models.codec import latent_shape
from pose_core.models.wan import count_image_tokens, read_config

ENCODERS = ("vae", "text_encoder", "image_encoder")
"""The networks of a folder that stay frozen and run before training."""
_NETWORKS = ("transformer", *ENCODERS)
_DESCRIBED_BY = {
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
    "image_processor": "preprocessor_config.json",
}
_SHARD_INDEX = "*.safetensors.index.json"
_WEIGHTS = ("*.safetensors", "*.bin")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ClipShapes:
    """What one clip becomes on its way through the model, without the batch axis."""

    pixels: Shape
    """``(3, F, H, W)``"""
    latents: Shape
    """``(C, T, h, w)``"""
    text: Shape
    """``(L, D_text)``"""
    image: Shape | None
    """``(N, D_image)``, None for text to video"""
    first_frame: Shape | None
    """``(C_cond, T, h, w)``, None for text to video"""
    tokens: int
    """Length of the sequence the transformer attends over."""

    @property
    def trained_on(self) -> list[Shape]:
        """The tensors of a training row."""
        return [shape for shape in (self.latents, self.text, self.image, self.first_frame) if shape is not None]


def clip_shapes(folder: Path, *, frames: int, height: int, width: int, text_tokens: int) -> ClipShapes:
    """Shapes of a clip of ``frames`` frames of ``height`` x ``width`` pixels, from the folder's configs alone.

    Raises:
        CheckpointError: a config is missing, or the clip's size is not a multiple of what the model compresses by.
    """
    transformer = read_config(folder, "transformer")
    latents = latent_shape(folder, frames, height, width)
    channels, time, rows, columns = latents
    patch_time, patch_rows, patch_columns = transformer.get("patch_size", (1, 2, 2))
    image_tokens = count_image_tokens(folder)
    return ClipShapes(
        pixels=(3, frames, height, width),
        latents=latents,
        text=(text_tokens, transformer["text_dim"]),
        image=(image_tokens, transformer["image_dim"]) if image_tokens else None,
        first_frame=(transformer["in_channels"] - channels, time, rows, columns) if image_tokens else None,
        tokens=(time // patch_time) * (rows // patch_rows) * (columns // patch_columns),
    )


def check_parts(folder: Path, *, weights: bool) -> None:
    """Check that every part ``model_index.json`` names is there; ``weights=False`` asks for the networks' configs only.

    Raises:
        CheckpointError: names the first file that is missing or not JSON (correctable in the call).
    """
    for part in _index(folder):
        if part in _NETWORKS:
            read_config(folder, part)
            if weights:
                _check_weights(folder, part)
        elif weights and part in _DESCRIBED_BY and not (folder / part / _DESCRIBED_BY[part]).is_file():
            raise _missing(folder, f"{part}/{_DESCRIBED_BY[part]}")


def build_encoders(folder: Path) -> dict[str, nn.Module]:
    """The frozen networks around the transformer, by part, on the meta device: stock classes, no weights, no memory.

    Raises:
        CheckpointError: a config is missing, or its class is one that the installed libraries do not have.
    """
    index = _index(folder)
    return {part: _build(folder, part, *index[part]) for part in ENCODERS if part in index}


def _index(folder: Path) -> dict[str, tuple[str, str]]:
    """Library and class of every part that a folder has."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise _missing(folder, path.name)
    entries = _read_json(path).items()
    return {part: (entry[0], entry[1]) for part, entry in entries if isinstance(entry, list) and entry[0] is not None}


def _check_weights(folder: Path, part: str) -> None:
    for index in (folder / part).glob(_SHARD_INDEX):
        for shard in sorted(set(_read_json(index)["weight_map"].values())):
            if not (folder / part / shard).is_file():
                raise _missing(folder, f"{part}/{shard}")
    if not any(file for pattern in _WEIGHTS for file in (folder / part).glob(pattern)):
        raise _missing(folder, f"{part}/{_WEIGHTS[0]}")


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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not a JSON object ({error}): fetch the folder again", in_call=True) from None


def _missing(folder: Path, file: str) -> CheckpointError:
    return CheckpointError(f"{folder} has no {file}: model.teacher must name a complete diffusers folder", in_call=True)
