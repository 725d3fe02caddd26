"""Decoding and cutting: the right frames come out upright, in shape and in time, whatever the container."""

from __future__ import annotations

import io
from typing import Any

import av
import footage
import numpy as np
import pytest

from pose_core.data.buckets import Bucket
from pose_core.data.clips import decode, encode_mp4, fit, read_clip
from pose_core.data.video import Video, container_format
from pose_core.errors import DataError

BUCKET = Bucket(frames=5, height=32, width=32, frames_per_second=8.0)


def disc(height: int, width: int, diameter: float, frames: int = 5) -> np.ndarray:
    """A white disc in the middle of a black canvas, uint8 ``[frames, height, width, 3]``."""
    y, x = np.mgrid[:height, :width] + 0.5
    inside = np.hypot(y - height / 2, x - width / 2) <= diameter / 2
    return np.broadcast_to(inside[None, ..., None] * np.uint8(255), (frames, height, width, 3)).copy()


def extent(picture: np.ndarray) -> tuple[float, float]:
    """Height and width in pixels of the white shape in ``picture`` ``[H, W, 3]``, to a fraction of a pixel."""
    grey = picture.mean(axis=-1) / 255
    middle_row, middle_column = grey[grey.shape[0] // 2], grey[:, grey.shape[1] // 2]
    return float(middle_column.sum()), float(middle_row.sum())


def test_pixels_and_times_survive_encoding() -> None:
    frames = np.zeros((6, 48, 64, 3), np.uint8)
    frames[:, :24, :32], frames[:, :24, 32:] = (200, 30, 40), (30, 180, 60)
    frames[:, 24:, :32], frames[:, 24:, 32:] = (40, 50, 210), (128, 128, 128)
    decoded, times = decode(encode_mp4(frames, 12.5))
    assert decoded.shape == frames.shape and decoded.dtype == np.uint8
    assert times == pytest.approx(np.arange(6) / 12.5, abs=1e-4)
    for y, x in ((8, 8), (8, 56), (40, 8), (40, 56)):
        assert np.abs(decoded[:, y, x].astype(int) - frames[:, y, x]).max() <= 4


def test_mp4_plays_in_a_browser() -> None:
    content = encode_mp4(np.full((3, 33, 47, 3), 90, np.uint8), 8.0)
    assert 0 < content.index(b"moov") < content.index(b"mdat"), "the index must come before the data"
    with av.open(io.BytesIO(content)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, context.height, context.width) == ("h264", "yuv420p", 34, 48)


def test_long_and_noisy_video_keeps_its_index_in_front() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (400, 16, 16, 3), dtype=np.uint8)
    content = encode_mp4(noise, 23.976)
    assert content.index(b"moov") < content.index(b"mdat")
    assert len(decode(content)[0]) == 400


def test_encoding_is_deterministic() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 9, 32, 32, 3), dtype=np.uint8)
    for frames in noise:
        assert encode_mp4(frames, 8.0) == encode_mp4(frames, 8.0)


@pytest.mark.parametrize(("shape", "kind"), [((2, 8, 8, 3), "float32"), ((0, 8, 8, 3), "uint8"), ((8, 8), "uint8")])
def test_encoding_refuses_what_is_no_video(shape: tuple[int, ...], kind: str) -> None:
    with pytest.raises(DataError, match=f"uint8 frames .* got {kind}"):
        encode_mp4(np.zeros(shape, kind), 8.0)


