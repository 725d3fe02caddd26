"""Sizes of clips and latents, from configs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pose_core.errors import CheckpointError
from pose_core.models.folders import read_config


def takes_image(config: dict[str, Any]) -> bool:
    """Whether a Wan transformer of this config is given a mask and a first frame's latents beside its input."""
    return config.get("in_channels", 16) > (config.get("out_channels") or config.get("in_channels", 16))


def compression(folder: Path) -> tuple[int, int]:
    """Frames that a Wan VAE makes one latent frame of, and what a clip's sides must be multiples of, in pixels."""
    vae, transformer = read_config(folder, "vae"), read_config(folder, "transformer")
    patch = transformer.get("patch_size", [1, 2, 2])[1]
    return vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8) * patch


def latent_shape(folder: Path, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Latent shape ``(C, T, h, w)`` of a clip, from a Wan VAE's compression factors.

    Raises:
        CheckpointError: when the clip's size is not a multiple of what the model compresses by.
    """
    vae, (temporal, step) = read_config(folder, "vae"), compression(folder)
    spatial = vae.get("scale_factor_spatial", 8)
    check_size(frames, height, width, temporal, step)
    return vae.get("z_dim", 16), (frames - 1) // temporal + 1, height // spatial, width // spatial


def check_size(frames: int, height: int, width: int, temporal: int, step: int) -> None:
    """Check that a clip can be compressed: ``temporal`` k + 1 frames, sides that are multiples of ``step`` pixels.

    Raises:
        CheckpointError: naming the setting that does not fit (correctable in the call).
    """
    if (frames - 1) % temporal:
        raise CheckpointError(f"data.frames={frames} does not fit: the VAE takes {temporal}k+1 frames", in_call=True)
    for name, size in (("height", height), ("width", width)):
        if size % step:
            raise CheckpointError(f"data.{name}={size} does not fit: it must be a multiple of {step}", in_call=True)
