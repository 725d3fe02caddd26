"""The embedded domain shows what its prompts say, inside the canvas, with handwriting of its own for each split."""

from __future__ import annotations

import numpy as np
import pytest

from pose_core.data.moving_digits import (
    DIGIT_NAMES,
    DIGIT_PIXELS,
    DIRECTIONS,
    SPEED_PIXELS,
    DigitClip,
    draw_clip,
    positions,
    render,
)

FRAMES = 9


def drawn(count: int, *, heldout: bool = False, seed: int = 0) -> list[DigitClip]:
    rng = np.random.default_rng(seed)
    return [draw_clip(rng, heldout=heldout) for _ in range(count)]


def centre_of_mass(frames: np.ndarray) -> np.ndarray:
    """Centre of the ink in each frame of uint8 ``[T, H, W, 3]``: ``[T, 2]`` as (x, y) in pixels."""
    ink = frames[..., 0].astype(np.float64)
    y, x = np.mgrid[: ink.shape[1], : ink.shape[2]]
    mass = ink.sum(axis=(1, 2))
    return np.stack([(ink * x).sum(axis=(1, 2)) / mass, (ink * y).sum(axis=(1, 2)) / mass], axis=1)


def test_training_and_heldout_handwriting_are_disjoint() -> None:
    train = {clip.sample for clip in drawn(2000)}
    heldout = {clip.sample for clip in drawn(1500, heldout=True, seed=1)}
    assert len(train) > 900 and len(heldout) > 250
    assert not train & heldout


def test_heldout_clips_show_every_digit_and_direction() -> None:
    clips = drawn(600, heldout=True)
    assert {clip.digit for clip in clips} == set(range(10))
    assert {clip.direction for clip in clips} == set(DIRECTIONS)


def test_handwriting_is_of_the_digit_in_the_prompt() -> None:
    from sklearn.datasets import load_digits

    target = load_digits().target
    for clip in drawn(200):
        assert target[clip.sample] == clip.digit
        assert clip.prompt.split()[1] == DIGIT_NAMES[clip.digit]


def test_prompts_are_english() -> None:
    assert DigitClip(8, 0, "up", 0.5, 0.5, 2.0).prompt == "an eight moving up"
    assert DigitClip(7, 0, "up and left", 0.5, 0.5, 2.0).prompt == "a seven moving up and left"


def test_ink_moves_as_the_prompt_says_until_the_first_bounce() -> None:
    for clip in drawn(200):
        name = clip.prompt.split(" moving ")[1]
        moved = np.diff(centre_of_mass(render(clip, FRAMES)), axis=0)
        steps = np.diff(positions(clip, FRAMES, 32, 32), axis=0)
        expected = np.array(DIRECTIONS[name]) * clip.speed
        bounced = np.flatnonzero(np.abs(steps - expected).max(axis=1) > 1e-9)
        before = slice(0, bounced[0] if len(bounced) else FRAMES - 1)
        assert np.abs(moved[before] - expected).max() < 0.1, clip


def test_the_named_direction_shows_before_any_bounce() -> None:
    for clip in drawn(500):
        first_steps = np.diff(positions(clip, 3, 32, 32), axis=0)
        assert first_steps == pytest.approx(np.tile(np.array(DIRECTIONS[clip.direction]) * clip.speed, (2, 1)))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 48), (17, 17)])
def test_digits_stay_inside_the_canvas(height: int, width: int) -> None:
    for clip in drawn(300):
        corners = positions(clip, 60, height, width)
        assert corners.min() >= 0
        assert (corners <= np.array([width, height]) - DIGIT_PIXELS).all()


def test_no_ink_is_lost_on_the_way() -> None:
    for clip in drawn(50):
        ink = render(clip, 20)[..., 0].sum(axis=(1, 2), dtype=np.int64)
        assert ink == pytest.approx(ink[0], rel=0.01)


def test_a_digit_that_meets_the_wall_comes_back() -> None:
    clip = DigitClip(digit=1, sample=1, direction="right", x=0.75, y=0.0, speed=2.0)
    assert positions(clip, 6, 32, 32)[:, 0].tolist() == [12, 14, 16, 14, 12, 10]


def test_speeds_are_within_their_range() -> None:
    speeds = [clip.speed for clip in drawn(500)]
    assert SPEED_PIXELS[0] <= min(speeds) < max(speeds) <= SPEED_PIXELS[1]


def test_drawing_and_rendering_are_deterministic() -> None:
    assert drawn(20) == drawn(20) != drawn(20, seed=1)
    clip = drawn(1)[0]
    frames = render(clip, FRAMES, 24, 40)
    assert frames.shape == (FRAMES, 24, 40, 3) and frames.dtype == np.uint8
    assert np.array_equal(frames, render(clip, FRAMES, 24, 40))
