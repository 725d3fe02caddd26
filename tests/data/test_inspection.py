"""Shots, clips and measures of videos whose content is known."""

from __future__ import annotations

import footage
import numpy as np
import pytest

from pose_core.data.buckets import Bucket
from pose_core.data.inspection import InspectionRules, Measures, inspect_video, perceptual_hash

BUCKET = Bucket(9, 32, 32, 8.0)
RULES = InspectionRules((BUCKET,))


def measured(frames: np.ndarray, rules: InspectionRules = RULES) -> Measures:
    inspected = inspect_video(footage.encode(frames), rules)
    assert inspected.problem == ""
    return inspected.clips[0]


def problem(frames: np.ndarray, **rules: float) -> str:
    return inspect_video(footage.encode(frames), InspectionRules((BUCKET,), **rules)).problem  # type: ignore[arg-type]


def test_a_video_is_described_as_shown() -> None:
    wide = footage.moving_square(0, 12, 32, 64)
    inspected = inspect_video(footage.encode(wide, rotation=90), RULES)
    assert (inspected.height, inspected.width) == (64, 32)
    assert inspected.rate == pytest.approx(8) and inspected.seconds == pytest.approx(1.5)
    assert inspected.shots == 1 and inspected.clips[0].cropped_share == 0.5


def test_no_clip_crosses_a_cut() -> None:
    # Large enough that no square leaves at one side to come in at the other, which is a cut too.
    parts = [footage.moving_square(seed, frames, 128, 128) for seed, frames in ((0, 12), (1, 11), (2, 20))]
    rules = InspectionRules((BUCKET,), clips_per_video=9, shot_threshold=3.0)
    inspected = inspect_video(footage.encode(np.concatenate(parts)), rules)
    assert inspected.shots == 3
    assert [round(clip.start * 8) for clip in inspected.clips] == [0, 12, 23, 32]
    blind = inspect_video(footage.encode(np.concatenate(parts)), InspectionRules((BUCKET,), clips_per_video=9))
    assert [round(clip.start * 8) for clip in blind.clips] == [0, 9, 18, 27]


def test_a_video_of_short_shots_is_short() -> None:
    parts = np.concatenate([footage.moving_square(seed, 6) for seed in range(4)])
    assert problem(parts, shot_threshold=3.0) == "filter: short, 6 of 9 frames at 8 a second in its longest shot"
    assert problem(parts) == ""


def test_clips_take_the_longest_bucket_that_is_left() -> None:
    rules = InspectionRules((BUCKET, Bucket(17, 32, 32, 8.0)), clips_per_video=9)
    inspected = inspect_video(footage.encode(footage.moving_square(0, 28)), rules)
    assert [(clip.bucket, round(clip.start * 8)) for clip in inspected.clips] == [("17x32x32", 0), ("9x32x32", 17)]


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ({"min_side_pixels": 33}, "filter: small, 32 x 32"),
        ({"min_seconds": 2.5}, "filter: short, 2.00 seconds"),
        ({"max_seconds": 1.9}, "filter: long, 2.00 seconds"),
        ({"min_source_rate": 9}, "filter: slow, 8.00 frames a second"),
        ({"max_source_rate": 7}, "filter: fast, 8.00 frames a second"),
    ],
)
def test_videos_refused_as_a_whole(rules: dict[str, float], reason: str) -> None:
    frames = footage.moving_square(0, 16)
    assert problem(frames, **rules) == reason
    assert problem(frames) == ""


def test_black_and_blank() -> None:
    frames = footage.moving_square(0)
    assert measured(frames).black_share == 0 and measured(frames).brightness_range > 60
    frames[3:] = 0
    assert measured(frames).black_share == pytest.approx(6 / 9, abs=1e-3)
    assert measured(np.full((9, 32, 32, 3), 90, np.uint8)).brightness_range == 0


def test_frozen_frames_are_those_of_the_source_that_repeat() -> None:
    frames = footage.moving_square(0)
    assert measured(frames).frozen_share == 0
    frames[5:] = frames[4]
    assert measured(frames).frozen_share == 0.5
    slow = footage.encode(footage.moving_square(0, 6), times=np.arange(6) / 4)
    assert inspect_video(slow, RULES).clips[0].frozen_share == 0, "a slow source repeats frames of ours, not its own"


def test_motion_is_the_mean_difference_between_frames() -> None:
    frames = np.zeros((9, 32, 32, 3), np.uint8)
    frames[1::2] = 100
    assert measured(frames).motion == pytest.approx(100, abs=2)
    assert measured(footage.moving_square(0)[:1].repeat(9, 0)).motion < 0.1


def bits_between(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


def test_the_hash_knows_a_clip_again_and_tells_others_apart() -> None:
    large = footage.moving_square(4, 9, 128, 128)
    dimmed = (large * 0.8 + 20).astype(np.uint8)
    small = large[:, ::2, ::2]
    first = measured(large).hash
    assert len(first) == 48
    assert bits_between(first, measured(dimmed).hash) <= 16
    assert bits_between(first, measured(small).hash) <= 16
    others = [measured(footage.moving_square(seed, 9, 128, 128)).hash for seed in range(5, 15)]
    assert min(bits_between(first, other) for other in others) > 24


def test_the_hash_of_a_picture_is_of_its_shapes() -> None:
    y, x = np.mgrid[:40, :60] / 40
    picture = 100 + 40 * np.sin(5 * x) + 30 * np.cos(7 * y + 3 * x) + 20 * np.sin(11 * x * y)
    assert bits_between(perceptual_hash(picture), perceptual_hash(picture / 2 + 30)) <= 4
    assert bits_between(perceptual_hash(picture), perceptual_hash(picture[:, ::-1])) > 12
