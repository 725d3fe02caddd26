"""The quality figures of the embedded domain: SA, TC and FQ in 0..100, motion, and fidelity to the given first frame.

They are this project's stand-ins for VBench's three families, measured by the judge against real held-out clips.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pose_core.data import moving_digits
from pose_core.errors import DataError
from pose_core.evaluation.judge import MOTIONS, Judge, Verdict, ink_centres, ink_of_roles
from pose_core.evaluation.spoiling import soften

CROP_PIXELS = moving_digits.DIGIT_PIXELS + 4
"""Side of the window that follows a digit: the whole digit, also where its centre of mass is not its middle."""
SUBJECT_CORRELATION = 0.9
"""From here on a digit is its first frame's subject."""
TRACK_SCALE_PIXELS = 1.0
"""Distance from a bouncing path at which its score is 1/e."""
APPEARANCE_SCALE = 0.1
"""Loss of correlation at which constancy is 1/e."""
CLIP_DISTANCE_SCALE = 10.0
FRAME_DISTANCE_SCALE = 10.0
"""Fréchet distances at which their scores are 1/e."""
PSNR_CAP_DECIBELS = 60.0
"""An exact first frame counts as this, so that one clip cannot make the mean infinite."""
HIDDEN_PIXELS = 9.0
"""Digits whose centres are closer than this along x hide each other: the one behind is not measured there."""

CENTRE_OFFSET_PIXELS = (3.5, 7.5)
"""Where handwriting has its centre of mass inside its box of ``DIGIT_PIXELS``, along either axis."""
MOVER = (
    rf"a {{}} ({'|'.join(moving_digits.DIGIT_NAMES)})"
    rf"(?: moving ({'|'.join(moving_digits.DIRECTIONS)}) ({'|'.join(moving_digits.PACES)}))?"
)
PROMPT = re.compile("{}(?: in front of {})?".format(*(MOVER.format(colour) for colour in moving_digits.COLOURS)))


@dataclass(frozen=True)
class Wanted:
    """What the prompts of ``N`` clips ask for, by role."""

    digits: Tensor
    """``[N, R]``, 0..9."""
    motions: Tensor
    """``[N, R]``, indices into ``MOTIONS``."""
    there: Tensor
    """``[N, R]``, bool: whether the prompt names such a digit at all."""
    told: Tensor
    """``[N, R]``, bool: whether it says how that digit moves."""


def score(
    judge: Judge, videos: np.ndarray, prompts: list[str], first_frames: np.ndarray | None, reference: np.ndarray
) -> dict[str, float]:
    """Figures of ``videos [N, T, H, W, 3]`` made from ``prompts`` (N) and ``first_frames [N, H, W, 3]``, all uint8.

    Without ``first_frames``, for text to video, no subject is asked for and there is no ``first_frame_psnr``.

    ``reference [M, T, H, W, 3]`` uint8 holds real held-out clips. Distances shrink as N and M grow: compare figures of
    the same N and M only.

    Returns:
        ``SA``, ``TC``, ``FQ`` and their ``mean`` in 0..100, higher is better; ``motion``, the distance that the digits'
        centres travel as a ratio to the reference's; ``first_frame_psnr`` in dB, averaged over clips, each at most 60.

    Raises:
        DataError: when shapes do not go together or a prompt is not one of the domain's.
    """
    _check(videos, prompts, first_frames, reference)
    wanted = parse_prompts(prompts)
    seen, real = judge.watch(videos), judge.watch(reference)
    figures = {
        "SA": semantic_alignment(seen, videos, wanted, first_frames),
        "TC": temporal_coherence(seen, videos, wanted, real),
        "FQ": frame_quality(seen, wanted, real),
    }
    travelled, of_real = (_travelled_pixels(each.centres[:, 0]) for each in (seen, real))
    figures |= {"mean": sum(figures.values()) / len(figures), "motion": travelled / max(of_real, 1e-9)}
    if first_frames is not None:
        figures["first_frame_psnr"] = float(psnr(videos[:, 0], first_frames).mean())
    return figures


def plain_figures(videos: np.ndarray, first_frames: np.ndarray | None, reference: np.ndarray) -> dict[str, float]:
    """The figures that need no judge, for any footage: arguments and shapes as for ``score``.

    ``motion`` is the mean absolute difference of neighbouring frames as a ratio to the reference's.
    """

    def change(clips: np.ndarray) -> float:
        return float(np.abs(np.diff(clips.astype(np.float32), axis=1)).mean())

    figures = {"motion": change(videos) / max(change(reference), 1e-9)}
    if first_frames is not None:
        figures["first_frame_psnr"] = float(psnr(videos[:, 0], first_frames).mean())
    return figures


