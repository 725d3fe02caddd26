"""LTX-Video: one transformer over packed latents for text and image to video, with a time for every token.

The first frame is given as the clean first frame of the input, at time 0. Prompt tokens that are padding are masked.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLLTXVideo, LTXImageToVideoPipeline, LTXVideoTransformer3DModel
from torch import Tensor

from pose_core.models.adapter import TIMESTEPS, Adapter, build_empty, keep_given_frame, with_given_frame
from pose_core.models.codec import PipelineCodec, load_pipeline
from pose_core.models.folders import read_config
from pose_core.models.sizes import check_size
from pose_core.models.video_model import ClipShapes, Condition, ConditionWidths
from pose_core.models.weights import Weights

PROMPT_TOKENS = 128
"""Tokens the stock pipelines encode a prompt with; their T5 sees the padding, so no fewer may be encoded."""
FRAMES_PER_SECOND = 25
"""Rate the stock pipelines tell the position embeddings of unless they are told another one."""


class LTX(Adapter):
    """An ``LTXVideoTransformer3DModel`` and the compression of its VAE, which its position embeddings count in."""

    blocks_at = "transformer_blocks"

    def __init__(self, module: LTXVideoTransformer3DModel, temporal: int, spatial: int, weights: Weights | None = None):
        super().__init__(module, weights)
        self.pixels_a_latent = temporal / FRAMES_PER_SECOND, spatial, spatial
        self.patches = module.config.patch_size_t, module.config.patch_size, module.config.patch_size

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition, told: Tensor | None = None) -> Tensor:
        """See ``VideoModel``."""
        first = condition.first_frame
        times = ((t if told is None else told) * TIMESTEPS).float()
        if first is None:
            return self._network(x_t, times, condition)
        tokens = [size // patch for size, patch in zip(x_t.shape[2:], self.patches, strict=True)]
        later = torch.arange(math.prod(tokens), device=x_t.device) >= tokens[1] * tokens[2]
        predicted = self._network(with_given_frame(x_t, first), times[:, None] * later, condition)
        return keep_given_frame(predicted, x_t, first, t)

    def _network(self, x_t: Tensor, times: Tensor, condition: Condition) -> Tensor:
        frames, height, width = x_t.shape[2:]
        text = condition.text
        packed = self.module(
            hidden_states=pack(x_t, self.patches).to(self.compute_dtype),
            encoder_hidden_states=text.to(self.compute_dtype),
            timestep=times,
            encoder_attention_mask=text.abs().amax(dim=-1) > 0,
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=self.pixels_a_latent,
            return_dict=False,
        )[0]
        return unpack(packed, x_t.shape, self.patches).type_as(x_t)


class LTXCodec(PipelineCodec):
    """The encoders of an LTX-Video folder."""

    def __init__(self, pipeline: LTXImageToVideoPipeline, text_tokens: int):
        super().__init__(pipeline, min(text_tokens, PROMPT_TOKENS))

    @torch.no_grad()
    def encode_condition(self, prompts: list[str], first_frames: np.ndarray | None, frames: int) -> Condition:
        """Without ``first_frames`` it is a condition of text to video."""
        text = self.encode_text(prompts)
        if first_frames is None:
            return Condition(text)
        return Condition(text, first_frame=self._encode(self._pixels(first_frames[:, None])))

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Tensor:
        """What the transformer masks is zeros."""
        text, mask, *_ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=PROMPT_TOKENS
        )
        return (text * mask.unsqueeze(-1))[:, : self.text_tokens]

    def _normalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents - mean) * self.vae.config.scaling_factor / std

    def _denormalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std / self.vae.config.scaling_factor + mean

    def _decode(self, latents: Tensor) -> Tensor:
        # The later decoders take the time of what noise is left in the latents: none.
        time = latents.new_zeros(len(latents)) if self.vae.config.timestep_conditioning else None
        return self.vae.decode(latents, time, return_dict=False)[0]

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            values.view(1, -1, 1, 1, 1).to(latents) for values in (self.vae.latents_mean, self.vae.latents_std)
        )
        return mean, std


class LTXFamily:
    """LTX-Video, 2B and 13B."""

    name = "ltx"
    shares_tokens = False
    pipelines = {"i2v": "LTXImageToVideoPipeline", "t2v": "LTXPipeline"}

    def tasks(self, folder: Path) -> tuple[str, ...]:
        return ("i2v", "t2v")

    def widths(self, folder: Path, task: str) -> ConditionWidths:
        config = read_config(folder, "transformer")
        return ConditionWidths(config["caption_channels"], 0, config["in_channels"] if task == "i2v" else 0)

    def load_teacher(self, folder: Path, *, meta: bool = False, dtype: torch.dtype = torch.float32) -> LTX:
        return self.load_generator(folder, folder, meta=meta, dtype=dtype)

    def load_generator(
        self, folder: Path, teacher: Path, *, meta: bool = False, dtype: torch.dtype = torch.float32
    ) -> LTX:
        module = build_empty(LTXVideoTransformer3DModel, folder, "transformer", self.name, dtype)
        model = LTX(module, *vae_compression(teacher), Weights(folder))
        if not meta:
            model.read_weights()
        return model

    def load_codec(self, folder: Path, text_tokens: int, device: str = "cpu", *, only_video: bool = False) -> LTXCodec:
        kind, encoders = LTXImageToVideoPipeline, ["vae", "text_encoder"]
        return LTXCodec(load_pipeline(kind, folder, encoders, device, only_video), text_tokens)

    def compression(self, folder: Path) -> tuple[int, int]:
        temporal, spatial = vae_compression(folder)
        # The stock pipelines want multiples of 32.
        return temporal, max(32, spatial * read_config(folder, "transformer").get("patch_size", 1))

    def clip_shapes(
        self, folder: Path, *, task: str, frames: int, height: int, width: int, text_tokens: int
    ) -> ClipShapes:
        config, (temporal, spatial) = read_config(folder, "transformer"), vae_compression(folder)
        patch, patch_t = config.get("patch_size", 1), config.get("patch_size_t", 1)
        check_size(frames, height, width, *self.compression(folder))
        channels, time, rows, columns = (
            config["in_channels"] // (patch * patch * patch_t),
            (frames - 1) // temporal + 1,
            height // spatial,
            width // spatial,
        )
        widths = self.widths(folder, task)
        return ClipShapes(
            pixels=(3, frames, height, width),
            latents=(channels, time, rows, columns),
            text=(min(text_tokens, PROMPT_TOKENS), widths.text),
            image=None,
            first_frame=(channels, 1, rows, columns) if widths.first_frame else None,
            tokens=(time // patch_t) * (rows // patch) * (columns // patch),
        )

    def one_step_index(self, index: dict[str, Any], task: str) -> dict[str, Any]:
        return index | {"_class_name": self.pipelines[task]}

    def finish_export(self, out: Path) -> None:
        """Nothing else differs."""


def vae_compression(folder: Path) -> tuple[int, int]:
    """Frames and pixels a side that a latent of the folder's VAE stands for."""
    with torch.device("meta"):
        vae = AutoencoderKLLTXVideo.from_config(read_config(folder, "vae"))
    return vae.temporal_compression_ratio, vae.spatial_compression_ratio


def pack(latents: Tensor, patches: tuple[int, int, int]) -> Tensor:
    """Latents ``[B, C, T, h, w]`` to tokens ``[B, tokens, C * patch]``, as the stock pipelines order them."""
    for axis, patch in zip((2, 4, 6), patches, strict=True):
        latents = latents.unflatten(axis, (-1, patch))
    return latents.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpack(tokens: Tensor, shape: torch.Size, patches: tuple[int, int, int]) -> Tensor:
    """The inverse of ``pack`` for latents of ``shape``."""
    grid = [size // patch for size, patch in zip(shape[2:], patches, strict=True)]
    latents = tokens.unflatten(1, grid).unflatten(4, (-1, *patches))
    return latents.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)


FAMILY = LTXFamily()
