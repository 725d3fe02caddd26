"""The embedded domain: real handwriting that moves and bounces over a small canvas, one prompt a clip.

Handwriting is scikit-learn's bundled digits (8 x 8, 16 grey levels). Training and held-out clips use different
handwriting, so that a model which only remembers strokes is found out.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = {
    "right": (1, 0),
    "down and right": (1, 1),
    "down": (0, 1),
    "down and left": (-1, 1),
    "left": (-1, 0),
    "up and left": (-1, -1),
    "up": (0, -1),
    "up and right": (1, -1),
}
"""Name of each starting direction and its unit steps (x to the right, y downwards)."""

DIGIT_PIXELS = 16
SPEED_PIXELS = (1.5, 2.5)
"""Slowest and fastest movement, pixels a frame along each moving axis."""
START_SHARE = 0.5
HELDOUT_EVERY = 5
"""Every fifth handwritten sample of a digit is kept for held-out clips."""


@dataclass(frozen=True)
class DigitClip:
    """What one clip shows; ``render`` draws it.

    ``x`` and ``y`` are the first position of the digit's left upper corner as a share of the free way, in [0, 1];
    ``direction`` is a key of ``DIRECTIONS``; ``speed`` is in pixels a frame.
    """

    digit: int
    sample: int
    direction: str
    x: float
    y: float
    speed: float

    @property
    def prompt(self) -> str:
        name = DIGIT_NAMES[self.digit]
        return f"{'an' if name == 'eight' else 'a'} {name} moving {self.direction}"


@functools.lru_cache(maxsize=1)
def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    """Smoothly enlarged digits ``[1797, DIGIT_PIXELS, DIGIT_PIXELS]`` in [0, 1], and their labels."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    size = (DIGIT_PIXELS, DIGIT_PIXELS)
    small = (digits.images * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in small]
    return np.stack(large).astype(np.float32) / 255, digits.target


@functools.lru_cache(maxsize=32)
def _samples(digit: int, heldout: bool) -> np.ndarray:
    """Indices of the handwritten samples of ``digit`` that belong to the held-out or to the training half."""
    indices = np.flatnonzero(_handwriting()[1] == digit)
    kept_out = np.arange(len(indices)) % HELDOUT_EVERY == 0
    return indices[kept_out == heldout]


def draw_clip(rng: np.random.Generator, *, heldout: bool = False) -> DigitClip:
    """Draw what a clip shows: digit, direction, handwriting, place and speed, all uniform.

    Along a moving axis the digit starts at most ``START_SHARE`` of the way to the wall ahead, so that the clip shows
    the direction its prompt names before the digit bounces.
    """
    digit = int(rng.integers(10))
    direction = str(rng.choice(list(DIRECTIONS)))
    x, y = (_start(rng, step) for step in DIRECTIONS[direction])
    return DigitClip(
        digit=digit,
        sample=int(rng.choice(_samples(digit, heldout))),
        direction=direction,
        x=x,
        y=y,
        speed=float(rng.uniform(*SPEED_PIXELS)),
    )


def _start(rng: np.random.Generator, step: int) -> float:
    share = float(rng.random())
    if step == 0:
        return share
    return share * START_SHARE if step > 0 else 1 - share * START_SHARE


def positions(clip: DigitClip, frames: int, height: int, width: int) -> np.ndarray:
    """Left upper corner of the digit in each frame, ``[frames, 2]`` as (x, y) in pixels; it bounces off the walls."""
    free = np.array([width - DIGIT_PIXELS, height - DIGIT_PIXELS], dtype=np.float64)
    start = np.array([clip.x, clip.y]) * free
    step = np.array(DIRECTIONS[clip.direction]) * clip.speed
    travelled = start + np.arange(frames)[:, None] * step
    # A bounce is a reflection: unfold the walls into a triangle wave of period twice the free way.
    folded = np.mod(travelled, 2 * free)
    return np.minimum(folded, 2 * free - folded)


def render(clip: DigitClip, frames: int = 9, height: int = 32, width: int = 32) -> np.ndarray:
    """Draw a clip ``[frames, height, width, 3]``, uint8: white ink on black, placed to a fraction of a pixel."""
    ink = _handwriting()[0][clip.sample]
    canvas = np.zeros((frames, height + 1, width + 1), dtype=np.float32)
    for frame, (x, y) in enumerate(positions(clip, frames, height, width)):
        left, top = int(x), int(y)
        right_share, lower_share = x - left, y - top
        for dy, weight_y in ((0, 1 - lower_share), (1, lower_share)):
            for dx, weight_x in ((0, 1 - right_share), (1, right_share)):
                window = canvas[frame, top + dy : top + dy + DIGIT_PIXELS, left + dx : left + dx + DIGIT_PIXELS]
                window += weight_y * weight_x * ink
    grey = np.clip(np.rint(canvas[:, :height, :width] * 255), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)