def semantic_alignment(seen: Verdict, videos: np.ndarray, wanted: Wanted, first_frames: np.ndarray | None) -> float:
    """SA, 0..100: mean of up to three shares of the digits that the prompts name.

    Digit: the judge's guess over all frames is the prompt's. Motion, of those whose motion a prompt tells: the judge's
    guess of direction and pace is the prompt's. Subject, with ``first_frames``: the window that follows the digit
    correlates with the one in the first frame by at least ``SUBJECT_CORRELATION``, on average over the frames in which
    it is seen and both slightly blurred, as sharpness is FQ's business.
    """
    digit = seen.digit_logits.mean(dim=2).argmax(dim=-1) == wanted.digits
    motion = seen.motion_logits.argmax(dim=-1) == wanted.motions
    agreements = [digit[wanted.there]]
    if wanted.told.any():
        agreements.append(motion[wanted.told])
    if first_frames is not None:
        one_pass = torch.ones(())
        given = soften(_pixels(first_frames[:, None]), one_pass)
        template = _follow(given, ink_centres(_pixels(first_frames[:, None]))[0])
        windows = _follow(soften(_pixels(videos), one_pass), seen.centres)
        subject = _mean_where(_correlation(windows, template), _seen_whole(seen, wanted))
        agreements.append((subject >= SUBJECT_CORRELATION)[wanted.there])
    return 100 * float(np.mean([agreement.float().mean().item() for agreement in agreements]))


def temporal_coherence(seen: Verdict, videos: np.ndarray, wanted: Wanted, real: Verdict) -> float:
    """TC, 0..100: mean of three parts, each over the digits that the prompts name.

    Track: ``exp(-(r / TRACK_SCALE_PIXELS)^2)``, with ``r`` from ``track_residuals``. Appearance:
    ``exp(-(1 - c) / APPEARANCE_SCALE)``, with ``c`` the mean correlation of the window that follows the digit with its
    average over the clip. Both look only at frames in which the digit is seen whole. Distribution:
    ``exp(-d / CLIP_DISTANCE_SCALE)``, with ``d`` the Fréchet distance of the judge's clip features from the real
    clips', averaged over roles.
    """
    height, width = videos.shape[2:4]
    whole = _seen_whole(seen, wanted)
    residuals = track_residuals(
        seen.centres.flatten(0, 1).double().numpy(), whole.flatten(0, 1).numpy(), height, width
    ).reshape(wanted.there.shape)
    track = np.exp(-np.square(residuals[wanted.there.numpy()] / TRACK_SCALE_PIXELS)).mean()
    windows = _follow(_pixels(videos), seen.centres)
    shares = whole[..., None] / whole.sum(dim=-1).clamp(min=1)[..., None, None]
    average = (windows * shares).sum(dim=2, keepdim=True)
    constancy = _mean_where(_correlation(windows, average), whole)[wanted.there]
    appearance = torch.exp(-(1 - constancy) / APPEARANCE_SCALE).mean().item()
    distance = _distance_of_roles(seen.clip_features[:, :, None], real.clip_features[:, :, None], wanted)
    return 100 * float(track + appearance + np.exp(-distance / CLIP_DISTANCE_SCALE)) / 3


def frame_quality(seen: Verdict, wanted: Wanted, real: Verdict) -> float:
    """FQ, 0..100: ``exp(-d / FRAME_DISTANCE_SCALE)``, ``d`` the Fréchet distance of all frames' features.

    ``d`` is averaged over the roles that the prompts name.
    """
    distance = _distance_of_roles(seen.frame_features, real.frame_features, wanted)
    return 100 * float(np.exp(-distance / FRAME_DISTANCE_SCALE))


def _distance_of_roles(seen: Tensor, real: Tensor, wanted: Wanted) -> float:
    """Fréchet distance of features ``[N, R, T, D]`` from real ones ``[M, R, T, D]``, averaged over the roles."""
    distances = []
    for role in range(seen.shape[1]):
        mine = seen[wanted.there[:, role], role]
        if len(mine) < 2:
            continue
        # The frames of a clip share their handwriting: clips, not frames, are the independent samples.
        clips = min(len(mine), len(real))
        distances.append(frechet_distance(mine.flatten(0, 1), real[:, role].flatten(0, 1), samples=clips))
    return float(np.mean(distances))


