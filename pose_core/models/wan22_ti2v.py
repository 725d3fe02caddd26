"""Wan 2.2 TI2V 5B: one transformer for text and image to video, whose tokens each have a time of their own.

The first frame is given as the clean first frame of the input, at time 0, in place of a mask and channels beside it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline
from torch import Tensor

from pose_core.models.adapter import TIMESTEPS, keep_given_frame, with_given_frame
from pose_core.models.codec import WanCodec, load_pipeline
from pose_core.models.folders import read_config
from pose_core.models.video_model import Condition, ConditionWidths
from pose_core.models.wan import Wan, WanFamily


class WanTI2V(Wan):
    """A ``WanTransformer3DModel`` with a time for every token; without a first frame they are all the same."""

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition, told: Tensor | None = None) -> Tensor:
        """See ``VideoModel``."""
        first, told = condition.first_frame, t if told is None else told
        if first is None:
            return self._network(x_t, told * TIMESTEPS, condition).type_as(x_t)
        predicted = self._network(with_given_frame(x_t, first), self._times(x_t, told), condition).type_as(x_t)
        return keep_given_frame(predicted, x_t, first, t)

    def _times(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Times ``[B, tokens]``: 0 for the tokens of the first frame."""
        _, rows, columns = self.module.config.patch_size
        frames, a_frame = x_t.shape[2], (x_t.shape[3] // rows) * (x_t.shape[4] // columns)
        later = torch.arange(frames * a_frame, device=x_t.device) >= a_frame
        return TIMESTEPS * t[:, None] * later


class WanTI2VCodec(WanCodec):
    """The Wan encoders, with the first frame alone as the condition."""

    def _first_frame(self, first_frames: np.ndarray, frames: int) -> Tensor:
        """Latents ``[B, C, 1, h, w]``."""
        return self._encode(self._pixels(first_frames[:, None]))


class WanTI2VFamily(WanFamily):
    """Wan 2.2 TI2V 5B, with the VAE that compresses 16 x 16 pixels."""

    name = "wan22_ti2v"
    model = WanTI2V

    def tasks(self, folder: Path) -> tuple[str, ...]:
        return ("i2v", "t2v")

    def widths(self, folder: Path, task: str) -> ConditionWidths:
        config = read_config(folder, "transformer")
        return ConditionWidths(config["text_dim"], 0, config["in_channels"] if task == "i2v" else 0)

    def load_codec(
        self, folder: Path, text_tokens: int, device: str = "cpu", *, only_video: bool = False
    ) -> WanTI2VCodec:
        kind, encoders = WanImageToVideoPipeline, ["vae", "text_encoder"]
        return WanTI2VCodec(load_pipeline(kind, folder, encoders, device, only_video, transformer_2=None), text_tokens)

    def _first_frame_shape(self, latents: tuple[int, ...], channels: int) -> tuple[int, ...]:
        return channels, 1, *latents[2:]


FAMILY = WanTI2VFamily()
