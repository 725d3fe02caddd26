"""Buckets: the few sizes that training clips have, so that clips of one batch share a shape and nothing is stretched.

A bucket's frames are 4k+1 and its sides multiples of what the model compresses by (its own factors, whatever they are).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pose_core.errors import DataError


@dataclass(frozen=True, order=True)
class Bucket:
    """Size of a training clip: ``frames`` at ``frames_per_second`` of ``height`` x ``width`` pixels."""

    frames: int
    height: int
    width: int
    frames_per_second: float

    @classmethod
    def named(cls, name: str, frames_per_second: float) -> Bucket:
        """Inverse of ``name``."""
        frames, height, width = map(int, name.split("x"))
        return cls(frames, height, width, frames_per_second)

    @property
    def name(self) -> str:
        """What it is called in paths: ``81x480x832``."""
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def seconds(self) -> float:
        """Time from its first frame to its last."""
        return (self.frames - 1) / self.frames_per_second


def plan_buckets(
    base: Bucket, ratios: Sequence[str], lengths: Sequence[int], *, temporal_factor: int, side_step: int
) -> tuple[Bucket, ...]:
    """``base`` and, beside it, a bucket for every aspect ratio (``"16:9"``) and every length in frames.

    A ratio's sides are the multiples of ``side_step`` nearest to ``base``'s area at that ratio. ``base`` comes first.

    Raises:
        DataError: (correctable in the call) a length is not ``temporal_factor`` k + 1, or a ratio is not ``W:H``.
    """
    for frames in lengths:
        if (frames - 1) % temporal_factor:
            message = f"data.bucket_frames={frames} does not fit: the VAE takes {temporal_factor}k+1 frames"
            raise DataError(message, in_call=True)
    sizes = [(base.height, base.width), *(_size(base, ratio, side_step) for ratio in ratios)]
    every = [
        Bucket(frames, height, width, base.frames_per_second)
        for frames in (base.frames, *lengths)
        for height, width in sizes
    ]
    return tuple(dict.fromkeys(every))


def _size(base: Bucket, ratio: str, step: int) -> tuple[int, int]:
    width, height = (int(part) if part.isdecimal() else 0 for part in ratio.partition(":")[::2])
    if not width or not height:
        raise DataError(f"data.aspect_ratios={ratio!r} is no ratio: write it as 16:9", in_call=True)
    scale = math.sqrt(base.height * base.width / (width * height))
    return _multiple(height * scale, step), _multiple(width * scale, step)


def _multiple(side: float, step: int) -> int:
    return max(step, round(side / step) * step)


def nearest(buckets: Sequence[Bucket], aspect: float, covered_seconds: float) -> Bucket | None:
    """The bucket for a source of this ``aspect`` (width over height, as shown) that has ``covered_seconds`` of frames.

    Of the sizes whose aspect is nearest, the longest that the time is enough for; None where there is none.
    ``covered_seconds`` runs from the first frame to the end of the last one's half interval.
    """
    distances = {bucket: abs(math.log(bucket.width / bucket.height / aspect)) for bucket in buckets}
    least = min(distances.values())
    alike = (bucket for bucket in buckets if distances[bucket] - least < 1e-9)
    # A little slack, because times are sums of rounded intervals.
    enough = [bucket for bucket in alike if bucket.seconds <= covered_seconds + 1e-6]
    return max(enough, key=lambda bucket: bucket.frames, default=None)


def cropped_share(bucket: Bucket, aspect: float) -> float:
    """Share of a source's picture, [0, 1), that is cut off to give it the bucket's aspect."""
    ratio = bucket.width / bucket.height / aspect
    return 1 - min(ratio, 1 / ratio)