def _seen_whole(seen: Verdict, wanted: Wanted) -> Tensor:
    """Frames in which a digit is seen whole, ``[N, R, T]`` bool: the one in front always, the one behind where the
    other is away."""
    away = (seen.centres[:, 0, :, 0] - seen.centres[:, 1, :, 0]).abs() >= HIDDEN_PIXELS
    return torch.stack([torch.ones_like(away), away | ~wanted.there[:, 1:]], dim=1)


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Mean over the last axis of ``values`` where ``where``; 0 where it is nowhere."""
    count = where.sum(dim=-1)
    return torch.where(count > 0, (values * where).sum(dim=-1) / count.clamp(min=1), 0.0)


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


def track_residuals(centres: np.ndarray, where: np.ndarray, height: int, width: int) -> np.ndarray:
    """Distance of each track from the nearest path the domain can draw: root mean square over frames, ``[N]`` pixels.

    A path runs along x at one speed of ``PACES`` and bounces off the walls, and keeps its height; its speed and start
    are fitted to ``centres [N, T, 2]`` in the frames ``where [N, T]``. A digit that stands still is on no path.
    """
    speeds = np.concatenate([np.linspace(*pace, 25) for pace in moving_digits.PACES.values()])
    free = width - moving_digits.DIGIT_PIXELS
    starts = np.arange(0, 2 * free, 0.5)
    unfolded = np.mod(starts[:, None] + speeds[:, None, None] * np.arange(centres.shape[1]), 2 * free)
    paths = np.minimum(unfolded, 2 * free - unfolded)
    residuals = np.zeros(len(centres))
    for index, (track, seen) in enumerate(zip(centres, where, strict=True)):
        if seen.sum() < 2:
            continue
        away = track[seen, 0] - paths[..., seen]
        away -= np.clip(away.mean(axis=-1, keepdims=True), *CENTRE_OFFSET_PIXELS)
        residuals[index] = np.sqrt(np.square(away).mean(axis=-1).min() + track[seen, 1].var())
    return residuals


def psnr(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of ``images [N, ...]`` against ``references``, uint8, ``[N]`` dB, capped at 60."""
    error = np.square(images.astype(np.float64) - references).reshape(len(images), -1).mean(axis=1)
    return np.minimum(10 * np.log10(255**2 / np.maximum(error, 1e-9)), PSNR_CAP_DECIBELS)


def parse_prompts(prompts: list[str]) -> Wanted:
    """What prompts of the embedded domain ask for.

    Raises:
        DataError: for a prompt that the domain does not write.
    """
    rows = []
    for prompt in prompts:
        match = PROMPT.fullmatch(prompt)
        if match is None:
            raise DataError(
                f"the judge cannot score the prompt {prompt!r}, only ones like "
                "'a red seven moving left fast in front of a green two': "
                "leave SA, TC and FQ out with evaluation.judge='' for other data",
                in_call=True,
            )
        front, behind = match.groups()[:3], match.groups()[3:]
        rows.append([*_said(front), *_said(behind if behind[0] else front), behind[0] is not None])
    said = torch.tensor(rows)
    named = torch.stack([torch.ones(len(said)), said[:, 6]], dim=1).bool()
    told = said[:, [2, 5]].bool() & named
    return Wanted(digits=said[:, [0, 3]], motions=said[:, [1, 4]], there=named, told=told)


def _said(words: tuple[str | None, ...]) -> tuple[int, int, bool]:
    name, *motion = words
    told = motion[0] is not None
    return moving_digits.DIGIT_NAMES.index(str(name)), MOTIONS.index(tuple(motion)) if told else 0, told


def _check(videos: np.ndarray, prompts: list[str], first_frames: np.ndarray | None, reference: np.ndarray) -> None:
    arrays = {"videos": (videos, 5), "reference": (reference, 5)}
    if first_frames is not None:
        arrays["first_frames"] = (first_frames, 4)
    for name, (array, axes) in arrays.items():
        if array.ndim != axes or array.shape[-1] != 3 or array.dtype != np.uint8:
            raise DataError(f"{name} must be uint8 with {axes} axes, RGB last; it is {array.dtype} {array.shape}")
    given = videos[:, 0].shape if first_frames is None else first_frames.shape
    if videos.shape[1:] != reference.shape[1:] or given != videos[:, 0].shape:
        raise DataError(
            f"videos {videos.shape}, first frames {given} and reference {reference.shape} "
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


def _travelled_pixels(centres: Tensor) -> float:
    return centres.diff(dim=1).norm(dim=-1).sum(dim=1).mean().item()


def _pixels(videos: np.ndarray) -> Tensor:
    return torch.from_numpy(videos).movedim(-1, 2) / 255


def _follow(clips: Tensor, centres: Tensor) -> Tensor:
    """Each role's ink in a window of ``CROP_PIXELS`` around ``centres [N, R, T, 2]``: ``[N, R, T, pixels]``.

    ``clips [N, T, 3, H, W]``; outside the canvas there is no ink.
    """
    ink = ink_of_roles(clips)
    height, width = ink.shape[-2:]
    steps = torch.arange(CROP_PIXELS) - (CROP_PIXELS - 1) / 2
    down, right = torch.meshgrid(steps, steps, indexing="ij")
    places = centres.flatten(0, 2)[:, None, None] + torch.stack([right, down], dim=-1)
    grid = (2 * places + 1) / torch.tensor([width, height]) - 1
    windows = F.grid_sample(ink.flatten(0, 2)[:, None], grid, align_corners=False)
    return windows.flatten(1).unflatten(0, centres.shape[:3])


def _correlation(windows: Tensor, templates: Tensor) -> Tensor:
    """Pearson correlation over the last axis; 0 for a blank window."""
    return F.cosine_similarity(
        windows - windows.mean(dim=-1, keepdim=True), templates - templates.mean(dim=-1, keepdim=True), dim=-1
    )
