"""Which real clips stand against which, and what is scored where there is no judge."""

from __future__ import annotations

import numpy as np
import pytest

from pose_core.errors import CheckpointError
from pose_core.evaluation.scoring import scorer, with_reference


@pytest.mark.parametrize(
    ("there", "clips", "generated", "reference"),
    [
        (8, 3, [0, 1, 2], [3, 4, 5]),
        (5, 4, [0, 1, 2, 3], [0, 1, 2, 3]),
        (6, 4, [0, 1, 2, 3], [4, 5]),
        (3, 4, [0, 1, 2], [0, 1, 2]),
    ],
)
def test_the_reference_is_other_clips_where_there_are_enough(
    there: int, clips: int, generated: list[int], reference: list[int]
) -> None:
    first, second = with_reference(np.arange(there), clips)
    assert (first.tolist(), second.tolist()) == (generated, reference)


def test_without_a_judge_the_figures_are_those_that_need_none() -> None:
    videos = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3), dtype=np.uint8)
    figures = scorer("", ["any words", "at all"], videos[:, 0], videos)(videos)
    assert figures == {"motion": 1, "first_frame_psnr": 60}


def test_a_judge_that_is_not_there_is_named() -> None:
    with pytest.raises(CheckpointError, match="evaluation.judge=teachers/nobody is no folder"):
        scorer("teachers/nobody", [], np.zeros(0), np.zeros(0))
