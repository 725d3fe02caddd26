"""The figures watched in training have the values that can be said beforehand, and fall when a generator collapses."""

from __future__ import annotations

import numpy as np
import pytest

from pose_core.data import moving_digits
from pose_core.errors import DataError
from pose_core.evaluation.monitors import diversity, first_frame_fidelity, monitor, motion_degree
from pose_core.settings import Settings


def noise(seed: int, frames: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (2, frames, 8, 8, 3), dtype=np.uint8)


def test_motion_is_the_step_between_frames_up_or_down() -> None:
    ramp = np.zeros((1, 4, 2, 2, 3), np.uint8) + np.array([0, 10, 250, 240], np.uint8)[:, None, None, None]
    assert motion_degree(ramp) == pytest.approx((10 + 240 + 10) / 3)


def test_a_frozen_clip_has_no_motion() -> None:
    assert motion_degree(noise(0)[:, :1].repeat(5, axis=1)) == 0


def test_diversity_is_the_distance_between_two_noises_and_none_between_equal_samples() -> None:
    low, high = np.full((2, 3, 4, 4, 3), 5, np.uint8), np.full((2, 3, 4, 4, 3), 250, np.uint8)
    assert diversity(low, high) == diversity(high, low) == 245
    assert diversity(noise(0), noise(0)) == 0


def test_diversity_of_independent_uniform_noise_is_a_third_of_the_range() -> None:
    assert diversity(noise(0, 200), noise(1, 200)) == pytest.approx(256 / 3, rel=0.01)


def test_the_first_frame_alone_counts_for_its_fidelity() -> None:
    videos, given = np.full((2, 3, 4, 4, 3), 100, np.uint8), np.full((2, 4, 4, 3), 100, np.uint8)
    videos[:, 1:] = 0
    assert first_frame_fidelity(videos, given) == pytest.approx(1000)  # exact, capped at 60 dB
    videos[:, 0] = 105
    assert first_frame_fidelity(videos, given) == pytest.approx(255 / 5)
    videos[1, 0] = 120
    assert first_frame_fidelity(videos, given) == pytest.approx(255 / 10)  # decibels are averaged: 5 and 20 make 10


def test_both_samples_enter_and_text_to_video_has_no_first_frame() -> None:
    still, moving = np.zeros((1, 2, 2, 2, 3), np.uint8), np.zeros((1, 2, 2, 2, 3), np.uint8)
    moving[:, 1] = 30
    given = np.full((1, 2, 2, 3), 255, np.uint8)
    assert monitor(still, moving, given) == {"motion": 15, "diversity": 15, "first_frame_fidelity": 1}
    assert monitor(still, moving, None) == {"motion": 15, "diversity": 15}


def test_on_real_clips_each_collapse_falls_below_the_default_share() -> None:
    """Frozen clips, the same clip whatever the noise, blank clips; a slightly noisy clip is what is still healthy."""
    share = Settings().alarms.lowest_share
    rng = np.random.default_rng(3)
    clips = np.stack([moving_digits.render(moving_digits.draw_clip(rng)) for _ in range(8)])
    first, second = clips[:4], clips[4:]
    healthy = monitor(first, second, first[:, 0])
    frozen = first[:, :1].repeat(first.shape[1], axis=1)
    assert monitor(frozen, frozen, first[:, 0])["motion"] < share * healthy["motion"]
    assert monitor(first, first, first[:, 0])["diversity"] < share * healthy["diversity"]
    faithful = np.clip(first.astype(int) + np.random.default_rng(0).normal(0, 8, first.shape), 0, 255).astype(np.uint8)
    assert first_frame_fidelity(np.zeros_like(first), first[:, 0]) < share * first_frame_fidelity(faithful, first[:, 0])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: motion_degree(noise(0, 1)), "two frames or more"),
        (lambda: diversity(noise(0, 2), noise(0, 3)), "(2, 2, 8, 8, 3)"),
        (lambda: first_frame_fidelity(noise(0), noise(0)[:1, 0]), "(1, 8, 8, 3)"),
    ],
)
def test_shapes_that_do_not_go_together_are_named(call, named: str) -> None:
    with pytest.raises(DataError) as caught:
        call()
    assert named in str(caught.value)
