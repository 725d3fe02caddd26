"""Does a video move, stay with its first frame, and stay calm? Measured on pixels, without any trained network.

The flow between neighbouring frames is Lucas and Kanade's, coarse to fine. Its largest values say whether a video moves
(the rule is VBench's for dynamic degree, which has RAFT for the flow), what it leaves unexplained is flicker. Figures
compare videos of the same prompts; they are not VBench's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pose_core.errors import DataError

SIDE_PIXELS = 128
"""Shorter side that the flow is found at; smaller videos are enlarged, larger ones reduced."""
FRAMES_PER_SECOND = 8.0
"""Rate that motion is looked at, as VBench does; faster videos are thinned out to about it."""
DYNAMIC_SHARE_OF_SIDE = 6 / 256
"""Way of the moving part between two such frames, over the shorter side, from which on VBench calls them dynamic."""
DYNAMIC_PAIRS, OF_FRAMES = 4, 16
"""A video is dynamic when so many pairs in so many frames are."""
MOVING_PART = 0.05
"""Share of the pixels, the fastest ones, whose mean speed is a pair's."""
STILL_SHARE_OF_SIDE = 0.25 / SIDE_PIXELS
"""Speed below which a video is a still picture: less than the flow can tell from coding noise."""
WINDOW, COARSEST_SIDE, ITERATIONS, FLAT, EXPLAINED = 7, 16, 5, 4.0, 0.5
"""Of the flow: side of the window, of the coarsest picture, steps a scale, and squared gradient that counts as flat."""
PAIRS_AT_ONCE = 4
"""Pairs of frames that the flow is found of together: one by one takes half as long again, more leave the cache."""
LUMA = torch.tensor([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Motion:
    """Figures of one video."""

    speed: float
    """Of the moving part, in shorter sides a second, averaged over pairs of frames."""
    dynamic: bool
    """Whether enough pairs are faster than VBench's threshold."""
    still: bool
    """Whether nothing moves."""
    first_frame_drift: float
    """How far pixel values drift from the first frame's, in grey levels (0..255), averaged over the later frames.

    The distance of the two distributions of values, channel by channel (Wasserstein-1): moving things leaves it at 0;
    fading, a colour cast or a vanished subject do not."""
    flicker: float
    """Mean change, in grey levels, between neighbouring frames that no motion explains."""


@torch.no_grad()
def measure(video: np.ndarray, frames_per_second: float, first_frame: np.ndarray | None = None) -> Motion:
    """Figures of ``video [T, H, W, 3]`` uint8 with two frames or more.

    ``first_frame [H, W, 3]`` uint8 is what it was to begin with, if that is known; else it is the video's own.

    Raises:
        DataError: another shape or type.
    """
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or len(video) < 2:
        raise DataError(f"motion needs a video [T, H, W, 3] of two frames or more, this is {video.dtype} {video.shape}")
    start = video[0] if first_frame is None else first_frame
    drift = fmean(_drift(frame, start) for frame in video[1:])
    step = max(1, round(frames_per_second / FRAMES_PER_SECOND))
    step = min(step, len(video) - 1)  # a video may be shorter than a step
    seen = torch.stack([_grey(frame) for frame in video[::step]])
    speeds, flickers = [], []
    for start_pair in range(0, len(seen) - 1, PAIRS_AT_ONCE):
        some = seen[start_pair : start_pair + PAIRS_AT_ONCE + 1]
        speed, flicker = _pairs(some[:-1], some[1:])
        speeds += speed
        flickers += flicker
    wanted = max(1, round(DYNAMIC_PAIRS * (len(speeds) + 1) / OF_FRAMES))
    return Motion(
        speed=fmean(speeds) * frames_per_second / step,
        dynamic=sum(speed > DYNAMIC_SHARE_OF_SIDE for speed in speeds) >= wanted,
        still=max(speeds) < STILL_SHARE_OF_SIDE,
        first_frame_drift=drift,
        flicker=fmean(flickers),
    )


def summarise(videos: Iterable[Motion]) -> dict[str, float]:
    """``videos``, their number, and over them ``dynamic_degree`` and ``still`` in per cent, and the mean of ``speed``,
    ``first_frame_drift`` and ``flicker``.

    Raises:
        DataError: there are none.
    """
    found = list(videos)
    if not found:
        raise DataError("there is no video to measure")
    return {
        "videos": len(found),
        "dynamic_degree": 100 * fmean(each.dynamic for each in found),
        "still": 100 * fmean(each.still for each in found),
        "speed": fmean(each.speed for each in found),
        "first_frame_drift": fmean(each.first_frame_drift for each in found),
        "flicker": fmean(each.flicker for each in found),
    }


def collapsed(summaries: Sequence[dict[str, float]], lowest_share: float) -> list[bool]:
    """Which of them move less than ``lowest_share`` of what the first does: motion has collapsed there."""
    return [each["speed"] < lowest_share * summaries[0]["speed"] for each in summaries]


def optical_flow(before: Tensor, after: Tensor) -> Tensor:
    """Flow ``[N, 2, H, W]`` in pixels, x and y: ``after[y + flow_y, x + flow_x]`` shows what ``before[y, x]`` does.

    ``before`` and ``after`` are N grey pictures ``[N, H, W]``, 0..255. Lucas and Kanade's least squares in a window
    whose brightness may change, iterated from coarse to fine. Where the flow explains less than ``EXPLAINED`` of a
    window's change (noise, what comes into sight), it is 0: a flow must earn its place.
    """
    pyramid = [(before[:, None], after[:, None])]
    while min(pyramid[-1][0].shape[-2:]) >= 2 * COARSEST_SIDE:
        pyramid.append(tuple(F.avg_pool2d(picture, 2) for picture in pyramid[-1]))  # type: ignore[arg-type]
    flow = torch.zeros(len(before), 2, *pyramid[-1][0].shape[-2:])
    for first, second in reversed(pyramid):
        if flow.shape[-2:] != first.shape[-2:]:
            flow = 2 * F.interpolate(flow, first.shape[-2:], mode="bilinear", align_corners=False)
        for _ in range(ITERATIONS):
            flow = _solve(first, _warp(second, flow), flow)
    first, second = pyramid[0]
    change, rest = (_covariance(each, each) for each in (second - first, _warp(second, flow) - first))
    return torch.where(rest < (1 - EXPLAINED) * change, flow, 0.0)


def _pairs(before: Tensor, after: Tensor) -> tuple[list[float], list[float]]:
    """Way of the fastest part in shorter sides, and mean unexplained change, of N grey pairs ``[N, H, W]``."""
    height, width = before.shape[-2:]
    scale = SIDE_PIXELS / min(height, width)
    size = (round(height * scale), round(width * scale))
    small = [_resize(picture, size) for picture in (before, after)]
    flow = optical_flow(*small)
    speeds = flow.square().sum(1).sqrt().flatten(1)
    fastest = speeds.topk(max(1, round(MOVING_PART * speeds.shape[1]))).values.mean(1) / SIDE_PIXELS
    back = F.interpolate(flow / scale, (height, width), mode="bilinear", align_corners=False)
    moved = (_warp(after[:, None], back)[:, 0] - before).abs()
    return fastest.tolist(), torch.minimum(moved, (after - before).abs()).mean((1, 2)).tolist()


def _solve(first: Tensor, second: Tensor, flow: Tensor) -> Tensor:
    """The flow ``[N, 2, H, W]`` of least squares, given ``second [N, 1, H, W]`` as read along ``flow``.

    One flow a window has to explain what is left and what its pixels' own flows have explained, else neighbours drift
    apart and the iteration diverges.
    """
    middle = F.pad((first + second) / 2, (1, 1, 1, 1), mode="replicate")
    x = (middle[..., 1:-1, 2:] - middle[..., 1:-1, :-2]) / 2
    y = (middle[..., 2:, 1:-1] - middle[..., :-2, 1:-1]) / 2
    change = x * flow[:, :1] + y * flow[:, 1:] - (second - first)
    # Covariances, not moments: so a window that grows brighter as a whole is no motion.
    found = _covariance(torch.cat([x, y, x, x, y], dim=1), torch.cat([x, y, y, change, change], dim=1))
    xx, yy, xy, xt, yt = found.split(1, dim=1)
    around = FLAT * _mean(flow)
    xx, yy, xt, yt = xx + FLAT, yy + FLAT, xt + around[:, :1], yt + around[:, 1:]
    return torch.cat([yy * xt - xy * yt, xx * yt - xy * xt], dim=1) / (xx * yy - xy.square())


def _covariance(first: Tensor, second: Tensor) -> Tensor:
    return _mean(first * second) - _mean(first) * _mean(second)


def _mean(picture: Tensor) -> Tensor:
    """Mean of the window around each pixel, of what of it lies inside; ``avg_pool2d`` takes several times as long."""
    sums, counts = picture, torch.ones_like(picture[:1, :1])
    for dim in (2, 3):
        sums, counts = _window_sum(sums, dim), _window_sum(counts, dim)
    return sums / counts


def _window_sum(picture: Tensor, dim: int) -> Tensor:
    reach, length = WINDOW // 2, picture.shape[dim]
    padded = F.pad(picture, (0, 0, reach, reach) if dim == 2 else (reach, reach, 0, 0))
    total = padded.narrow(dim, 0, length).clone()
    for offset in range(1, WINDOW):
        total += padded.narrow(dim, offset, length)
    return total


def _warp(picture: Tensor, flow: Tensor) -> Tensor:
    """``picture [N, 1, H, W]`` read at ``flow [N, 2, H, W]`` pixels from each place."""
    height, width = picture.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([x + flow[:, 0], y + flow[:, 1]], dim=-1)
    grid = (2 * places + 1) / torch.tensor([width, height]) - 1
    return F.grid_sample(picture, grid, padding_mode="border", align_corners=False)


def _resize(picture: Tensor, size: tuple[int, int]) -> Tensor:
    mode = "area" if size[0] < picture.shape[-2] else "bilinear"
    return F.interpolate(picture[:, None], size, mode=mode)[:, 0]


def _grey(frame: np.ndarray) -> Tensor:
    return torch.from_numpy(frame).float() @ LUMA


def _drift(frame: np.ndarray, start: np.ndarray) -> float:
    """Mean over channels of the Wasserstein-1 distance of two pictures' values; their sizes may differ."""
    steps = [np.cumsum(_histogram(frame[..., c]) - _histogram(start[..., c])) for c in range(3)]
    return float(np.abs(steps).sum(axis=1).mean())


def _histogram(channel: np.ndarray) -> np.ndarray:
    return np.bincount(channel.reshape(-1), minlength=256) / channel.size
