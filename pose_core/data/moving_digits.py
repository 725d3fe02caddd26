"""The embedded domain: real handwriting that moves, bounces and passes over a small canvas, one prompt a clip.

A clip of the level ``two`` shows a red digit and a green one, each with a direction and a pace of its own; they bounce
off the left and right wall and pass each other, the red one in front. The prompt names the digits, and how a digit
moves in one case of four, by direction and pace, never by its speed: what may happen is many things, and a single step
that averages them shows a smear. The level ``one`` leaves the green digit out, and its prompts always say how the red
one moves.

Handwriting is scikit-learn's bundled digits (8 x 8, 16 grey levels). Training, validation and test clips use different
handwriting, so that a model which only remembers strokes is found out.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from pose_core.data.captions import TEST, TRAIN, VALIDATION

MOVING_DIGITS = "moving_digits"
"""What ``data.raw_uri`` calls this domain."""
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = {"left": -1, "right": 1}
"""Name of each starting direction and its step along x."""
PACES = {"slowly": (0.4, 1.0), "fast": (1.2, 2.4)}
"""Name of each pace, its slowest and its fastest speed in pixels a frame."""
COLOURS = {"red": (1.0, 0.15, 0.15), "green": (0.15, 1.0, 0.15)}
"""Colour of the digit in front and of the one behind, as shares of full red, green and blue."""
LEVELS = ("one", "two")
"""How many digits a clip shows."""
TOLD_SHARE = 0.25
"""How often the prompt of a clip of two digits says how one of them moves."""
EDITION = 2
"""Counted up when a seed gives other clips or prompts than before: what was rendered earlier is then not used again."""

FRAMES, HEIGHT, WIDTH = 17, 16, 32
"""The clips that the shipped weights were trained on."""
DIGIT_PIXELS = 12
CLEAR_PIXELS = 10.0
"""Two digits start at least this far apart: each is seen whole in the first frame."""
START_SHARE = 0.7
"""A digit starts at most this share of the way to the wall ahead, so that it is seen to go where its prompt says."""
HELDOUT_EVERY = 5
"""Every fifth handwritten sample of a digit is held out, for validation and for test clips in turn."""


@dataclass(frozen=True)
class Mover:
    """One digit: which handwriting, where it starts (shares of the free way, in [0, 1]) and how it moves.

    ``direction`` is a key of ``DIRECTIONS``, ``pace`` one of ``PACES``; ``speed`` is in pixels a frame. The prompt says
    direction and pace where ``told``.
    """

    digit: int
    sample: int
    direction: str
    pace: str
    x: float
    y: float
    speed: float
    told: bool = True

    def named(self, colour: str) -> str:
        motion = f" moving {self.direction} {self.pace}" if self.told else ""
        return f"a {colour} {DIGIT_NAMES[self.digit]}{motion}"


@dataclass(frozen=True)
class DigitClip:
    """What one clip shows; ``render`` draws it."""

    front: Mover
    behind: Mover | None = None

    @property
    def movers(self) -> tuple[Mover, ...]:
        return (self.front,) if self.behind is None else (self.front, self.behind)

    @property
    def prompt(self) -> str:
        """``a red seven moving left fast in front of a green two``, for example."""
        return " in front of ".join(mover.named(colour) for mover, colour in zip(self.movers, COLOURS, strict=False))


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
def samples_of(digit: int, split: str) -> np.ndarray:
    """Indices of the handwritten samples of ``digit`` that belong to a split; no two splits share one."""
    indices = np.flatnonzero(_handwriting()[1] == digit)
    turn = np.arange(len(indices)) % (2 * HELDOUT_EVERY)
    chosen = {VALIDATION: turn == 0, TEST: turn == HELDOUT_EVERY, TRAIN: turn % HELDOUT_EVERY != 0}[split]
    return indices[chosen]


def draw_clip(rng: np.random.Generator, *, level: str = "two", split: str = "train", width: int = WIDTH) -> DigitClip:
    """Draw what a clip ``width`` pixels wide shows; digits, handwriting, motions, places and speeds are all uniform.

    ``width`` must leave two digits ``CLEAR_PIXELS`` between their starts.
    """
    told_share = 1.0 if level == "one" else TOLD_SHARE
    while True:
        movers = [_draw_mover(rng, split, told_share) for _ in range(1 + LEVELS.index(level))]
        clip = DigitClip(*movers)
        if clip.behind is None or abs(clip.front.x - clip.behind.x) * (width - DIGIT_PIXELS) >= CLEAR_PIXELS:
            return clip


def _draw_mover(rng: np.random.Generator, split: str, told_share: float) -> Mover:
    digit = int(rng.integers(10))
    direction, pace = str(rng.choice(list(DIRECTIONS))), str(rng.choice(list(PACES)))
    way = float(rng.random()) * START_SHARE
    return Mover(
        digit=digit,
        sample=int(rng.choice(samples_of(digit, split))),
        direction=direction,
        pace=pace,
        x=way if DIRECTIONS[direction] > 0 else 1 - way,
        y=float(rng.random()),
        speed=float(rng.uniform(*PACES[pace])),
        told=bool(rng.random() < told_share),
    )


def every_prompt() -> list[str]:
    """A prompt of each digit, direction and pace, in front and behind: together they hold every word."""
    words = [(digit, direction, pace) for digit in range(10) for direction in DIRECTIONS for pace in PACES]
    movers = [Mover(digit, 0, direction, pace, 0, 0, 0) for digit, direction, pace in words]
    return [DigitClip(mover, mover).prompt for mover in movers]


def positions(mover: Mover, frames: int, height: int, width: int) -> np.ndarray:
    """Left upper corner of a digit in each frame, ``[frames, 2]`` as (x, y) in pixels; it bounces off the walls."""
    free_x, free_y = width - DIGIT_PIXELS, height - DIGIT_PIXELS
    travelled = mover.x * free_x + np.arange(frames) * DIRECTIONS[mover.direction] * mover.speed
    # A bounce is a reflection: unfold the walls into a triangle wave of period twice the free way.
    folded = np.mod(travelled, 2 * free_x)
    return np.stack([np.minimum(folded, 2 * free_x - folded), np.full(frames, mover.y * free_y)], axis=-1)


def render(clip: DigitClip, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Draw a clip ``[frames, height, width, 3]``, uint8: coloured ink on black, placed to a fraction of a pixel.

    The ink of the digit in front covers the one behind.
    """
    canvas = np.zeros((frames, height, width, 3), dtype=np.float32)
    painted = list(zip(clip.movers, COLOURS.values(), strict=False))
    for mover, colour in reversed(painted):
        ink = _place(_handwriting()[0][mover.sample], positions(mover, frames, height, width), height, width)
        canvas = canvas * (1 - ink) + ink * np.array(colour, dtype=np.float32)
    return np.clip(np.rint(canvas * 255), 0, 255).astype(np.uint8)


def _place(ink: np.ndarray, corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """``ink [D, D]`` at ``corners [frames, 2]`` on empty canvases, ``[frames, height, width, 1]``."""
    canvas = np.zeros((len(corners), height + 1, width + 1, 1), dtype=np.float32)
    for frame, (x, y) in enumerate(corners):
        left, top = int(x), int(y)
        right_share, lower_share = x - left, y - top
        for dy, weight_y in ((0, 1 - lower_share), (1, lower_share)):
            for dx, weight_x in ((0, 1 - right_share), (1, right_share)):
                rows, columns = slice(top + dy, top + dy + DIGIT_PIXELS), slice(left + dx, left + dx + DIGIT_PIXELS)
                canvas[frame, rows, columns, 0] += weight_y * weight_x * ink
    return canvas[:, :height, :width]
