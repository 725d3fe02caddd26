"""Motion, drift and flicker are told apart: each is made alone, and only its own figure answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pose_core.errors import DataError
from pose_core.evaluation.motion import SIDE_PIXELS, Motion, collapsed, measure, optical_flow, summarise

RATE = 8.0


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth random picture ``[H, W, 3]``, float, that repeats at its edges."""
    noise = np.random.default_rng(seed).standard_normal((height, width))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    smooth = np.fft.ifft2(np.fft.fft2(noise) * np.exp(-((frequency / 0.06) ** 2))).real
    return np.repeat((128 + 40 * smooth / smooth.std())[..., None], 3, axis=-1)


def video(frames: list[np.ndarray]) -> np.ndarray:
    return np.stack(frames).clip(0, 255).round().astype(np.uint8)


def panned(frames: int, pixels: int, size: tuple[int, int] = (128, 160)) -> np.ndarray:
    """A view of ``size`` that moves over a larger picture by ``pixels`` a frame."""
    height, width = size
    picture = texture(height, width + pixels * frames)
    return video([picture[:, index * pixels : index * pixels + width] for index in range(frames)])


STILL = video([texture(128, 160)] * 9)


@pytest.mark.parametrize(("x", "y"), [(1, 0), (3, -2), (0, 9), (-14, 5)])
def test_the_flow_of_a_shifted_picture_is_its_shift(x: int, y: int) -> None:
    before = texture(128, 160)[..., 0]
    after = np.roll(before, (y, x), axis=(0, 1))
    flow = optical_flow(torch.tensor(before)[None].float(), torch.tensor(after)[None].float())[0]
    inside = flow[:, 24:-24, 24:-24].flatten(1).median(dim=1).values
    assert torch.allclose(inside, torch.tensor([x, y]).float(), atol=0.1)


def test_a_still_picture_is_seen_as_one() -> None:
    assert measure(STILL, RATE) == Motion(0, False, True, 0, 0)


def test_a_moving_picture_moves_and_neither_drifts_nor_flickers() -> None:
    moving = panned(9, 4)
    found = measure(moving, RATE)
    raw = np.abs(np.diff(moving.astype(int), axis=0)).mean()
    assert found.dynamic and not found.still
    # The fastest twentieth of the flow; the flow's middle is exact, see above.
    assert found.speed == pytest.approx(4 / SIDE_PIXELS * RATE, rel=0.2)
    assert found.flicker < 0.1 * raw
    around = video([np.roll(moving[0], 4 * index, axis=1) for index in range(9)])  # nothing comes into sight
    assert measure(around, RATE).first_frame_drift == 0


def test_speed_is_in_sides_a_second_whatever_the_size_and_the_rate() -> None:
    speeds = [
        measure(panned(9, 4), RATE).speed,
        measure(panned(9, 8, (256, 320)), RATE).speed,
        measure(panned(9, 2, (64, 80)), RATE).speed,
        measure(panned(25, 1), 4 * RATE).speed,
    ]
    assert speeds == pytest.approx([speeds[0]] * 4, rel=0.15)


def test_a_small_moving_part_makes_a_video_dynamic() -> None:
    """As VBench has it: the fastest twentieth of the pixels decides."""
    background, frames = texture(128, 160), []
    for index in range(9):
        frame = background.copy()
        frame[40:80, 8 + 6 * index : 48 + 6 * index] = texture(40, 40, seed=1)
        frames.append(frame)
    assert measure(video(frames), RATE).dynamic


def test_a_slow_video_is_neither_dynamic_nor_still() -> None:
    found = measure(panned(9, 1), RATE)
    assert not found.dynamic and not found.still


def test_flicker_of_the_light_is_no_motion() -> None:
    picture = texture(128, 160)
    found = measure(video([picture + 8 * (-1) ** index for index in range(9)]), RATE)
    assert found.still and not found.dynamic
    assert found.flicker == pytest.approx(16, rel=0.05)


def test_flicker_of_single_pixels_is_no_motion() -> None:
    noise = np.random.default_rng(0)
    picture = texture(128, 160)
    found = measure(video([picture + 6 * noise.standard_normal(picture.shape) for _ in range(9)]), RATE)
    assert not found.dynamic and found.flicker > 2


def test_drift_is_how_far_values_go_from_the_first_frame() -> None:
    picture = texture(128, 160).clip(30, 200)
    found = measure(video([picture.round() + 3 * index for index in range(5)]), RATE)
    assert found.first_frame_drift == pytest.approx(3 * (1 + 2 + 3 + 4) / 4)
    assert found.still


def test_a_given_first_frame_takes_the_place_of_the_videos_own() -> None:
    given = (STILL[0].astype(int) - 5).clip(0, 255).astype(np.uint8)
    assert measure(STILL, RATE, given).first_frame_drift == pytest.approx(5, abs=0.1)


def test_small_clips_are_measured_too() -> None:
    dot = np.zeros((16, 32, 3))
    frames = []
    for index in range(9):
        frame = dot.copy()
        frame[5:10, 2 + 2 * index : 7 + 2 * index] = 220
        frames.append(frame)
    assert measure(video(frames), RATE).dynamic
    assert measure(video([frames[0]] * 9), RATE).still


def test_a_summary_counts_and_averages() -> None:
    videos = [Motion(1.0, True, False, 2.0, 3.0), Motion(0.0, False, True, 4.0, 5.0)]
    assert summarise(videos) == {
        "videos": 2,
        "dynamic_degree": 50.0,
        "still": 50.0,
        "speed": 0.5,
        "first_frame_drift": 3.0,
        "flicker": 4.0,
    }
    with pytest.raises(DataError, match="no video"):
        summarise([])


def test_a_collapse_is_told_from_the_first_ones_speed() -> None:
    speeds = [{"speed": speed} for speed in (0.5, 0.2, 0.1, 0.0)]
    assert collapsed(speeds, 0.3) == [False, False, True, True]


@pytest.mark.parametrize("shape", [(1, 16, 16, 3), (4, 16, 16), (4, 16, 16, 4)])
def test_what_is_no_video_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="two frames or more"):
        measure(np.zeros(shape, np.uint8), RATE)
