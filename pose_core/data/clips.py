"""Raw video to fixed-size clips, and back: decode, filter, cut, encode. Pure functions from row to rows.

A clip that cannot be used becomes a row with a reason; it never takes its neighbours down with it.
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

from pose_core.errors import DataError

MAX_FRAMES = 2048
"""Most frames that ``decode`` keeps of one video."""
MAX_PIXELS = 4096 * 2304
"""Largest frame that ``decode`` accepts, width times height."""
SPLITS = ("", "train", "validation", "test")
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)

Row = dict[str, Any]


@dataclass(frozen=True)
class ClipRules:
    """What a training clip looks like and which clips are dropped.

    ``frames``, ``height``, ``width`` and ``frames_per_second`` are the clip's; ``min_side_pixels`` is for the source's
    shorter side; ``min_brightness_range`` and ``min_motion`` are in grey levels, [0, 255]. A long video gives up to
    ``clips_per_video`` consecutive clips.
    """

    frames: int
    height: int
    width: int
    frames_per_second: float
    min_side_pixels: int = 1
    min_brightness_range: float = 0.0
    min_motion: float = 0.0
    clips_per_video: int = 1

    @property
    def seconds(self) -> float:
        """Time from the first frame needed of a source to the last."""
        return (self.clips_per_video * self.frames - 1) / self.frames_per_second


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


def decode(
    mp4: bytes, rules: ClipRules | None = None, *, max_frames: int = MAX_FRAMES, max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, np.ndarray]:
    """Decode a video: frames, uint8 ``[T, H, W, 3]`` (RGB, upright), and their times, float64 ``[T]`` in seconds.

    With ``rules``, frames are brought to the clip's size as they are read and reading stops after the last one needed,
    so that a long 4K video costs no more memory than its clip. Sizes are refused before frames are allocated.

    Raises:
        DataError: ``decode: ...`` or ``filter: ...`` with the reason.
    """
    if not mp4:
        raise DataError("decode: no bytes")
    try:
        # The format is named, so that a playlist in the guise of an mp4 cannot make the library open other files.
        options = {"max_pixels": str(max_pixels)}
        with av.open(io.BytesIO(mp4), "r", format="mp4", metadata_errors="replace", options=options) as container:
            stream = container.streams.best("video")
            if not isinstance(stream, av.VideoStream) or stream.codec_context is None:
                raise DataError("decode: no video stream")
            _check_header(stream, rules, max_frames, max_pixels)
            return _read(container, stream, rules, max_frames)
    except av.FFmpegError as error:
        raise DataError(f"decode: unreadable, {str(error.strerror).lower()}") from None


def _check_header(stream: av.VideoStream, rules: ClipRules | None, max_frames: int, max_pixels: int) -> None:
    height, width = stream.codec_context.height, stream.codec_context.width
    if height * width > max_pixels:
        raise DataError(f"decode: frame too large, {width} x {height}")
    if rules and min(height, width) < rules.min_side_pixels:
        raise DataError(f"filter: small, {width} x {height}")
    frames = stream.frames
    if rules and stream.average_rate:
        frames = min(frames, math.ceil(rules.seconds * stream.average_rate))
    if frames > max_frames:
        raise DataError(f"decode: too many frames, {frames} of at most {max_frames}")


def _read(
    container: av.container.InputContainer, stream: av.VideoStream, rules: ClipRules | None, max_frames: int
) -> tuple[np.ndarray, np.ndarray]:
    stream.codec_context.thread_count = 1
    kept: list[np.ndarray] = []
    times: list[float] = []
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise DataError("decode: corrupt frame")
        if frame.time is None:
            raise DataError("decode: no timestamps")
        picture = _picture(frame, stream, rules)
        if kept and picture.shape != kept[0].shape:
            raise DataError("decode: frame size changes")
        if len(kept) == max_frames:
            raise DataError(f"decode: too many frames, more than {max_frames}")
        kept.append(picture)
        times.append(frame.time)
        if rules and frame.time - times[0] >= rules.seconds:
            break
    if not kept:
        raise DataError("decode: no frames")
    return np.stack(kept), np.array(times)


def _picture(frame: av.VideoFrame, stream: av.VideoStream, rules: ClipRules | None) -> np.ndarray:
    """RGB picture of ``frame`` as a player shows it: turned upright and, with ``rules``, fitted with square pixels."""
    picture = frame.reformat(format="rgb24", threads=1).to_ndarray()
    quarter_turns = round(frame.rotation / 90) % 4
    picture = np.rot90(picture, quarter_turns)
    if rules is None:
        return picture
    aspect = float(stream.sample_aspect_ratio or 1)
    return fit(picture, rules.height, rules.width, 1 / aspect if quarter_turns % 2 else aspect)


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


def cut(frames: np.ndarray, timestamps: np.ndarray, rules: ClipRules) -> list[np.ndarray]:
    """Cut ``frames`` (uint8 ``[T, H, W, 3]``, shown at ``timestamps`` seconds) into clips of ``rules``' rate and size.

    Output frame k is the source frame nearest to k / ``frames_per_second`` after the first. Returns one to
    ``rules.clips_per_video`` consecutive clips, each uint8 ``[rules.frames, rules.height, rules.width, 3]``.

    Raises:
        DataError: ``filter: short ...``, when the source ends before the first clip does.
    """
    times = timestamps - timestamps[0]
    interval = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    # A frame serves until half an interval later, the last one too.
    covered = int((times[-1] + interval / 2) * rules.frames_per_second + 1e-6) + 1
    count = min(covered // rules.frames, rules.clips_per_video)
    if count < 1:
        raise DataError(f"filter: short, {covered} of {rules.frames} frames at {rules.frames_per_second:g} a second")
    wanted = np.arange(count * rules.frames) / rules.frames_per_second
    nearest = np.abs(times[None, :] - wanted[:, None]).argmin(axis=1)
    fitted = np.stack([fit(frames[index], rules.height, rules.width) for index in nearest])
    return np.split(fitted, count)


def _check_content(clip: np.ndarray, rules: ClipRules) -> None:
    """Refuse a blank or a still ``clip`` (uint8 ``[T, H, W, 3]``). Frame by frame, to stay small in memory."""
    if not rules.min_brightness_range and not rules.min_motion:
        return
    grey = [frame @ LUMA for frame in clip]
    brightness_range = max(frame.max() for frame in grey) - min(frame.min() for frame in grey)
    if brightness_range < rules.min_brightness_range:
        raise DataError(f"filter: blank, brightness range {brightness_range:.1f}")
    changes = [float(np.abs(after - before).mean()) for before, after in zip(grey, grey[1:], strict=False)]
    motion = sum(changes) / max(len(changes), 1)
    if motion < rules.min_motion:
        raise DataError(f"filter: still, motion {motion:.2f}")


def clips_of(sample: dict[str, Any], rules: ClipRules) -> list[Row]:
    """Turn one WebDataset sample into training rows; a sample that cannot be used gives one row that says why.

    ``sample`` holds ``__key__``, ``__url__`` (its shard), ``mp4`` (bytes) and ``json`` (bytes or a dictionary with
    ``prompt`` and perhaps ``split``: ``train``, ``validation`` or ``test``). Rows are ``key``, ``shard``, ``prompt``,
    ``split`` (empty when not said), ``video`` (uint8 ``[frames, height, width, 3]``, zeros when unusable) and
    ``reason``: empty for a good clip, else ``<category>: <phrase>[, <detail>]`` with the category ``caption``,
    ``decode`` or ``filter``.
    With ``rules.clips_per_video`` over one, keys of clips end in ``-000``, ``-001``, … Bad data raises nothing.
    """
    row: Row = {"key": _name(sample.get("__key__")), "shard": _name(sample.get("__url__")), "prompt": "", "split": ""}
    blank = np.zeros((rules.frames, rules.height, rules.width, 3), dtype=np.uint8)
    try:
        row["prompt"], row["split"] = _caption(sample.get("json"))
        mp4 = sample.get("mp4")
        if not isinstance(mp4, bytes | bytearray | memoryview):
            raise DataError("decode: no mp4 member")
        clips = cut(*decode(bytes(mp4), rules), rules)
    except DataError as error:
        return [row | {"video": blank, "reason": str(error)}]
    rows = []
    for index, clip in enumerate(clips):
        key = row["key"] if rules.clips_per_video == 1 else f"{row['key']}-{index:03d}"
        try:
            _check_content(clip, rules)
            rows.append(row | {"key": key, "video": clip, "reason": ""})
        except DataError as error:
            rows.append(row | {"key": key, "video": blank, "reason": str(error)})
    return rows


def _caption(raw: Any) -> tuple[str, str]:
    """Prompt and split from a sample's ``json`` member, bytes or parsed."""
    if isinstance(raw, bytes | bytearray | memoryview):
        try:
            raw = json.loads(bytes(raw).decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise DataError("caption: json is not UTF-8") from None
        except (ValueError, RecursionError):
            raise DataError("caption: json cannot be parsed") from None
        if not isinstance(raw, dict):
            raise DataError("caption: json is not an object")
    if not isinstance(raw, dict):
        raise DataError("caption: no json member")
    prompt, split = raw.get("prompt"), raw.get("split") or ""
    if prompt is None:
        raise DataError("caption: no prompt")
    if not isinstance(prompt, str) or _name(prompt) != prompt:
        raise DataError("caption: prompt is not text")
    if not prompt.strip():
        raise DataError("caption: empty prompt")
    if split not in SPLITS:
        raise DataError("caption: split is not train, validation or test")
    return prompt.strip(), split


def _name(value: Any) -> str:
    """``value`` as text that UTF-8 can hold; names in a tar can be any bytes."""
    return str("" if value is None else value).encode("utf-8", "replace").decode("utf-8")
