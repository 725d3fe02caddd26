"""Videos to test with, good and odd, encoded as cameras, editors and broken tools would."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np

FRAMES, SIDE, RATE = 9, 32, 8.0


def moving_square(seed: int, frames: int = FRAMES, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """A bright square on a coloured ground, a pixel further each frame; every seed looks different."""
    rng = np.random.default_rng(seed)
    ground, square = rng.integers(20, 90, 3), rng.integers(160, 255, 3)
    top, left = (int(rng.integers(0, side // 3)) for side in (height, width))
    down, right = rng.permutation([1, 2])
    clip = np.empty((frames, height, width, 3), dtype=np.uint8)
    clip[:] = ground
    for index, frame in enumerate(clip):
        y, x = (top + index * down) % (height * 2 // 3), (left + index * right) % (width * 2 // 3)
        frame[y : y + height // 3, x : x + width // 3] = square
    return clip


def encode(
    frames: np.ndarray,
    *,
    times: Sequence[float] | None = None,
    container: str = "mp4",
    codec: str = "libx264",
    pixels: str = "yuv420p",
    rotation: int = 0,
    pixel_aspect: int = 1,
    options: dict[str, str] | None = None,
    interlaced: bool = False,
) -> bytes:
    """``frames`` ``[T, H, W, 3]`` shown at ``times`` seconds (8 a second without), nearly lossless."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as opened:
        stream: Any = opened.add_stream(codec, rate=1000, options={"crf": "5"} if options is None else options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.sample_aspect_ratio = Fraction(pixel_aspect)
        if interlaced:
            stream.codec_context.flags |= av.codec.context.Flags.interlaced_dct | av.codec.context.Flags.interlaced_me
        stream.set_display_rotation(rotation)
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(format=pixels)
            picture.pts = round(1000 * (times[index] if times is not None else index / RATE))
            picture.time_base = Fraction(1, 1000)
            opened.mux(stream.encode(picture))
        opened.mux(stream.encode())
    return buffer.getvalue()


def good(seed: int) -> bytes:
    """An ordinary mp4 of ``moving_square(seed)``."""
    return encode(moving_square(seed))


def sound_only(container: str = "mp4") -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as opened:
        stream = opened.add_stream("aac", rate=16_000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16_000
        opened.mux(stream.encode(silence))
        opened.mux(stream.encode())
    return buffer.getvalue()


def interlaced(seed: int) -> tuple[bytes, np.ndarray]:
    """An interlaced video, and the frames it was made of: each holds the rows of two moments, as a camera of fields."""
    fields = moving_square(seed, 2 * FRAMES, 64, 64)
    woven = fields[::2].copy()
    woven[:, 1::2] = fields[1::2, 1::2]
    options = {"crf": "5", "x264-params": "tff=1:interlaced=1"}
    return encode(woven, options=options, interlaced=True), woven
