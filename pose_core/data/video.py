"""Opens a video that anybody may have put into a bucket, and shows its frames as a player would.

Upright, with square pixels, deinterlaced, RGB. The container is recognised by its first bytes, never by its name, and
only containers that cannot refer to other files are opened. Sizes are refused before frames are allocated.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import av
import numpy as np
from av.filter import Graph
from av.stream import Disposition
from av.video.reformatter import ColorTrc, Interpolation

from pose_core.errors import DataError

MAX_PIXELS = 4096 * 2304
"""Largest frame that is decoded, width times height."""
MAX_FRAMES = 100_000
"""Most frames that are decoded of one video; just under an hour at 30 a second."""
SEEK_SECONDS = 2.0
"""Where a clip starts later than this, decoding starts at the key frame before it."""
_HIGH_DYNAMIC_RANGE: dict[int, str] = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
_ISO_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"moof")
_TRANSPORT_PACKET = 188
_MAGIC = (
    (b"\x1a\x45\xdf\xa3", "matroska"),
    (b"FLV", "flv"),
    (b"GIF8", "gif"),
    (b"OggS", "ogg"),
    (b"\x00\x00\x01\xba", "mpeg"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
)


def container_format(content: bytes) -> str:
    """Name of the demuxer for these bytes, by their beginning.

    Raises:
        DataError: ``decode: ...``; there are none, or they are not a video container.
    """
    if not content:
        raise DataError("decode: no bytes")
    if content[4:8] in _ISO_BOXES:
        return "mp4"
    if content[:4] == b"RIFF" and content[8:12] == b"AVI ":
        return "avi"
    if content[:1] == content[_TRANSPORT_PACKET : _TRANSPORT_PACKET + 1] == b"\x47":
        return "mpegts"
    for magic, name in _MAGIC:
        if content.startswith(magic):
            return name
    raise DataError("decode: unreadable, not a video container")


@dataclass(frozen=True)
class Frame:
    """A decoded frame and when it is shown, in seconds since the video's first."""

    time: float
    decoded: av.VideoFrame
    turns: int
    """Quarter turns counterclockwise that bring it upright."""

    def picture(self, longest_side: int | None = None) -> np.ndarray:
        """RGB as shown, uint8 ``[h, w, 3]``; ``longest_side`` shrinks it as it is converted, which is much cheaper."""
        frame = self.decoded
        scale = min(1.0, longest_side / max(frame.height, frame.width)) if longest_side else 1.0
        small = frame.reformat(
            format="rgb24",
            width=max(1, round(frame.width * scale)),
            height=max(1, round(frame.height * scale)),
            interpolation=Interpolation.AREA if scale < 1 else Interpolation.BILINEAR,
            threads=1,
        )
        return np.rot90(small.to_ndarray(), self.turns)


class Video:
    """One pass over a video's frames; a context manager.

    ``width`` and ``height`` are as shown: turned upright, pixels made square. ``rate`` is frames a second by the
    header, 0 if it does not say. What cannot be decoded raises ``DataError``, ``decode: ...``, here or while frames are
    read.
    """

    def __init__(self, content: bytes, *, max_pixels: int = MAX_PIXELS):
        name = container_format(content)
        # What has no size in its header is refused by libavcodec itself, with the same limit.
        options = {"max_pixels": str(max_pixels)}
        with _Refusals():
            self._container = av.open(io.BytesIO(content), "r", format=name, metadata_errors="replace", options=options)
        try:
            self._stream = self._video_stream()
            context = self._stream.codec_context
            if context.height * context.width > max_pixels:
                raise DataError(f"decode: frame too large, {context.width} x {context.height}")
            if curve := _HIGH_DYNAMIC_RANGE.get(context.color_trc):
                raise DataError(f"decode: high dynamic range, {curve}")
            context.thread_count, context.options = 1, options
            self._seekable = name in ("mp4", "matroska")
            # Only this header counts the frames that are really there.
            self._counted = self._stream.frames if name == "mp4" else 0
            with _Refusals():
                self._begin()
        except BaseException:
            self._container.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def _video_stream(self) -> av.VideoStream:
        for stream in self._container.streams.video:
            # A song's cover is a video stream too.
            if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic:
                return stream
        raise DataError("decode: no video stream")

    def _begin(self) -> None:
        """Learn from the first frame what no header says."""
        self._frames = self._decoded(whole=True)
        first = next(self._frames, None)
        if first is None:
            raise DataError("decode: no frames")
        self._first, self._origin = first, _time(first)
        self._turns = round(first.rotation / 90) % 4
        aspect = float(self._stream.sample_aspect_ratio or 1)
        self.pixel_aspect = 1 / aspect if self._turns % 2 else aspect
        """Width of a pixel over its height, once the picture is upright."""
        height, width = (first.width, first.height) if self._turns % 2 else (first.height, first.width)
        self.height, self.width = height, max(1, round(width * self.pixel_aspect))
        self.rate = float(self._stream.average_rate or 0)

    @property
    def seconds(self) -> float:
        """Length by the header, 0 if it does not say; never trusted for more than an early refusal."""
        if self._stream.duration and self._stream.time_base:
            return float(self._stream.duration * self._stream.time_base)
        return float(self._container.duration or 0) / av.time_base

    def frames(self, start: float = 0.0) -> Iterator[Frame]:
        """Every frame shown from ``start`` seconds on; once. Far into a video, what lies before is not decoded."""
        with _Refusals():
            frames = itertools.chain([self._first], self._frames)
            if start > SEEK_SECONDS and self._seekable:
                self._container.seek(int((self._origin + start) * av.time_base), backward=True)
                frames = itertools.chain([], self._decoded())
            for decoded in self._progressive(frames) if self._first.interlaced_frame else frames:
                frame = Frame(_time(decoded) - self._origin, decoded, self._turns)
                if frame.time >= start - 1e-4:
                    yield frame

    def _progressive(self, frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        """Deinterlaced frames, one for each that comes in."""
        graph = Graph()
        source, sink = graph.add_buffer(template=self._stream), graph.add("buffersink")
        graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), sink).configure()
        for frame in itertools.chain(frames, [None]):
            graph.vpush(frame)
            yield from _pulled(graph)

    def _decoded(self, *, whole: bool = False) -> Iterator[av.VideoFrame]:
        """Frames as the decoder gives them; with ``whole``, an end before an mp4's number of frames is an error."""
        packets = frames = 0
        shape = None
        for packet in self._container.demux(self._stream):
            if packet.is_corrupt:
                raise DataError("decode: cut short or corrupt")
            packets += bool(packet.size)
            for frame in packet.decode():
                frames += 1
                if frame.is_corrupt:
                    raise DataError("decode: corrupt frame")
                if frames > MAX_FRAMES:
                    raise DataError(f"decode: too many frames, more than {MAX_FRAMES}")
                if shape not in (None, (frame.width, frame.height, frame.format.name)):
                    raise DataError("decode: frame size changes")
                shape = (frame.width, frame.height, frame.format.name)
                yield frame
        if whole and packets < self._counted:
            raise DataError(f"decode: cut short, {packets} of {self._counted} frames")


def _pulled(graph: Graph) -> Iterator[av.VideoFrame]:
    while True:
        try:
            yield graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return


def _time(frame: av.VideoFrame) -> float:
    if frame.time is None:
        raise DataError("decode: no timestamps")
    return float(frame.time)


class _Refusals:
    """Turns what libav raises into ``DataError``."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, av.FFmpegError):
            raise DataError(f"decode: unreadable, {str(error.strerror).lower()}") from None
        if isinstance(error, MemoryError):
            raise DataError("decode: needs too much memory") from None
