"""Contact sheets and rows of videos: every frame a person should see is there, readable and where it belongs."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pose_core.errors import DataError
from pose_core.evaluation.pictures import GAP, Video, contact_sheet, side_by_side

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def plain(colour: tuple[int, int, int], frames: int = 9, height: int = 32, width: int = 32) -> Video:
    return np.full((frames, height, width, 3), colour, np.uint8)


def ramp(frames: int, height: int = 32, width: int = 32) -> Video:
    """A video whose frame ``t`` is green with the brightness ``100 + t``."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[..., 1] = 100 + np.arange(frames)[:, None, None]
    return video


def pixels(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(sheet) == colour).all(-1).sum())


def test_a_sheet_shows_every_label_of_every_clip_at_a_readable_size() -> None:
    rows = [("real", [plain(RED)] * 3), ("teacher, 50 steps", [plain(GREEN)] * 3), ("one step", [plain(BLUE)] * 3)]
    sheet = contact_sheet(rows, ["a one", "a two", "a three"], frames_shown=5)
    for colour in (RED, GREEN, BLUE):
        assert pixels(sheet, colour) == 3 * 5 * 96 * 96


def test_shown_frames_are_evenly_spaced_and_hold_the_first_and_the_last() -> None:
    sheet = contact_sheet([("real", [ramp(81)])], ["a seven moving up"], frames_shown=5)
    shown = [t for t in range(81) if pixels(sheet, (0, 100 + t, 0))]
    assert shown == [0, 20, 40, 60, 80]


def test_a_short_video_shows_each_of_its_frames_once() -> None:
    sheet = contact_sheet([("real", [ramp(3)])], ["a seven"], frames_shown=5)
    assert [pixels(sheet, (0, 100 + t, 0)) for t in range(3)] == [96 * 96] * 3


def test_small_videos_keep_their_true_pixels_and_large_ones_fit() -> None:
    checkers = np.zeros((1, 32, 32, 3), np.uint8)
    checkers[:, ::2, ::2] = RED
    assert pixels(contact_sheet([("real", [checkers])], ["checkers"]), RED) == 16 * 16 * 9
    wide = contact_sheet([("real", [plain(BLUE, frames=1, height=480, width=832)])], ["a street"])
    assert pixels(wide, BLUE) == 192 * 333


def test_labels_and_captions_are_written_beside_the_frames() -> None:
    def ink(label: str, caption: str) -> int:
        sheet = np.asarray(contact_sheet([(label, [plain(RED)])], [caption]))
        return int(((sheet < 200).all(-1)).sum())

    bare = ink("", "")
    assert ink("one step", "") > bare + 50
    assert ink("", "a seven moving up and left") > bare + 100


def test_a_long_prompt_does_not_widen_the_sheet() -> None:
    short = contact_sheet([("real", [plain(RED)])], ["a seven"])
    long = contact_sheet([("real", [plain(RED)])], ["a seven moving up and left " * 40])
    assert long.width == short.width
    assert pixels(long, RED) == pixels(short, RED)


def test_a_sheet_refuses_rows_that_do_not_match_its_captions() -> None:
    with pytest.raises(DataError, match="'one step' has 1 videos for 2 captions"):
        contact_sheet([("one step", [plain(RED)])], ["a one", "a two"])


def test_floating_point_videos_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="float32"):
        side_by_side([plain(RED).astype(np.float32)])


def test_videos_stand_in_a_row_in_the_given_order() -> None:
    row = side_by_side([plain(RED), plain(GREEN), plain(BLUE)], min_height=128)
    assert row.shape == (9, 128, 3 * 128 + 2 * GAP, 3)
    assert row.dtype == np.uint8
    lefts = [index * (128 + GAP) for index in range(3)]
    for left, colour in zip(lefts, (RED, GREEN, BLUE), strict=True):
        assert (row[:, :, left : left + 128] == colour).all()


@pytest.mark.parametrize(("height", "width", "count"), [(33, 35, 2), (127, 61, 3), (481, 833, 1)])
def test_sides_are_even_as_h264_wants_them(height: int, width: int, count: int) -> None:
    row = side_by_side([plain(RED, frames=2, height=height, width=width)] * count)
    assert row.shape[1] % 2 == 0
    assert row.shape[2] % 2 == 0
    assert row.shape[1] >= 128


def test_a_shorter_video_rests_on_its_last_frame() -> None:
    row = side_by_side([ramp(5, 128, 128), ramp(2, 128, 128)])
    assert row[:, 0, 0, 1].tolist() == [100, 101, 102, 103, 104]
    assert row[:, 0, -1, 1].tolist() == [100, 101, 101, 101, 101]


def test_videos_of_different_sizes_share_one_height() -> None:
    row = side_by_side([plain(RED, height=32, width=32), plain(BLUE, height=240, width=320)])
    assert row.shape[1] == 240
    assert (row[:, :, :240] == RED).all()
    assert (row[:, :, -320:] == BLUE).all()
