"""Looks through one video: where its shots are, which clips it holds, and what each clip looks like in numbers.

Frames are looked at small; a whole film costs little memory. What the numbers mean is for ``curation`` to say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from pose_core.data.buckets import Bucket, cropped_share, nearest
from pose_core.data.video import Video
from pose_core.errors import DataError

SHOT_SIDE, THUMB_SIDE, HASH_SIDE = 256, 64, 32
"""Longest side in pixels of what shots, measures and hashes are made of; smaller videos stay as they are."""
HASHED_FRAMES = 3
HEADER_SLACK = 0.25
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
BLACK_LEVEL, BLACK_PIXELS = 32, 0.98
"""A frame is black if at least this share of its pixels is darker than this grey level (ffmpeg's blackdetect)."""


@dataclass(frozen=True)
class InspectionRules:
    """What clips are cut to, and which videos are refused for what they are as a whole; None and 0 refuse nothing."""

    buckets: tuple[Bucket, ...]
    clips_per_video: int = 1
    shot_threshold: float | None = None
    """How many times more than its neighbours a frame must change to begin a shot."""
    min_side_pixels: int = 1
    min_seconds: float = 0.0
    max_seconds: float | None = None
    min_source_rate: float = 0.0
    max_source_rate: float | None = None
    """Frames a second of the source."""


@dataclass(frozen=True)
class Measures:
    """One clip, as it would be cut, in numbers. Grey levels are 0 to 255."""

    start: float
    """Time of its first frame, in seconds since the video's first."""
    bucket: str
    cropped_share: float
    """Share of the picture that its bucket's shape cuts off."""
    brightness_range: float
    """Grey levels between its darkest and its brightest pixel."""
    black_share: float
    """Share of its frames that are black."""
    frozen_share: float
    """Share of its frames that repeat the one before."""
    motion: float
    """Mean absolute difference between its frames, in grey levels."""
    hash: str
    """Perceptual hash, 64 bits of each of three frames, in hexadecimal."""


@dataclass
class Inspection:
    """What a video is and the clips it gives; ``problem`` (``decode: ...``, ``filter: ...``) says why it gives none."""

    width: int = 0
    height: int = 0
    rate: float = 0.0
    seconds: float = 0.0
    shots: int = 0
    clips: list[Measures] = field(default_factory=list)
    problem: str = ""


def inspect_video(content: bytes, rules: InspectionRules) -> Inspection:
    """Decode a video from beginning to end and describe it and its clips. Raises nothing for a bad video."""
    result = Inspection()
    try:
        with Video(content) as video:
            result.width, result.height = video.width, video.height
            result.rate, result.seconds = video.rate, video.seconds
            _refuse(result, rules, HEADER_SLACK)
            times, greys, cuts = _look_through(video, rules)
        if len(times) > 1:
            interval = float(times[-1]) / (len(times) - 1)
            result.seconds, result.rate = float(times[-1]) + interval, 1 / interval
        _refuse(result, rules)
        result.shots = len(cuts) + 1
        result.clips = _clips(times, greys, cuts, video.width / video.height, rules)
    except DataError as error:
        result.problem = str(error)
    except MemoryError:
        result.problem = "decode: needs too much memory"
    return result


def _refuse(video: Inspection, rules: InspectionRules, slack: float = 0.0) -> None:
    """Refuse a video for its size, length or rate: once by its header, to save the decoding, and once by its frames.

    A header's length and rate may be off by a little, the share ``slack`` of a limit.
    """
    if min(video.height, video.width) < rules.min_side_pixels:
        raise DataError(f"filter: small, {video.width} x {video.height}")
    if video.seconds and video.seconds < rules.min_seconds * (1 - slack):
        raise DataError(f"filter: short, {video.seconds:.2f} seconds")
    if rules.max_seconds is not None and video.seconds > rules.max_seconds * (1 + slack):
        raise DataError(f"filter: long, {video.seconds:.2f} seconds")
    if video.rate and video.rate < rules.min_source_rate * (1 - slack):
        raise DataError(f"filter: slow, {video.rate:.2f} frames a second")
    if rules.max_source_rate is not None and video.rate > rules.max_source_rate * (1 + slack):
        raise DataError(f"filter: fast, {video.rate:.2f} frames a second")


def _look_through(video: Video, rules: InspectionRules) -> tuple[np.ndarray, list[np.ndarray], list[int]]:
    """Times ``[T]`` of all frames, their small grey pictures ``[h, w]`` uint8, and the frames that begin a new shot."""
    detector = _ShotDetector(rules.shot_threshold, video.rate or 25.0) if rules.shot_threshold is not None else None
    times: list[float] = []
    greys: list[np.ndarray] = []
    for frame in video.frames():
        picture = frame.picture(SHOT_SIDE if detector else THUMB_SIDE)
        if times and frame.time <= times[-1]:
            raise DataError("decode: timestamps go back")
        times.append(frame.time)
        if detector:
            detector.add(picture)
            picture = _shrink(picture, THUMB_SIDE)
        greys.append(np.rint(picture @ LUMA).astype(np.uint8))
    return np.array(times), greys, detector.cuts if detector else []


def _shrink(picture: np.ndarray, longest_side: int) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(picture))
    image.thumbnail((longest_side, longest_side), Image.Resampling.BOX)
    return np.asarray(image)


