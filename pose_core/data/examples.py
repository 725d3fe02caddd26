"""A few frames of a clip, small, for a person to look at."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pose_core.data.buckets import Bucket
from pose_core.data.clips import read_clip
from pose_core.data.video import Video

FRAMES, HEIGHT = 5, 192
LONGEST_SIDE = 320
"""Of the frames of a video that gives no clip; they are shown whole."""


def example_frames(content: bytes, bucket: Bucket | None, start: float) -> np.ndarray:
    """Evenly spaced frames ``[T, h, w, 3]`` uint8: of the clip of ``bucket``'s size that starts at ``start`` seconds,
    exactly as it is encoded, or of the whole video without a bucket. At most 192 pixels high, shape kept.

    Raises:
        DataError: the video cannot be decoded.
    """
    if bucket is None:
        with Video(content) as video:
            frames = [frame.picture(LONGEST_SIDE) for frame in video.frames()]
    else:
        frames = list(read_clip(content, bucket, start))
    chosen = np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int)
    return np.stack([_small(frames[index]) for index in chosen])


def _small(frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    if height <= HEIGHT:
        return frame
    image = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize((max(1, round(width * HEIGHT / height)), HEIGHT), Image.Resampling.BOX))
