"""The embedded domain shows what its prompts say, inside the canvas, with handwriting of its own for each split."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest

from pose_core.data.captions import SPLITS
from pose_core.data.moving_digits import (
    CLEAR_PIXELS,
    COLOURS,
    DIGIT_NAMES,
    DIGIT_PIXELS,
    DIRECTIONS,
    EDITION,
    FRAMES,
    HEIGHT,
    LEVELS,
    PACES,
    TOLD_SHARE,
    WIDTH,
    DigitClip,
    Mover,
    draw_clip,
    every_prompt,
    positions,
    render,
)


def drawn(count: int, *, level: str = "two", split: str = "train", seed: int = 0) -> list[DigitClip]:
    rng = np.random.default_rng(seed)
    return [draw_clip(rng, level=level, split=split) for _ in range(count)]


def mover(**changes: object) -> Mover:
    return dataclasses.replace(Mover(1, 1, "right", "fast", x=0.0, y=0.0, speed=2.0), **changes)


def test_the_edition_stands_for_what_a_seed_draws() -> None:
    """Whoever changes what is drawn gives it a new edition, and this digest: old clips must not pass for new ones."""
    clips = [clip for level in LEVELS for split in SPLITS for clip in drawn(8, level=level, split=split)]
    digest = hashlib.sha256()
    for clip in clips:
        digest.update(f"{clip} {clip.prompt}".encode())
    assert (EDITION, digest.hexdigest()[:16]) == (2, "3eb49219ea113428")


def centre_of_mass(ink: np.ndarray) -> np.ndarray:
    """Centre of ``ink [T, H, W]`` in each frame: ``[T, 2]`` as (x, y) in pixels."""
    y, x = np.mgrid[: ink.shape[1], : ink.shape[2]]
    mass = ink.sum(axis=(1, 2))
    return np.stack([(ink * x).sum(axis=(1, 2)) / mass, (ink * y).sum(axis=(1, 2)) / mass], axis=1)


def test_no_two_splits_share_handwriting() -> None:
    used = [
        {mover.sample for clip in drawn(1500, split=split, seed=seed) for mover in clip.movers}
        for seed, split in enumerate(SPLITS)
    ]
    assert [len(each) > least for each, least in zip(used, (900, 150, 150), strict=True)] == [True] * 3
    assert not used[0] & used[1] and not used[0] & used[2] and not used[1] & used[2]


@pytest.mark.parametrize("split", SPLITS)
def test_each_split_shows_every_digit_and_motion_in_front_and_behind(split: str) -> None:
    clips = drawn(800, split=split)
    for movers in ([clip.front for clip in clips], [clip.behind for clip in clips]):
        assert {each.digit for each in movers} == set(range(10))
        assert {(each.direction, each.pace) for each in movers} == {(d, p) for d in DIRECTIONS for p in PACES}


def test_handwriting_is_of_the_digits_in_the_prompt() -> None:
    from sklearn.datasets import load_digits

    target = load_digits().target
    for clip in drawn(200):
        assert [target[each.sample] for each in clip.movers] == [each.digit for each in clip.movers]
        named = [word for word in clip.prompt.split() if word in DIGIT_NAMES]
        assert named == [DIGIT_NAMES[each.digit] for each in clip.movers]


def test_prompts_are_english_and_name_the_digit_in_front_first() -> None:
    clip = DigitClip(mover(digit=7, direction="left"), mover(digit=2, pace="slowly"))
    assert clip.prompt == "a red seven moving left fast in front of a green two moving right slowly"
    assert DigitClip(mover(digit=8)).prompt == "a red eight moving right fast"


def test_a_prompt_does_not_say_how_a_digit_moves_that_is_not_told() -> None:
    clip = DigitClip(mover(digit=7, told=False), mover(digit=2, direction="left", pace="slowly"))
    assert clip.prompt == "a red seven in front of a green two moving left slowly"


def test_motions_are_told_in_one_case_of_four_each_for_itself() -> None:
    told = np.array([[each.told for each in clip.movers] for clip in drawn(2000)])
    assert told.mean(axis=0) == pytest.approx(TOLD_SHARE, abs=0.03)
    assert told.all(axis=1).mean() == pytest.approx(TOLD_SHARE**2, abs=0.02)
    assert all(clip.front.told for clip in drawn(50, level="one"))


def test_every_word_of_any_prompt_is_in_the_prompts_that_make_the_vocabulary() -> None:
    words = {word for prompt in every_prompt() for word in prompt.split()}
    assert {word for clip in drawn(500) for word in clip.prompt.split()} <= words


def test_ink_moves_as_the_prompt_says_until_the_first_bounce() -> None:
    for clip in drawn(200, level="one"):
        moved = np.diff(centre_of_mass(render(clip)[..., 0].astype(float)), axis=0)
        steps = np.diff(positions(clip.front, FRAMES, HEIGHT, WIDTH), axis=0)
        expected = np.array([DIRECTIONS[clip.front.direction] * clip.front.speed, 0])
        assert clip.front.pace in clip.prompt and clip.front.direction in clip.prompt
        bounced = np.flatnonzero(np.abs(steps - expected).max(axis=1) > 1e-9)
        before = slice(0, bounced[0] if len(bounced) else FRAMES - 1)
        assert np.abs(moved[before] - expected).max() < 0.1, clip


def test_the_named_direction_shows_before_any_bounce() -> None:
    for each in (each for clip in drawn(500) for each in clip.movers):
        first_steps = np.diff(positions(each, 3, HEIGHT, WIDTH), axis=0)[:, 0]
        assert first_steps == pytest.approx([DIRECTIONS[each.direction] * each.speed] * 2)


def test_both_digits_are_seen_whole_in_the_first_frame() -> None:
    for clip in drawn(300):
        (left, _), (right, _) = (positions(each, 1, HEIGHT, WIDTH)[0] for each in clip.movers)
        assert abs(left - right) >= CLEAR_PIXELS


def test_many_digits_pass_each_other() -> None:
    """In at least a third of the clips the digit that starts on the left ends on the right of the other."""
    ways = [[positions(each, FRAMES, HEIGHT, WIDTH)[:, 0] for each in clip.movers] for clip in drawn(300)]
    crossed = [np.sign(a[0] - b[0]) != np.sign(a - b).min() or np.ptp(np.sign(a - b)) > 0 for a, b in ways]
    assert np.mean(crossed) > 1 / 3


def ink(digit: Mover) -> np.ndarray:
    """How much of each pixel a digit covers, ``[frames, height, width, 1]`` in [0, 1]."""
    return render(DigitClip(digit))[..., :1] / 255


def test_the_red_digit_covers_the_green_one_by_its_ink() -> None:
    front, behind = mover(digit=0, sample=0), mover(digit=1, sample=1)
    red, green = (np.array(colour) for colour in COLOURS.values())
    expected = ink(front) * red + (1 - ink(front)) * ink(behind) * green
    assert (np.minimum(ink(front), ink(behind)) > 0.3).any()
    assert render(DigitClip(front, behind)) == pytest.approx(255 * expected, abs=2)


@pytest.mark.parametrize(("height", "width"), [(16, 32), (24, 48), (12, 40)])
def test_digits_stay_inside_the_canvas(height: int, width: int) -> None:
    for each in (each for clip in drawn(300) for each in clip.movers):
        corners = positions(each, 60, height, width)
        assert corners.min() >= 0
        assert (corners <= np.array([width, height]) - DIGIT_PIXELS).all()


def test_no_ink_is_lost_on_the_way() -> None:
    for clip in drawn(50, level="one"):
        total = ink(clip.front).sum(axis=(1, 2, 3))
        assert total == pytest.approx(total[0], rel=0.01)


def test_a_digit_that_meets_the_wall_comes_back() -> None:
    assert positions(mover(x=0.8), 6, HEIGHT, WIDTH)[:, 0].tolist() == [16, 18, 20, 18, 16, 14]


def test_speeds_are_those_of_their_pace() -> None:
    for each in (each for clip in drawn(300) for each in clip.movers):
        slowest, fastest = PACES[each.pace]
        assert slowest <= each.speed <= fastest


def test_drawing_and_rendering_are_deterministic() -> None:
    assert drawn(20) == drawn(20) != drawn(20, seed=1)
    clip = drawn(1)[0]
    frames = render(clip, 9, 24, 40)
    assert frames.shape == (9, 24, 40, 3) and frames.dtype == np.uint8
    assert np.array_equal(frames, render(clip, 9, 24, 40))
