"""The quality figures of the embedded domain: SA, TC and FQ in 0..100, motion, and fidelity to the given first frame.

They are this project's stand-ins for VBench's three families, measured by the judge against real held-out clips.
"""

from __future__ import annotations

import re

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pose_core.data import moving_digits
from pose_core.errors import DataError
from pose_core.evaluation.judge import DIRECTION_NAMES, Judge, Verdict, brightness_centres, soften

CROP_PIXELS = moving_digits.DIGIT_PIXELS + 4
"""Side of the window that follows the digit: the whole digit, also where its centre of mass is not its middle."""
SUBJECT_CORRELATION = 0.925
"""From here on a clip shows its first frame's subject. Real clips reach 0.99 and clips blurred by 1.4 pixels 0.97;
another sample of the same digit stays below in six of ten cases, another digit in nearly all."""
TRACK_SCALE_PIXELS = 1.0
"""Distance from a bouncing path at which its score is 1/e: real clips lie 0.1 pixels off, frozen ones 2, shuffled 4."""
APPEARANCE_SCALE = 0.1
"""Loss of correlation at which constancy is 1/e: real clips lose 0.001; a digit that becomes another one loses 0.09."""
CLIP_DISTANCE_SCALE = 10.0
FRAME_DISTANCE_SCALE = 10.0
"""Fréchet distances at which their scores are 1/e. Two sets of 96 real clips lie about 1 apart. Clip features put
clips at half speed 12 away and frozen ones 52; frame features put a blur of 1 pixel 7 away and of 1.4 pixels 18."""
PSNR_CAP_DECIBELS = 60.0
"""An exact first frame counts as this, so that one clip cannot make the mean infinite."""

CENTRE_OFFSET_PIXELS = (5.0, 10.0)
"""Where handwriting has its centre of mass inside its box of ``DIGIT_PIXELS``, along either axis."""
PROMPT = re.compile(rf"an? ({'|'.join(moving_digits.DIGIT_NAMES)}) moving ({'|'.join(DIRECTION_NAMES)})")


def score(
    judge: Judge, videos: np.ndarray, prompts: list[str], first_frames: np.ndarray, reference: np.ndarray
) -> dict[str, float]:
    """Figures of ``videos [N, T, H, W, 3]`` made from ``prompts`` (N) and ``first_frames [N, H, W, 3]``, all uint8.

    ``reference [M, T, H, W, 3]`` uint8 holds real held-out clips. Distances shrink as N and M grow: compare figures of
    the same N and M only.

    Returns:
        ``SA``, ``TC``, ``FQ`` and their ``mean`` in 0..100, higher is better; ``motion``, the distance that the digit's
        centre travels as a ratio to the reference's; ``first_frame_psnr`` in dB, averaged over clips, each at most 60.

    Raises:
        DataError: when shapes do not go together or a prompt is not one of the domain's.
    """
    _check(videos, prompts, first_frames, reference)
    seen, real = judge.watch(videos), judge.watch(reference)
    figures = {
        "SA": semantic_alignment(seen, videos, prompts, first_frames),
        "TC": temporal_coherence(seen, videos, real),
        "FQ": frame_quality(seen, real),
    }
    return {
        **figures,
        "mean": sum(figures.values()) / len(figures),
        "motion": _travelled_pixels(seen.centres) / max(_travelled_pixels(real.centres), 1e-9),
        "first_frame_psnr": float(psnr(videos[:, 0], first_frames).mean()),
    }


