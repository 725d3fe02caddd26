"""Decoding, filtering and cutting: the right frames and shapes come out, and no bad clip harms its neighbours."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest

from pose_core.data.clips import ClipRules, clips_of, cut, decode, encode_mp4, fit
from pose_core.errors import DataError

RULES = ClipRules(frames=5, height=32, width=32, frames_per_second=8.0, min_side_pixels=16, min_brightness_range=8.0)


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


def sample(mp4: Any = None, **changes: Any) -> dict[str, Any]:
    good = {
        "__key__": "clip",
        "__url__": "s3://bucket/raw/0.tar",
        "mp4": encode_mp4(disc(32, 32, 20), 8.0) if mp4 is None else mp4,
        "json": json.dumps({"prompt": "a disc"}).encode(),
    }
    return {name: value for name, value in (good | changes).items() if value is not ...}


def encoded_with(frames: np.ndarray, *, rotation: int = 0, pixel_aspect: int = 1) -> bytes:
    """Encode as a phone or an anamorphic camera would: stored pixels and display differ."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "5"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(pixel_aspect)
        stream.set_display_rotation(rotation)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def sound_only() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16_000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16_000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    return buffer.getvalue()


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


@pytest.mark.parametrize(
    ("source_rate", "expected"),
    [(24.0, [0, 3, 6, 9, 12]), (8.0, [0, 1, 2, 3, 4]), (30.0, [0, 4, 7, 11, 15]), (4.0, [0, 0, 1, 1, 2])],
)
def test_cut_picks_the_nearest_frames(source_rate: float, expected: list[int]) -> None:
    times = 7.5 + np.arange(16) / source_rate
    (clip,) = cut(levels(16), times, RULES)
    assert clip[:, 0, 0, 0].tolist() == expected


def test_cut_follows_timestamps_that_are_not_regular() -> None:
    times = np.array([0.0, 0.1, 0.13, 0.2, 0.26, 0.37, 0.52, 0.6])
    (clip,) = cut(levels(8), times, RULES)
    assert clip[:, 0, 0, 0].tolist() == [0, 2, 4, 5, 6]


def test_frames_chosen_after_a_real_decode_at_24_a_second() -> None:
    mp4 = encode_mp4(levels(16) * np.uint8(15), 24.0)
    (row,) = clips_of(sample(mp4), ClipRules(5, 32, 32, 8.0))
    assert row["reason"] == ""
    assert np.rint(row["video"].mean(axis=(1, 2, 3)) / 15).tolist() == [0, 3, 6, 9, 12]


def test_long_video_gives_consecutive_clips() -> None:
    rules = ClipRules(5, 32, 32, 8.0, clips_per_video=2)
    rows = clips_of(sample(encode_mp4(levels(14) * np.uint8(15), 8.0)), rules)
    assert [row["key"] for row in rows] == ["clip-000", "clip-001"]
    brightness = [np.rint(row["video"].mean(axis=(1, 2, 3)) / 15).tolist() for row in rows]
    assert brightness == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


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
    clip, _ = decode(encoded_with(frames, pixel_aspect=2), RULES)
    assert extent(clip[0]) == pytest.approx((16, 16), abs=1.0)


def test_a_phone_clip_comes_out_upright() -> None:
    frames = np.zeros((5, 32, 64, 3), np.uint8)
    frames[:, :, :16] = 255  # the stored left end is the shown lower end after a quarter turn counterclockwise
    decoded, _ = decode(encoded_with(frames, rotation=90))
    assert decoded.shape == (5, 64, 32, 3)
    assert decoded[:, -8:].min() > 200 and decoded[:, :40].max() < 50


def test_reading_stops_after_the_last_frame_needed() -> None:
    frames, times = decode(encode_mp4(levels(60), 8.0), RULES)
    assert len(frames) == RULES.frames and times[-1] == pytest.approx(0.5)


def test_sizes_are_refused_before_decoding() -> None:
    mp4 = encode_mp4(disc(32, 64, 20, 9), 8.0)
    with pytest.raises(DataError, match="decode: too many frames, 9 of at most 8"):
        decode(mp4, max_frames=8)
    with pytest.raises(DataError, match="decode: frame too large, 64 x 32"):
        decode(mp4, max_pixels=64 * 32 - 1)


def test_header_that_lies_about_its_size_is_refused() -> None:
    mp4 = bytearray(encode_mp4(np.zeros((1, 512, 512, 3), np.uint8), 8.0))
    entry = mp4.index(b"avc1", mp4.index(b"stsd"))
    mp4[entry + 28 : entry + 32] = (32).to_bytes(2, "big") * 2
    with pytest.raises(DataError, match="decode: "):
        decode(bytes(mp4), max_pixels=64 * 64)