def levels(count: int) -> np.ndarray:
    """Frames ``[count, 32, 32, 3]`` that each say their own number as a grey level."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 32, 32, 3)).copy()


def grey_levels(clip: np.ndarray) -> list[int]:
    """Numbers of the frames that were made of ``levels(...) * 15``."""
    return [round(level / 15) for level in clip.mean(axis=(1, 2, 3)).tolist()]


@pytest.mark.parametrize(
    ("source_rate", "expected"),
    [(24.0, [0, 3, 6, 9, 12]), (8.0, [0, 1, 2, 3, 4]), (30.0, [0, 4, 7, 11, 15]), (4.0, [0, 0, 1, 1, 2])],
)
def test_a_clip_takes_the_frames_nearest_in_time(source_rate: float, expected: list[int]) -> None:
    clip = read_clip(encode_mp4(levels(16) * np.uint8(15), source_rate), BUCKET)
    assert grey_levels(clip) == expected


def test_times_that_are_not_regular_are_followed() -> None:
    times = [0.0, 0.1, 0.13, 0.2, 0.26, 0.37, 0.52, 0.6]
    assert grey_levels(read_clip(footage.encode(levels(8) * np.uint8(15), times=times), BUCKET)) == [0, 2, 4, 5, 6]


@pytest.mark.parametrize("start", [0.5, 3.0, 12.0])
@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_a_clip_from_the_middle_is_the_one_a_reader_from_the_start_finds(container: str, start: float) -> None:
    """Far in, decoding begins at a key frame; a pass over everything must see the same frames."""
    frames = np.random.default_rng(0).integers(0, 256, (120, 4, 4, 3)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
    video = footage.encode(frames, container=container, options={"crf": "5", "g": "16"})
    with Video(video) as opened:
        whole = [frame.picture() for frame in opened.frames()]
    first = round(start * 8)
    clip = read_clip(video, BUCKET, start)
    assert np.array_equal(clip, np.stack(whole[first : first + 5]))


def test_reading_stops_after_the_last_frame_needed() -> None:
    """What is broken behind the clip does no harm to it."""
    whole = encode_mp4(levels(200) * np.uint8(1), 8.0)
    damaged = whole[: len(whole) * 3 // 4] + bytes(len(whole) - len(whole) * 3 // 4)
    assert np.array_equal(read_clip(damaged, BUCKET), read_clip(whole, BUCKET))


def test_a_video_that_ends_before_the_clip_is_short() -> None:
    with pytest.raises(DataError, match="filter: short, 4 of 5 frames at 8 a second"):
        read_clip(encode_mp4(disc(32, 32, 20, 4), 8.0), BUCKET)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64), (50, 37), (20, 80), (32, 32)])
def test_a_disc_stays_round(height: int, width: int) -> None:
    diameter = 0.6 * min(height, width)
    picture = fit(disc(height, width, diameter, 1)[0], 32, 32)
    assert picture.shape == (32, 32, 3)
    assert extent(picture) == pytest.approx((0.6 * 32, 0.6 * 32), abs=1.0)


def test_wide_target_crops_a_tall_source() -> None:
    assert extent(fit(disc(96, 64, 20, 1)[0], 32, 64)) == pytest.approx((20, 20), abs=1.0)


def test_pixels_that_are_not_square_are_straightened() -> None:
    y, x = np.mgrid[:64, :64] + 0.5
    squeezed = np.hypot(y - 32, (x - 32) * 2) <= 16
    frames = np.broadcast_to(squeezed[None, ..., None] * np.uint8(255), (5, 64, 64, 3)).copy()
    video = footage.encode(frames, pixel_aspect=2)
    assert extent(read_clip(video, BUCKET)[0]) == pytest.approx((16, 16), abs=1.0)
    with Video(video) as opened:
        assert (opened.height, opened.width) == (64, 128)


def test_a_phone_clip_comes_out_upright() -> None:
    frames = np.zeros((5, 32, 64, 3), np.uint8)
    frames[:, :, :16] = 255  # the stored left end is the shown lower end after a quarter turn counterclockwise
    decoded, _ = decode(footage.encode(frames, rotation=90))
    assert decoded.shape == (5, 64, 32, 3)
    assert decoded[:, -8:].min() > 200 and decoded[:, :40].max() < 50


def test_interlaced_frames_lose_their_combing() -> None:
    """Where something moves, neighbouring rows of a woven frame differ; those of a deinterlaced one hardly do."""

    def combing(frames: np.ndarray) -> float:
        rows = frames.astype(float).mean(axis=-1)
        return float(np.abs(rows[:, 1:-1] - (rows[:, :-2] + rows[:, 2:]) / 2).mean())

    video, woven = footage.interlaced(1)
    decoded, times = decode(video)
    assert len(decoded) == len(woven) and times == pytest.approx(np.arange(9) / 8, abs=1e-3)
    assert combing(decoded) < 0.4 * combing(woven)


def test_frames_too_large_are_refused() -> None:
    mp4 = encode_mp4(disc(32, 64, 20, 9), 8.0)
    with pytest.raises(DataError, match="decode: frame too large, 64 x 32"):
        Video(mp4, max_pixels=64 * 32 - 1)


def test_high_dynamic_range_is_refused() -> None:
    options = {"crf": "5", "x264-params": "transfer=smpte2084:colorprim=bt2020:colormatrix=bt2020nc"}
    with pytest.raises(DataError, match="decode: high dynamic range, PQ"):
        Video(footage.encode(disc(32, 32, 20), options=options))


@pytest.mark.parametrize(
    ("container", "name"), [("mov", "mp4"), ("matroska", "matroska"), ("mpegts", "mpegts"), ("flv", "flv")]
)
def test_containers_are_known_by_their_first_bytes(container: str, name: str) -> None:
    assert container_format(footage.encode(disc(32, 32, 20), container=container)) == name


def test_an_old_avi_is_read_too() -> None:
    frames = footage.moving_square(3)
    video = footage.encode(frames, container="avi", codec="mpeg4", options={"q": "1"})
    assert np.abs(decode(video)[0][0].astype(int) - frames[0]).mean() < 8


def test_a_playlist_in_disguise_opens_no_other_file(tmp_path: Any) -> None:
    (tmp_path / "secret.mp4").write_bytes(encode_mp4(disc(32, 32, 20), 8.0))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{tmp_path}/secret.mp4\n#EXT-X-ENDLIST\n"
    with pytest.raises(DataError, match="decode: unreadable"):
        decode(playlist.encode())
