"""The frozen encoders around a Wan transformer: video VAE, text encoder and image encoder.

The text and image paths are the stock pipeline's own, so that what is trained on is what the exported pipeline feeds.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image
from torch import Tensor

from pose_core.errors import CheckpointError
from pose_core.models.video_model import Condition
from pose_core.models.wan import read_config

ENCODERS = ("vae", "text_encoder", "tokenizer", "image_encoder", "image_processor")
"""Parts of a diffusers folder that decide what is encoded."""


class WanCodec:
    """Encodes clips, prompts and first frames to what a Wan transformer takes, and decodes latents to frames."""

    def __init__(self, pipeline: WanPipeline | WanImageToVideoPipeline, text_tokens: int):
        self.pipeline = pipeline
        self.text_tokens = text_tokens
        self.vae = pipeline.vae
        self.mean = torch.tensor(self.vae.config.latents_mean).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(self.vae.config.latents_std).view(1, -1, 1, 1, 1)

    @classmethod
    def load(cls, folder: Path, text_tokens: int, device: str = "cpu") -> WanCodec:
        """Load every part but the transformer from a diffusers folder.

        Raises:
            CheckpointError: naming the part that is missing or does not load.
        """
        parts = ["vae", "text_encoder"]
        with_image = read_config(folder, "transformer").get("image_dim") is not None
        for part in [*parts, "image_encoder"] if with_image else parts:
            read_config(folder, part)
        kind = WanImageToVideoPipeline if with_image else WanPipeline
        try:
            pipeline = kind.from_pretrained(folder, transformer=None)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} cannot be loaded: {' '.join(str(error).split())}", in_call=True) from None
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline.to(device), text_tokens)

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device

    @property
    def has_image(self) -> bool:
        """Whether the family is image to video."""
        return getattr(self.pipeline, "image_encoder", None) is not None

    @torch.no_grad()
    def encode_video(self, video: np.ndarray) -> Tensor:
        """Clips ``[B, F, H, W, 3]`` uint8 to normalised latents ``[B, C, T, h, w]``, float32."""
        return self._encode(self._pixels(video))

    @torch.no_grad()
    def encode_condition(self, prompts: list[str], first_frames: np.ndarray | None, frames: int) -> Condition:
        """Prompts and, for image to video, first frames ``[B, H, W, 3]`` uint8 of clips with ``frames`` frames."""
        text = self.encode_text(prompts)
        if first_frames is None or not self.has_image:
            return Condition(text)
        pictures = [Image.fromarray(frame) for frame in first_frames]
        return Condition(text, self.pipeline.encode_image(pictures), self._first_frame(first_frames, frames))

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Tensor:
        """Prompts to embeddings ``[B, text_tokens, D_text]``, zeros behind the last token; longer prompts are cut."""
        return self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
        )[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Normalised latents ``[B, C, T, h, w]`` to clips ``[B, F, H, W, 3]``, float32 in [0, 1]."""
        raw = latents.to(self.device, self.vae.dtype) * self.std.to(self.device) + self.mean.to(self.device)
        video = self.vae.decode(raw, return_dict=False)[0]
        return self.pipeline.video_processor.postprocess_video(video, output_type="np")

    def decode_uint8(self, latents: Tensor) -> np.ndarray:
        """``decode`` as pixels 0..255, uint8."""
        return (self.decode(latents) * 255).round().astype(np.uint8)

    def _pixels(self, video: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(video)).to(self.device, torch.float32)
        return pixels.permute(0, 4, 1, 2, 3) / 127.5 - 1

    def _encode(self, pixels: Tensor) -> Tensor:
        latents = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode().float()
        return (latents - self.mean.to(latents)) / self.std.to(latents)

    def _first_frame(self, first_frames: np.ndarray, frames: int) -> Tensor:
        """Mask and latents of the first frame followed by grey: ``[B, temporal factor + C, T, h, w]``."""
        first = self._pixels(first_frames[:, None])
        latents = self._encode(
            torch.cat([first, first.new_zeros(*first.shape[:2], frames - 1, *first.shape[3:])], dim=2)
        )
        mask = latents.new_zeros(len(latents), self.vae.config.scale_factor_temporal, *latents.shape[2:])
        mask[:, :, 0] = 1
        return torch.cat([mask, latents], dim=1)


def compression(folder: Path) -> tuple[int, int]:
    """Frames that the model compresses to one, and what a clip's sides must be multiples of, in pixels."""
    vae, transformer = read_config(folder, "vae"), read_config(folder, "transformer")
    patch = transformer.get("patch_size", [1, 2, 2])[1]
    return vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8) * patch


def encoder_fingerprints(folder: Path) -> dict[str, str]:
    """SHA-256 over the files of each part that encodes, by its name: other weights or settings give another one."""
    fingerprints = {}
    for part in ENCODERS:
        files = sorted(file for file in (folder / part).rglob("*") if file.is_file())
        if files:
            whole = hashlib.sha256()
            for file in files:
                with open(file, "rb") as opened:
                    content = hashlib.file_digest(opened, "sha256").hexdigest()
                whole.update(f"{file.relative_to(folder)} {content}\n".encode())
            fingerprints[part] = whole.hexdigest()
    return fingerprints


def latent_shape(folder: Path, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Latent shape ``(C, T, h, w)`` of a clip, from the VAE's compression factors.

    Raises:
        CheckpointError: when the clip's size is not a multiple of what the model compresses by.
    """
    vae, (temporal, step) = read_config(folder, "vae"), compression(folder)
    spatial = vae.get("scale_factor_spatial", 8)
    if (frames - 1) % temporal:
        raise CheckpointError(f"data.frames={frames} does not fit: the VAE takes {temporal}k+1 frames", in_call=True)
    for name, size in (("height", height), ("width", width)):
        if size % step:
            raise CheckpointError(f"data.{name}={size} does not fit: it must be a multiple of {step}", in_call=True)
    return vae.get("z_dim", 16), (frames - 1) // temporal + 1, height // spatial, width // spatial
