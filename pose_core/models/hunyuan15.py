"""HunyuanVideo 1.5: one transformer whose blocks carry video and text side by side.

Its text are the tokens of a language model and, for writing between quotation marks, of a glyph encoder; here they are
one sequence, the glyphs' behind the others. Image to video adds tokens of an image encoder, and the first frame's
latents and a mask beside the input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from PIL import Image
from torch import Tensor, nn

from pose_core.errors import CheckpointError
from pose_core.models.adapter import TIMESTEPS, Adapter, build_empty
from pose_core.models.codec import PipelineCodec, load_pipeline
from pose_core.models.folders import read_config
from pose_core.models.sizes import check_size
from pose_core.models.video_model import ClipShapes, Condition, ConditionWidths
from pose_core.models.weights import Weights

GLYPH_TOKENS = 256
"""Tokens of the glyph encoder behind those of the language model."""


class Hunyuan15(Adapter):
    """A ``HunyuanVideo15Transformer3DModel``; tokens that are zero are masked, as padding is."""

    blocks_at = "transformer_blocks"

    def __init__(self, module: HunyuanVideo15Transformer3DModel, weights: Weights | None = None):
        super().__init__(module, weights)
        # The stock pipelines round the time to the precision of computation; here it comes in float32.
        module.time_embed.timestep_embedder.register_forward_pre_hook(_in_precision_of_weights)

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition, told: Tensor | None = None) -> Tensor:
        """See ``VideoModel``."""
        config = self.module.config
        text, glyphs = condition.text.tensor_split((condition.text.shape[1] - GLYPH_TOKENS,), dim=1)
        first, image = condition.first_frame, condition.image
        if first is None:
            first = x_t.new_zeros(len(x_t), config.in_channels - x_t.shape[1], *x_t.shape[2:])
        if image is None:  # the network takes zeros for text to video, and masks however many they are
            image = x_t.new_zeros(len(x_t), 1, config.image_embed_dim)
        inputs = torch.cat([x_t, first.to(x_t.dtype)], dim=1)
        return self.module(
            hidden_states=inputs.to(self.compute_dtype),
            timestep=((t if told is None else told) * TIMESTEPS).float(),
            encoder_hidden_states=text.to(self.compute_dtype),
            encoder_attention_mask=_given(text),
            encoder_hidden_states_2=glyphs[..., : config.text_embed_2_dim].to(self.compute_dtype),
            encoder_attention_mask_2=_given(glyphs),
            image_embeds=image.to(self.compute_dtype),
            return_dict=False,
        )[0].type_as(x_t)


class Hunyuan15Codec(PipelineCodec):
    """The encoders of a HunyuanVideo 1.5 folder."""

    @property
    def has_image(self) -> bool:
        """Whether the folder is image to video."""
        return isinstance(self.pipeline, HunyuanVideo15ImageToVideoPipeline)

    @torch.no_grad()
    def encode_condition(self, prompts: list[str], first_frames: np.ndarray | None, frames: int) -> Condition:
        """First frames are what the folder is conditioned on, or ignored."""
        text = self.encode_text(prompts)
        if first_frames is None or not self.has_image:
            return Condition(text)
        pictures = [Image.fromarray(frame) for frame in first_frames]
        image = [
            self.pipeline.encode_image(image=each, batch_size=1, device=self.device, dtype=text.dtype)
            for each in pictures
        ]
        return Condition(text, torch.cat(image), self._first_frame(first_frames, frames))

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Tensor:
        """``[B, text_tokens + GLYPH_TOKENS, D_text]``; what the transformer masks is zeros."""
        text, mask, glyphs, glyph_mask = self.pipeline.encode_prompt(prompt=prompts, batch_size=len(prompts))
        text = (text * mask.unsqueeze(-1))[:, : self.text_tokens]
        glyphs = F.pad(glyphs * glyph_mask.unsqueeze(-1), (0, text.shape[-1] - glyphs.shape[-1]))
        return torch.cat([text, glyphs], dim=1)

    def _normalise(self, latents: Tensor) -> Tensor:
        return latents * self.vae.config.scaling_factor

    def _denormalise(self, latents: Tensor) -> Tensor:
        return latents / self.vae.config.scaling_factor

    # The stock VAE's causal attention takes one clip: its mask has no place for a batch (diffusers 0.42.1).

    def _encode(self, pixels: Tensor) -> Tensor:
        return torch.cat([super(Hunyuan15Codec, self)._encode(clip) for clip in pixels.split(1)])

    def _decode(self, latents: Tensor) -> Tensor:
        return torch.cat([super(Hunyuan15Codec, self)._decode(clip) for clip in latents.split(1)])

    def _first_frame(self, first_frames: np.ndarray, frames: int) -> Tensor:
        """Latents of the first frame, zeros behind it, and the mask: ``[B, C + 1, T, h, w]``."""
        first = self._encode(self._pixels(first_frames[:, None]))
        both = torch.cat([first, torch.ones_like(first[:, :1])], dim=1)
        return F.pad(both, (0, 0, 0, 0, 0, (frames - 1) // self.temporal_factor))


class Hunyuan15Family:
    """HunyuanVideo 1.5, text or image to video; mean-flow checkpoints, already distilled, are not teachers."""

    name = "hunyuan15"
    shares_tokens = False
    pipelines = {"i2v": "HunyuanVideo15ImageToVideoPipeline", "t2v": "HunyuanVideo15Pipeline"}

    def tasks(self, folder: Path) -> tuple[str, ...]:
        return (read_config(folder, "transformer").get("task_type", "i2v"),)

    def widths(self, folder: Path, task: str) -> ConditionWidths:
        config = read_config(folder, "transformer")
        if task == "t2v":
            return ConditionWidths(config["text_embed_dim"])
        first_frame = config["in_channels"] - config["out_channels"]
        return ConditionWidths(config["text_embed_dim"], config["image_embed_dim"], first_frame)

    def load_teacher(self, folder: Path, *, meta: bool = False, dtype: torch.dtype = torch.float32) -> Hunyuan15:
        return self.load_generator(folder, folder, meta=meta, dtype=dtype)

    def load_generator(
        self, folder: Path, teacher: Path, *, meta: bool = False, dtype: torch.dtype = torch.float32
    ) -> Hunyuan15:
        module = build_empty(HunyuanVideo15Transformer3DModel, folder, "transformer", self.name, dtype)
        if module.config.use_meanflow:
            raise CheckpointError(
                f"{folder}/transformer is a mean-flow model, whose velocity depends on two times: "
                "name one that was not distilled",
                in_call=True,
            )
        model = Hunyuan15(module, Weights(folder))
        if not meta:
            model.read_weights()
        return model

    def load_codec(
        self, folder: Path, text_tokens: int, device: str = "cpu", *, only_video: bool = False
    ) -> Hunyuan15Codec:
        with_image = self.tasks(folder) == ("i2v",)
        kind = HunyuanVideo15ImageToVideoPipeline if with_image else HunyuanVideo15Pipeline
        encoders = ["vae", "text_encoder", "text_encoder_2", *(["image_encoder"] if with_image else [])]
        return Hunyuan15Codec(load_pipeline(kind, folder, encoders, device, only_video), text_tokens)

    def compression(self, folder: Path) -> tuple[int, int]:
        vae = self._vae(folder)
        patch = read_config(folder, "transformer").get("patch_size", 1)
        return vae.temporal_compression_ratio, vae.spatial_compression_ratio * patch

    @staticmethod
    def _vae(folder: Path) -> AutoencoderKLHunyuanVideo15:
        """The VAE without its weights."""
        with torch.device("meta"):
            return AutoencoderKLHunyuanVideo15.from_config(read_config(folder, "vae"))

    def clip_shapes(
        self, folder: Path, *, task: str, frames: int, height: int, width: int, text_tokens: int
    ) -> ClipShapes:
        config, widths, vae = read_config(folder, "transformer"), self.widths(folder, task), self._vae(folder)
        temporal, spatial = vae.temporal_compression_ratio, vae.spatial_compression_ratio
        patch, patch_t = config.get("patch_size", 1), config.get("patch_size_t", 1)
        check_size(frames, height, width, *self.compression(folder))
        size = (frames - 1) // temporal + 1, height // spatial, width // spatial
        return ClipShapes(
            pixels=(3, frames, height, width),
            latents=(vae.config.latent_channels, *size),
            text=(text_tokens + GLYPH_TOKENS, widths.text),
            image=(self._image_tokens(folder), widths.image) if widths.image else None,
            first_frame=(widths.first_frame, *size) if widths.first_frame else None,
            tokens=(size[0] // patch_t) * (size[1] // patch) * (size[2] // patch),
        )

    @staticmethod
    def _image_tokens(folder: Path) -> int:
        vision = read_config(folder, "image_encoder")
        vision = vision.get("vision_config", vision)
        return (vision["image_size"] // vision["patch_size"]) ** 2

    def one_step_index(self, index: dict[str, Any], task: str) -> dict[str, Any]:
        return index | {"_class_name": self.pipelines[task]}

    def finish_export(self, out: Path) -> None:
        """The stock pipeline asks its guider, not its caller, for guidance."""
        ClassifierFreeGuidance(guidance_scale=1.0).save_pretrained(out / "guider")


def _given(tokens: Tensor) -> Tensor:
    """Which of ``tokens [B, L, D]`` are not padding."""
    return tokens.abs().amax(dim=-1) > 0


def _in_precision_of_weights(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    sample, *others = inputs
    return sample.to(next(module.parameters()).dtype), *others


FAMILY = Hunyuan15Family()
