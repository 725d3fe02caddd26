"""Clips of a fixed size out of any video, by timestamps and without stretching, and frames back to mp4."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

from pose_core.data.buckets import Bucket
from pose_core.data.video import Frame, Video
from pose_core.errors import DataError


def encode_mp4(frames: np.ndarray, frames_per_second: float, *, quality: int = 12, every_colour: bool = False) -> bytes:
    """Encode ``frames`` (uint8 ``[T, H, W, 3]``, RGB) as an H.264 mp4 that browsers play while it loads.

    ``quality`` is x264's constant rate factor, 0 (lossless) to 51. ``every_colour`` keeps a colour for each pixel, not
    for each four, which some browsers cannot play. Odd sizes grow by one repeated row or column. The same frames always
    give the same bytes.

    Raises:
        DataError: the frames have another shape or type, or there are none.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise DataError(f"an mp4 needs uint8 frames [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    frames = np.pad(frames, [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)], mode="edge")
    buffer = io.BytesIO()
    # Room for the index in front of the data: the muxer's own "faststart" reopens the file, and there is none.
    index = {"moov_size": str(2048 + 48 * len(frames))}
    with av.open(buffer, "w", format="mp4", options=index) as container:
        rate = Fraction(frames_per_second).limit_denominator(100_000)
        # Without lookahead: planning ahead, x264 now and then gives tiny frames other bytes from call to call.
        options = {"crf": str(quality), "tune": "zerolatency"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        layout = "yuv444p" if every_colour else "yuv420p"
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], layout
        context = stream.codec_context
        context.thread_count = 1  # more threads give other bytes
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for frame in frames:
            rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(rgb.reformat(format=layout, dst_colorspace=Colorspace.ITU709, threads=1)))
        container.mux(stream.encode())
    return buffer.getvalue()


def decode(video: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Decode a short video whole: frames, uint8 ``[T, H, W, 3]`` (RGB, upright), and their times ``[T]`` in seconds.

    Raises:
        DataError: ``decode: ...`` with the reason.
    """
    with Video(video) as opened:
        frames = [(frame.picture(), frame.time) for frame in opened.frames()]
    return np.stack([picture for picture, _ in frames]), np.array([time for _, time in frames])


def read_clip(video: bytes, bucket: Bucket, start: float = 0.0) -> np.ndarray:
    """The clip of ``bucket``'s size that starts ``start`` seconds into a video, uint8 ``[frames, height, width, 3]``.

    Frame k is the source frame nearest to ``start`` + k / ``frames_per_second``, by its timestamp. Only frames that are
    needed are brought to RGB and to size, and reading stops after the last one: a long 4K video costs no more memory
    than its clip.

    Raises:
        DataError: ``decode: ...``, or ``filter: short ...`` when the video ends before the clip does.
    """
    wanted = start + np.arange(bucket.frames) / bucket.frames_per_second
    clip = np.empty((bucket.frames, bucket.height, bucket.width, 3), dtype=np.uint8)
    filled = 0
    before: Frame | None = None
    interval = 0.0
    with Video(video) as opened:
        for frame in opened.frames(start):
            if before is not None:
                interval = frame.time - before.time
                count = int(np.searchsorted(wanted, (before.time + frame.time) / 2 + 1e-9, side="right"))
                filled = _fill(clip, filled, count, before, opened.pixel_aspect)
                if filled == bucket.frames:
                    return clip
            before = frame
        if before is not None:
            # A frame serves until half an interval later, the last one too.
            count = int(np.searchsorted(wanted, before.time + interval / 2 + 1e-6, side="right"))
            filled = _fill(clip, filled, count, before, opened.pixel_aspect)
    if filled < bucket.frames:
        rate = f"{bucket.frames_per_second:g} a second"
        raise DataError(f"filter: short, {filled} of {bucket.frames} frames at {rate}")
    return clip


def _fill(clip: np.ndarray, filled: int, count: int, frame: Frame, pixel_aspect: float) -> int:
    """Put ``frame`` into ``clip[filled:count]``; how many frames are filled then."""
    if count > filled:
        clip[filled:count] = fit(frame.picture(), clip.shape[1], clip.shape[2], pixel_aspect)
    return max(filled, count)


def fit(picture: np.ndarray, height: int, width: int, pixel_aspect: float = 1.0) -> np.ndarray:
    """Cut the largest centred part of ``picture`` (uint8 ``[h, w, 3]``) with the target's shape and resize it to
    ``[height, width, 3]``; nothing is stretched. ``pixel_aspect`` is the width of a source pixel over its height.
    """
    h, w = picture.shape[:2]
    if (h, w, pixel_aspect) == (height, width, 1.0):
        return picture
    scale = min(w * pixel_aspect / width, h / height)
    box_w, box_h = min(w, width * scale / pixel_aspect), min(h, height * scale)
    left, top = (w - box_w) / 2, (h - box_h) / 2
    box = (left, top, min(w, left + box_w), min(h, top + box_h))
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=box))
