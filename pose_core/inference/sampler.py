"""Samples videos from first frames and prompts: one or a few generator steps, or the teacher's many."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pose_core.inference.export import exported_conditioning_time
from pose_core.method.flow import euler, few_steps, guided
from pose_core.models import families
from pose_core.models.parts import clip_shapes
from pose_core.models.video_model import Codec, Condition, VideoModel, bound
from pose_core.settings import Settings

WHOLE_PROMPT = 512
"""More prompt tokens than any family keeps."""


@dataclass(frozen=True)
class GeneratorTimes:
    """Times, in [0, 1], of a generator's evaluations."""

    conditioning: float = 1.0
    """What it is told of pure noise."""
    lowest: float = 0.0
    highest: float = 1.0
    """Between these two few steps noise again."""

    @classmethod
    def of(cls, settings: Settings) -> GeneratorTimes:
        evaluation = settings.evaluation
        times = evaluation.few_steps_time_min, evaluation.few_steps_time_max
        return cls(settings.method.conditioning_time, *times)

    def __str__(self) -> str:
        return (
            f"told time {self.conditioning:g} of its noise; its few steps noise again at times between "
            f"{self.lowest:g} and {self.highest:g}"
        )


@torch.no_grad()
def sample_generator(model: VideoModel, condition: Condition, noises: list[Tensor], times: GeneratorTimes) -> Tensor:
    """Latents ``[B, C, T, H, W]`` in ``len(noises)`` evaluations, one noise ``[B, C, T, H, W]`` each."""
    return few_steps(bound(model, condition, times.conditioning), noises, times.lowest, times.highest)


@torch.no_grad()
def sample_teacher(
    model: VideoModel, condition: Condition, null_text: Tensor, noise: Tensor, steps: int, guidance: float, shift: float
) -> Tensor:
    """Latents ``[B, C, T, H, W]`` by ``steps`` Euler steps with classifier-free guidance (two evaluations a step)."""
    unconditional = bound(model, condition.with_text(null_text))
    return euler(guided(bound(model, condition), unconditional, guidance), noise, steps, shift)


def teacher_evaluations(steps: int, guidance: float) -> int:
    """Network evaluations (NFE) of ``sample_teacher``: guidance takes two a step, unless it is 1."""
    return steps if guidance == 1 else 2 * steps


class OneStepSampler:
    """A diffusers folder, seen as a function from first frames, prompts and noise to videos."""

    def __init__(self, model: VideoModel, codec: Codec, folder: Path, times: GeneratorTimes):
        self.model, self.codec, self.folder, self.times = model, codec, folder, times

    @classmethod
    def load(cls, folder: Path, text_tokens: int = WHOLE_PROMPT) -> OneStepSampler:
        """Load an exported folder (or any folder of a family that is known).

        Raises:
            CheckpointError: naming the part that is missing or does not load.
        """
        family = families.of(folder)
        model, codec = family.load_generator(folder, folder), family.load_codec(folder, text_tokens)
        return cls(model, codec, folder, GeneratorTimes(exported_conditioning_time(folder)))

    def __call__(self, prompts: list[str], first_frames: np.ndarray | None, noises: list[Tensor]) -> np.ndarray:
        """Videos ``[B, F, H, W, 3]``, float32 in [0, 1].

        ``first_frames [B, H, W, 3]`` uint8 (None for text to video); ``noises``: one ``[B, C, T, h, w]`` a step.
        """
        frames = (noises[0].shape[2] - 1) * self.codec.temporal_factor + 1
        condition = self.codec.encode_condition(prompts, first_frames, frames)
        return self.codec.decode(sample_generator(self.model, condition, noises, self.times))

    def noise(self, clips: int, frames: int, height: int, width: int, seed: int) -> Tensor:
        """Standard Gaussian noise ``[B, C, T, h, w]`` for clips of the given size, from ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        shapes = clip_shapes(self.folder, frames=frames, height=height, width=width, text_tokens=1)
        return torch.randn(clips, *shapes.latents, generator=generator)
