"""Which figures generated clips can have, and which real clips they are measured against."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pose_core.errors import CheckpointError
from pose_core.evaluation.judge import Judge
from pose_core.evaluation.metrics import plain_figures, score
from pose_core.models.folders import find_folder


def with_reference(videos: np.ndarray, clips: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ``clips`` of real ``videos [N, T, H, W, 3]``, and as many others as reference.

    Where there are fewer than half as many others, the reference is the first ones themselves.
    """
    count = min(clips, len(videos))
    generated, reference = videos[:count], videos[count : 2 * clips]
    return generated, generated if len(reference) < count // 2 else reference


def scorer(
    judge: str, prompts: list[str], first_frames: np.ndarray | None, reference: np.ndarray
) -> Callable[[np.ndarray], dict[str, float]]:
    """Scores videos with the judge in the folder of that name, or without a name by what needs no network.

    Arguments and figures as for ``metrics.score``.

    Raises:
        CheckpointError: there is no such folder, or the judge in it does not load (correctable in the call).
    """
    if not judge:
        return lambda videos: plain_figures(videos, first_frames, reference)
    folder = find_folder(judge)
    if folder is None:
        raise CheckpointError(f"evaluation.judge={judge} is no folder: name one, or leave it empty", in_call=True)
    loaded = Judge.load(folder)
    return lambda videos: score(loaded, videos, prompts, first_frames, reference)
