"""Figures that are cheap enough to watch while a phase trains; a generator that collapses shows in one of them.

All of them are higher where a generator is healthier, so that a share of the teacher's value means something.
"""

from __future__ import annotations

import numpy as np

from pose_core.errors import DataError
from pose_core.evaluation.metrics import psnr


def monitor(first: np.ndarray, second: np.ndarray, first_frames: np.ndarray | None) -> dict[str, float]:
    """``motion``, ``diversity`` and, for image to video, ``first_frame_fidelity`` of two samples of a condition.

    ``first`` and ``second [N, T, H, W, 3]`` uint8 come from two noises; ``first_frames [N, H, W, 3]`` uint8 is what
    they were given to begin with, None for text to video.

    Raises:
        DataError: when shapes do not go together.
    """
    figures = {
        "motion": (motion_degree(first) + motion_degree(second)) / 2,
        "diversity": diversity(first, second),
    }
    if first_frames is not None:
        both = first_frame_fidelity(first, first_frames), first_frame_fidelity(second, first_frames)
        figures["first_frame_fidelity"] = sum(both) / 2
    return figures


def motion_degree(videos: np.ndarray) -> float:
    """Mean absolute difference of neighbouring frames, 0..255; ``videos [N, T, H, W, 3]`` uint8, ``T`` at least 2.

    Raises:
        DataError: for clips of a single frame.
    """
    if videos.ndim != 5 or videos.shape[1] < 2:
        raise DataError(f"motion needs videos [N, T, H, W, 3] of two frames or more, these are {videos.shape}")
    return float(np.abs(np.diff(videos.astype(np.int16), axis=1)).mean())


def diversity(first: np.ndarray, second: np.ndarray) -> float:
    """Mean absolute difference, 0..255, between samples ``[N, T, H, W, 3]`` uint8 of two noises, pair by pair.

    Raises:
        DataError: when the two are not of one shape.
    """
    if first.shape != second.shape:
        raise DataError(f"diversity compares samples pair by pair, these are {first.shape} and {second.shape}")
    return float(np.abs(first.astype(np.int16) - second).mean())


def first_frame_fidelity(videos: np.ndarray, first_frames: np.ndarray) -> float:
    """How faithful the first frames of ``videos [N, T, H, W, 3]`` are to ``first_frames [N, H, W, 3]``, both uint8.

    ``10^(PSNR / 20)`` with the mean PSNR over clips, each at most 60 dB: the range of a pixel over the error, 32 at
    30 dB. Half of it is twice the error, where half of the decibels would be an error six times as large.

    Raises:
        DataError: when shapes do not go together.
    """
    if videos[:, 0].shape != first_frames.shape:
        raise DataError(f"first frames {first_frames.shape} do not fit videos {videos.shape}")
    return float(10 ** (psnr(videos[:, 0], first_frames).mean() / 20))
