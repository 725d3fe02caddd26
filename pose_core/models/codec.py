"""The frozen encoders around a transformer: video VAE, text encoder and, where there is one, image encoder.

The text and image paths are the stock pipeline's own, so that what is trained on is what the exported pipeline feeds.
``PipelineCodec`` is common to all families, ``WanCodec`` is that of the Wan models.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image
from torch import Tensor

from pose_core.errors import CheckpointError
from pose_core.models.folders import read_config, read_index
from pose_core.models.sizes import takes_image
from pose_core.models.video_model import Condition

ENCODERS = (
    *("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "image_encoder"),
    *("image_processor", "feature_extractor"),
)
"""Parts of a diffusers folder that decide what is encoded."""


class PipelineCodec:
    """A stock pipeline without its transformer; a family says how latents are scaled and conditions encoded."""

    pipeline: Any

    def __init__(self, pipeline: Any, text_tokens: int):
        self.pipeline = pipeline
        self.text_tokens = text_tokens
        self.vae = pipeline.vae

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device

    @property
    def temporal_factor(self) -> int:
        """Frames a latent frame stands for; the first stands for one alone."""
        return self.vae.temporal_compression_ratio

    @torch.no_grad()
    def encode_video(self, video: np.ndarray) -> Tensor:
        """Clips ``[B, F, H, W, 3]`` uint8 to normalised latents ``[B, C, T, h, w]``, float32."""
        return self._encode(self._pixels(video))

    @torch.no_grad()
    def encode_condition(self, prompts: list[str], first_frames: np.ndarray | None, frames: int) -> Condition:
        """Prompts and, for image to video, first frames ``[B, H, W, 3]`` uint8 of clips with ``frames`` frames."""
        raise NotImplementedError

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Tensor:
        """Prompts to embeddings ``[B, text_tokens, D_text]``, zeros behind the last token; longer prompts are cut."""
        raise NotImplementedError

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Normalised latents ``[B, C, T, h, w]`` to clips ``[B, F, H, W, 3]``, float32 in [0, 1]."""
        video = self._decode(self._denormalise(latents.to(self.device, self.vae.dtype)))
        return self.pipeline.video_processor.postprocess_video(video, output_type="np")

    def decode_uint8(self, latents: Tensor) -> np.ndarray:
        """``decode`` as pixels 0..255, uint8."""
        return (self.decode(latents) * 255).round().astype(np.uint8)

    def _normalise(self, latents: Tensor) -> Tensor:
        """The VAE's latents as the transformer takes them."""
        raise NotImplementedError

    def _denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of ``_normalise``."""
        raise NotImplementedError

    def _decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents, return_dict=False)[0]

    def _pixels(self, video: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(video)).to(self.device, torch.float32)
        return pixels.permute(0, 4, 1, 2, 3) / 127.5 - 1

    def _encode(self, pixels: Tensor) -> Tensor:
        return self._normalise(self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode().float())


class WanCodec(PipelineCodec):
    """Encodes clips, prompts and first frames to what a Wan transformer takes, and decodes latents to frames."""

    def __init__(self, pipeline: WanPipeline | WanImageToVideoPipeline, text_tokens: int):
        super().__init__(pipeline, text_tokens)
        self.mean = torch.tensor(self.vae.config.latents_mean).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(self.vae.config.latents_std).view(1, -1, 1, 1, 1)

    @classmethod
    def load(cls, folder: Path, text_tokens: int, device: str = "cpu", *, only_video: bool = False) -> WanCodec:
        """Load every part but the transformer from a diffusers folder, or with ``only_video`` the VAE alone.

        Raises:
            CheckpointError: naming the part that is missing or does not load.
        """
        config = read_config(folder, "transformer")
        kind = WanImageToVideoPipeline if takes_image(config) else WanPipeline
        encoders = ["vae", "text_encoder", *(["image_encoder"] if config.get("image_dim") is not None else [])]
        return cls(load_pipeline(kind, folder, encoders, device, only_video, transformer_2=None), text_tokens)

    @property
    def has_image(self) -> bool:
        """Whether the family is image to video."""
        return isinstance(self.pipeline, WanImageToVideoPipeline)

    @property
    def temporal_factor(self) -> int:
        return self.vae.config.scale_factor_temporal

    @torch.no_grad()
    def encode_condition(self, prompts: list[str], first_frames: np.ndarray | None, frames: int) -> Condition:
        text = self.encode_text(prompts)
        if first_frames is None or not self.has_image:
            return Condition(text)
        image = None
        if self.pipeline.image_encoder is not None:
            image = self.pipeline.encode_image([Image.fromarray(frame) for frame in first_frames])
        return Condition(text, image, self._first_frame(first_frames, frames))

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Tensor:
        return self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
        )[0]

    def _normalise(self, latents: Tensor) -> Tensor:
        return (latents - self.mean.to(latents)) / self.std.to(latents)

    def _denormalise(self, latents: Tensor) -> Tensor:
        return latents * self.std.to(latents.device) + self.mean.to(latents.device)

    def _first_frame(self, first_frames: np.ndarray, frames: int) -> Tensor:
        """Mask and latents of the first frame followed by grey: ``[B, temporal factor + C, T, h, w]``."""
        first = self._pixels(first_frames[:, None])
        latents = self._encode(
            torch.cat([first, first.new_zeros(*first.shape[:2], frames - 1, *first.shape[3:])], dim=2)
        )
        mask = latents.new_zeros(len(latents), self.vae.config.scale_factor_temporal, *latents.shape[2:])
        mask[:, :, 0] = 1
        return torch.cat([mask, latents], dim=1)


def load_pipeline(
    kind: Any, folder: Path, encoders: list[str], device: str, only_video: bool = False, **without: None
) -> Any:
    """The stock pipeline ``kind`` from ``folder``, without transformer and other parts given as None; quiet, frozen.

    ``only_video`` leaves out what prompts and images pass through, in published models far larger than the VAE.

    Raises:
        CheckpointError: naming the part of ``encoders`` that is missing, or what does not load (exit code 2).
    """
    if only_video:
        encoders, others = ["vae"], set(ENCODERS) - {"vae"}
        without |= dict.fromkeys(others & read_index(folder).keys())
    for part in encoders:
        read_config(folder, part)
    try:
        pipeline = kind.from_pretrained(folder, transformer=None, use_safetensors=True, **without)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {' '.join(str(error).split())}", in_call=True) from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


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