def plain_figures(videos: np.ndarray, first_frames: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """The figures that need no judge, for any footage: arguments and shapes as for ``score``.

    ``motion`` is the mean absolute difference of neighbouring frames as a ratio to the reference's.
    """

    def change(clips: np.ndarray) -> float:
        return float(np.abs(np.diff(clips.astype(np.float32), axis=1)).mean())

    return {
        "motion": change(videos) / max(change(reference), 1e-9),
        "first_frame_psnr": float(psnr(videos[:, 0], first_frames).mean()),
    }


def semantic_alignment(seen: Verdict, videos: np.ndarray, prompts: list[str], first_frames: np.ndarray) -> float:
    """SA, 0..100: mean of three shares of clips.

    Digit: the judge's guess over all frames is the prompt's. Direction: the judge's guess is the prompt's. Subject: the
    window that follows the digit correlates with the one in the first frame by at least ``SUBJECT_CORRELATION``, on
    average over the frames and both slightly blurred, as sharpness is FQ's business.
    """
    wanted = torch.tensor([parse_prompt(prompt) for prompt in prompts])
    digit = seen.digit_logits.mean(dim=1).argmax(dim=-1) == wanted[:, 0]
    direction = seen.direction_logits.argmax(dim=-1) == wanted[:, 1]
    one_pass = torch.ones(())
    given = _pixels(first_frames[:, None])
    template = _follow(soften(given, one_pass), brightness_centres(given))
    subject = _correlation(_follow(soften(_pixels(videos), one_pass), seen.centres), template).mean(dim=1)
    agreements = torch.stack([digit, direction, subject >= SUBJECT_CORRELATION])
    return 100 * agreements.float().mean().item()


def temporal_coherence(seen: Verdict, videos: np.ndarray, real: Verdict) -> float:
    """TC, 0..100: mean of three parts.

    Track: ``exp(-(r / TRACK_SCALE_PIXELS)^2)`` a clip, with ``r`` from ``track_residuals``. Appearance:
    ``exp(-(1 - c) / APPEARANCE_SCALE)`` a clip, with ``c`` the mean correlation of the window that follows the digit
    with its average over the clip. Distribution: ``exp(-d / CLIP_DISTANCE_SCALE)``, with ``d`` the Fréchet distance of
    the judge's clip features from the real clips'.
    """
    height, width = videos.shape[2:4]
    track = np.exp(-np.square(track_residuals(seen.centres.numpy(), height, width) / TRACK_SCALE_PIXELS)).mean()
    windows = _follow(_pixels(videos), seen.centres)
    constancy = _correlation(windows, windows.mean(dim=1, keepdim=True)).mean(dim=1)
    appearance = torch.exp(-(1 - constancy) / APPEARANCE_SCALE).mean().item()
    clips = min(len(seen.clip_features), len(real.clip_features))
    distance = frechet_distance(seen.clip_features, real.clip_features, samples=clips)
    return 100 * float(track + appearance + np.exp(-distance / CLIP_DISTANCE_SCALE)) / 3


def frame_quality(seen: Verdict, real: Verdict) -> float:
    """FQ, 0..100: ``exp(-d / FRAME_DISTANCE_SCALE)``, ``d`` the Fréchet distance of all frames' features."""
    # The frames of a clip share their handwriting: clips, not frames, are the independent samples.
    clips = min(len(seen.frame_features), len(real.frame_features))
    distance = frechet_distance(seen.frame_features.flatten(0, 1), real.frame_features.flatten(0, 1), samples=clips)
    return 100 * float(np.exp(-distance / FRAME_DISTANCE_SCALE))


def frechet_distance(first: Tensor, second: Tensor, *, samples: int | None = None) -> float:
    """Squared Fréchet distance of the Gaussians fitted to ``first [N, D]`` and ``second [M, D]``, in float64.

    ``|m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1^1/2 S_2 S_1^1/2)^1/2)``. With ``samples``, the number of independent ones,
    both covariances are pulled by ``D / (D + samples)`` towards a multiple of the identity: a covariance from few
    samples has too unequal eigenvalues, which would count as distance.
    """
    (mean_1, covariance_1), (mean_2, covariance_2) = _gaussian(first, samples), _gaussian(second, samples)
    root = _square_root(covariance_1)
    cross = torch.linalg.eigvalsh(root @ covariance_2 @ root).clamp(min=0).sqrt().sum()
    distance = (mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace() - 2 * cross
    return max(distance.item(), 0.0)


def track_residuals(centres: np.ndarray, height: int, width: int) -> np.ndarray:
    """Distance of each track from the nearest path the domain can draw: root mean square over frames, ``[N]`` pixels.

    A path runs straight along one or both axes at one speed within ``SPEED_PIXELS`` and bounces off the walls; its
    direction, speed and start are fitted to ``centres [N, T, 2]``. A digit that stands still is on no path.
    """
    speeds = np.linspace(*moving_digits.SPEED_PIXELS, 21)
    (moving_x, still_x), (moving_y, still_y) = (
        _axis_residuals(centres[..., axis], speeds, size - moving_digits.DIGIT_PIXELS)
        for axis, size in enumerate((width, height))
    )
    both, along_x, along_y = moving_x + moving_y, moving_x + still_y, still_x + moving_y
    return np.sqrt(np.minimum(both, np.minimum(along_x, along_y)).min(axis=1))


def psnr(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of ``images [N, ...]`` against ``references``, uint8, ``[N]`` dB, capped at 60."""
    error = np.square(images.astype(np.float64) - references).reshape(len(images), -1).mean(axis=1)
    return np.minimum(10 * np.log10(255**2 / np.maximum(error, 1e-9)), PSNR_CAP_DECIBELS)


def parse_prompt(prompt: str) -> tuple[int, int]:
    """Digit (0..9) and index into ``DIRECTION_NAMES`` that ``prompt`` asks for.

    Raises:
        DataError: for a prompt that the embedded domain does not write.
    """
    match = PROMPT.fullmatch(prompt)
    if match is None:
        raise DataError(
            f"the judge cannot score the prompt {prompt!r}, only ones like 'a seven moving up and left': "
            "leave SA, TC and FQ out with evaluation.judge='' for other data",
            in_call=True,
        )
    return moving_digits.DIGIT_NAMES.index(match[1]), DIRECTION_NAMES.index(match[2])


def _check(videos: np.ndarray, prompts: list[str], first_frames: np.ndarray, reference: np.ndarray) -> None:
    for name, array, axes in (("videos", videos, 5), ("first_frames", first_frames, 4), ("reference", reference, 5)):
        if array.ndim != axes or array.shape[-1] != 3 or array.dtype != np.uint8:
            raise DataError(f"{name} must be uint8 with {axes} axes, RGB last; it is {array.dtype} {array.shape}")
    if videos.shape[1:] != reference.shape[1:] or first_frames.shape != videos[:, 0].shape:
        raise DataError(
            f"videos {videos.shape}, first_frames {first_frames.shape} and reference {reference.shape} "
            "must agree in frames, height and width: decode them with the same settings"
        )
    if len(prompts) != len(videos) or min(len(videos), len(reference)) < 2:
        raise DataError(
            f"a score needs a prompt a clip and two clips or more: got {len(prompts)} prompts, {len(videos)} videos "
            f"and {len(reference)} reference clips"
        )


def _gaussian(features: Tensor, samples: int | None) -> tuple[Tensor, Tensor]:
    features = features.double()
    covariance, size = torch.cov(features.T), features.shape[1]
    pull = 0.0 if samples is None else size / (size + samples)
    identity = torch.eye(size, dtype=torch.float64) * covariance.trace() / size
    return features.mean(dim=0), torch.lerp(covariance, identity, pull)


def _square_root(covariance: Tensor) -> Tensor:
    values, axes = torch.linalg.eigh(covariance)
    return axes * values.clamp(min=0).sqrt() @ axes.T


def _axis_residuals(track: np.ndarray, speeds: np.ndarray, free: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean squared distance of ``track [N, T]`` from the best moving path of each speed and from standing still.

    Both are ``[N, speeds]``; ``free`` is the way between the walls in pixels.
    """
    starts = np.arange(0, 2 * free, 0.5)
    unfolded = np.mod(starts[:, None] + speeds[:, None, None] * np.arange(track.shape[1]), 2 * free)
    paths = np.minimum(unfolded, 2 * free - unfolded)
    away = track[:, None, None] - paths
    away -= np.clip(away.mean(axis=-1, keepdims=True), *CENTRE_OFFSET_PIXELS)
    moving = np.square(away).mean(axis=-1).min(axis=-1)
    return moving, np.broadcast_to(track.var(axis=1)[:, None], moving.shape)


def _travelled_pixels(centres: Tensor) -> float:
    return centres.diff(dim=1).norm(dim=-1).sum(dim=1).mean().item()


def _pixels(videos: np.ndarray) -> Tensor:
    return torch.from_numpy(videos).movedim(-1, 2) / 255


def _follow(clips: Tensor, centres: Tensor) -> Tensor:
    """Grey windows of ``CROP_PIXELS`` around ``centres [N, T, 2]``: ``[N, T, pixels]``, black outside the canvas."""
    height, width = clips.shape[-2:]
    steps = torch.arange(CROP_PIXELS) - (CROP_PIXELS - 1) / 2
    down, right = torch.meshgrid(steps, steps, indexing="ij")
    places = centres.flatten(0, 1)[:, None, None] + torch.stack([right, down], dim=-1)
    grid = (2 * places + 1) / torch.tensor([width, height]) - 1
    windows = F.grid_sample(clips.mean(dim=2).flatten(0, 1)[:, None], grid, align_corners=False)
    return windows.flatten(1).unflatten(0, centres.shape[:2])


def _correlation(windows: Tensor, templates: Tensor) -> Tensor:
    """Pearson correlation over the last axis; 0 for a blank window."""
    return F.cosine_similarity(
        windows - windows.mean(dim=-1, keepdim=True), templates - templates.mean(dim=-1, keepdim=True), dim=-1
    )
