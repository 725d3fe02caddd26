"""How clips are spoilt on purpose: what the judge learns to see, and what tests of the figures are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DEGRADATIONS = ("blur", "blocks", "ghost", "gain", "noise")
DISORDERS = ("none", "shuffled", "frozen", "swapped", "jittered")


def disorder(clips: Tensor, digits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Spoil the time axis of about four clips in ten: shuffle, freeze, swap the digits midway, or let them jitter.

    Takes and returns ``clips [N, T, 3, H, W]`` and ``digits [N, R, T]``; adds the index into ``DISORDERS``, ``[N]``.
    """
    count, _, frames = digits.shape
    kinds = (torch.rand(count, generator=generator) * 10 - 5).floor().clamp(min=0).long()
    other_clips, other_digits = clips.roll(1, 0), digits.roll(1, 0)
    clips, digits = clips.clone(), digits.clone()
    for row, kind in enumerate(kinds.tolist()):
        if DISORDERS[kind] == "shuffled":
            clips[row] = clips[row, torch.randperm(frames, generator=generator)]
        elif DISORDERS[kind] == "frozen":
            clips[row] = clips[row, :1].clone()
        elif DISORDERS[kind] == "swapped":
            cut = int(torch.randint(1, frames, (), generator=generator))
            clips[row, cut:], digits[row, :, cut:] = other_clips[row, cut:], other_digits[row, :, cut:]
        elif DISORDERS[kind] == "jittered":
            for frame, shift in enumerate(torch.randint(-2, 3, (frames, 2), generator=generator).tolist()):
                clips[row, frame] = clips[row, frame].roll(shift, (-2, -1))
    return clips, digits, kinds


def degrade(clips: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Spoil the frames as codecs, autoencoders and short samplers do; each degradation hits half of the clips.

    ``clips [N, T, 3, H, W]`` in [0, 1]; the strengths, ``[N, 5]`` in [0, 1], follow ``DEGRADATIONS``.
    """
    shape = (len(clips), len(DEGRADATIONS))
    strengths = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.5)
    blur, blocks, ghost, gain, noise = strengths.T[..., None, None, None, None]
    neighbours = (torch.cat([clips[:, :1], clips[:, :-1]], 1) + torch.cat([clips[:, 1:], clips[:, -1:]], 1)) / 2
    clips = torch.lerp(clips, neighbours, 0.6 * ghost)
    clips = soften(clips, 4 * blur)
    flat = clips.flatten(0, 1)
    coarse = F.interpolate(F.avg_pool2d(flat, 4), scale_factor=4.0, mode="nearest").view_as(clips)
    clips = torch.lerp(clips, coarse, 0.5 * blocks)
    tint = 1 + 0.1 * gain * torch.randn((len(clips), 1, 3, 1, 1), generator=generator)
    clips = clips * (1 - 0.4 * gain) * tint + 0.1 * gain
    white = torch.randn(clips.shape, generator=generator)
    return (clips + 0.12 * noise * white).clamp(0, 1), strengths


def soften(clips: Tensor, passes: Tensor) -> Tensor:
    """Blur ``clips [N, T, 3, H, W]`` by ``passes`` of a 1-2-1 kernel (variance 0.5 each), fractions blended."""
    line = clips.new_tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(line, line)[None, None].expand(3, 1, 3, 3)
    for done in range(int(passes.max().ceil())):
        softer = F.conv2d(clips.flatten(0, 1), kernel, padding=1, groups=3).view_as(clips)
        clips = torch.lerp(clips, softer, (passes - done).clamp(0, 1))
    return clips