class _ShotDetector:
    """PySceneDetect's AdaptiveDetector, fed frame by frame."""

    def __init__(self, threshold: float, rate: float):
        # Here and not above: it brings OpenCV along, and only this rule needs it.
        import cv2
        from scenedetect.common import FrameTimecode
        from scenedetect.detectors import AdaptiveDetector

        cv2.setNumThreads(1)
        # Every cut counts, however soon after another: a clip must never hold one.
        self._detector = AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=1)
        self._timecode, self._rate = FrameTimecode, rate
        self._count = 0
        self.cuts: list[int] = []

    def add(self, picture: np.ndarray) -> None:
        code = self._timecode(self._count, fps=self._rate)
        blue_first = np.ascontiguousarray(picture[..., ::-1])
        self.cuts += [cut.frame_num for cut in self._detector.process_frame(code, blue_first)]
        self._count += 1


def _clips(
    times: np.ndarray, greys: list[np.ndarray], cuts: list[int], aspect: float, rules: InspectionRules
) -> list[Measures]:
    """The first ``clips_per_video`` clips of a video, one behind the other, none across a cut.

    Raises:
        DataError: ``filter: short ...``; no shot is long enough for a clip.
    """
    clips: list[Measures] = []
    edges = [0, *cuts, len(times)]
    for begin, end in zip(edges, edges[1:], strict=False):
        for bucket, first in _windows(times[begin:end], aspect, rules.buckets):
            if len(clips) < rules.clips_per_video:
                clips.append(_measures(times[begin:end], greys[begin:end], first, bucket, aspect))
    if not clips:
        shortest = min(rules.buckets, key=lambda bucket: bucket.frames)
        longest = max(_covered(times[begin:end], 0) for begin, end in zip(edges, edges[1:], strict=False))
        frames = math.floor(longest * shortest.frames_per_second + 1e-6) + 1
        shot = " in its longest shot" if cuts else ""
        rate = f"{shortest.frames_per_second:g} a second{shot}"
        raise DataError(f"filter: short, {frames} of {shortest.frames} frames at {rate}")
    return clips


def _covered(times: np.ndarray, first: int) -> float:
    """Seconds from frame ``first`` to where the last frame's half interval ends."""
    interval = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    return float(times[-1] - times[first]) + interval / 2


def _windows(times: np.ndarray, aspect: float, buckets: tuple[Bucket, ...]) -> Iterator[tuple[Bucket, int]]:
    """Consecutive clips of one shot: each one's bucket, the longest that still fits, and its first frame's index."""
    first = 0
    while first < len(times):
        bucket = nearest(buckets, aspect, _covered(times, first))
        if bucket is None:
            return
        yield bucket, first
        # Starts on a frame of its own, so that the clip's times are those of real frames.
        behind = times[first] + bucket.frames / bucket.frames_per_second
        first = max(first + 1, int(np.searchsorted(times, behind - 1e-4)))


def _measures(times: np.ndarray, greys: list[np.ndarray], first: int, bucket: Bucket, aspect: float) -> Measures:
    wanted = times[first] + np.arange(bucket.frames) / bucket.frames_per_second
    indices = np.abs(times[None, :] - wanted[:, None]).argmin(axis=1)
    clip = np.stack([greys[index] for index in indices]).astype(np.int16)
    # A source slower than the clip repeats frames of ours; only its own frames can be frozen.
    shown = np.stack([greys[index] for index in np.unique(indices)]).astype(np.int16)
    still = np.abs(np.diff(shown, axis=0)).max(axis=(1, 2)) <= 1 if len(shown) > 1 else np.zeros(1)
    hashed = np.linspace(0, len(clip) - 1, HASHED_FRAMES).round().astype(int)
    return Measures(
        start=round(float(times[first]), 6),
        bucket=bucket.name,
        cropped_share=round(cropped_share(bucket, aspect), 4),
        brightness_range=float(clip.max() - clip.min()),
        black_share=round(float(((clip < BLACK_LEVEL).mean(axis=(1, 2)) >= BLACK_PIXELS).mean()), 4),
        frozen_share=round(float(still.mean()), 4),
        motion=round(float(np.abs(np.diff(clip, axis=0)).mean()), 4) if len(clip) > 1 else 0.0,
        hash="".join(perceptual_hash(clip[index]) for index in hashed),
    )


def perceptual_hash(grey: np.ndarray) -> str:
    """64 bits, in hexadecimal, that similar pictures (``[h, w]`` grey levels) share: the signs of low frequencies.

    The picture is brought to 32 x 32; of its cosine transform the 8 x 8 lowest frequencies without the mean are
    compared with their median (the scheme known as pHash).
    """
    # Here and not above: every worker imports this file, and few ever hash.
    from scipy.fft import dctn

    image = Image.fromarray(grey.astype(np.uint8)).resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BILINEAR)
    low = dctn(np.asarray(image, dtype=np.float64), norm="ortho")[:8, :8].reshape(-1)
    bits = low > np.median(low[1:])
    bits[0] = False
    return np.packbits(bits).tobytes().hex()