def test_a_playlist_in_disguise_opens_no_other_file(tmp_path: Any) -> None:
    (tmp_path / "secret.mp4").write_bytes(encode_mp4(disc(32, 32, 20), 8.0))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{tmp_path}/secret.mp4\n#EXT-X-ENDLIST\n"
    with pytest.raises(DataError, match="decode: unreadable"):
        decode(playlist.encode())


GOOD_MP4 = encode_mp4(disc(32, 32, 20), 8.0)
MOVING = np.stack([np.roll(disc(32, 32, 12, 1)[0], 2 * step, axis=1) for step in range(5)])

HOSTILE = {
    "no json": (sample(json=...), "caption: no json member"),
    "json is None": (sample(json=None), "caption: no json member"),
    "broken UTF-8": (sample(json=b'{"prompt": "\xff"}'), "caption: json is not UTF-8"),
    "broken json": (sample(json=b'{"prompt": '), "caption: json cannot be parsed"),
    "deep json": (sample(json=b"[" * 100_000), "caption: json cannot be parsed"),
    "a list": (sample(json=b'["prompt"]'), "caption: json is not an object"),
    "no prompt": (sample(json=b"{}"), "caption: no prompt"),
    "empty prompt": (sample(json=b'{"prompt": "  "}'), "caption: empty prompt"),
    "prompt is a number": (sample(json=b'{"prompt": 7}'), "caption: prompt is not text"),
    "half a character": (sample(json=b'{"prompt": "\\ud800"}'), "caption: prompt is not text"),
    "unknown split": (sample(json=b'{"prompt": "a", "split": "spare"}'), "caption: split"),
    "split is a list": (sample(json=b'{"prompt": "a", "split": ["train"]}'), "caption: split"),
    "no mp4": (sample(mp4=...), "decode: no mp4 member"),
    "no bytes": (sample(b""), "decode: no bytes"),
    "noise": (sample(bytes(range(256)) * 20), "decode: unreadable"),
    "no end": (sample(GOOD_MP4[:-40]), "decode: "),
    "only the header": (sample(GOOD_MP4[:500]), "decode: "),
    "sound only": (sample(sound_only()), "decode: no video stream"),
    "short": (sample(encode_mp4(disc(32, 32, 20, 4), 8.0)), "filter: short, 4 of 5 frames"),
    "small": (sample(encode_mp4(disc(14, 64, 10), 8.0)), "filter: small, 64 x 14"),
    "blank": (sample(encode_mp4(np.full((5, 32, 32, 3), 77, np.uint8), 8.0)), "filter: blank"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_sample_gives_one_row_with_its_reason_and_spares_its_neighbours(name: str) -> None:
    bad, reason = HOSTILE[name]
    neighbours = [sample(), bad, sample(json={"prompt": " a disc ", "split": "test"})]
    first, row, last = [row for one in neighbours for row in clips_of(one, RULES)]
    assert row["reason"].startswith(reason)
    assert (row["key"], row["shard"]) == ("clip", "s3://bucket/raw/0.tar")
    assert row["video"].shape == (5, 32, 32, 3) and row["video"].dtype == np.uint8 and not row["video"].any()
    assert [first["reason"], last["reason"]] == ["", ""]
    assert (first["prompt"], first["split"]) == ("a disc", "")
    assert (last["prompt"], last["split"]) == ("a disc", "test")
    assert extent(last["video"][0]) == pytest.approx((20, 20), abs=1.0)


def test_still_clips_are_dropped_only_on_request() -> None:
    still, moving = sample(GOOD_MP4), sample(encode_mp4(MOVING, 8.0))
    rules = ClipRules(5, 32, 32, 8.0, min_motion=2.0)
    assert clips_of(still, rules)[0]["reason"].startswith("filter: still")
    assert clips_of(moving, rules)[0]["reason"] == ""
    assert clips_of(still, ClipRules(5, 32, 32, 8.0))[0]["reason"] == ""


def test_names_from_a_tar_become_valid_text() -> None:
    (row,) = clips_of(sample(__key__="caf\udce9", __url__=None), RULES)
    assert row["key"].encode() == b"caf?" and row["shard"] == ""


def test_no_damage_to_the_bytes_raises() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = np.frombuffer(GOOD_MP4, np.uint8).copy()
        damaged[rng.integers(0, len(damaged), 20)] = rng.integers(0, 256, 20)
        (row,) = clips_of(sample(damaged.tobytes()), RULES)
        assert row["video"].shape == (5, 32, 32, 3)
