"""Compares folders of video files by how they move, on any machine: no network, no settings, no run."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pose_core.data.clips import decode, fit
from pose_core.errors import DataError
from pose_core.evaluation.motion import Motion, collapsed, measure, summarise
from pose_core.evaluation.report import figures_table

CONTAINERS = {
    ".mp4": "mp4",
    ".m4v": "mp4",
    ".mov": "mp4",
    ".webm": "matroska",
    ".mkv": "matroska",
    ".avi": "avi",
    ".gif": "gif",
}
"""File names that are videos, and the containers in them."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
LOWEST_SHARE = 0.3
"""Share of the first folder's speed below which motion has collapsed; as ``alarms.lowest_share``."""


def compare_folders(
    folders: Sequence[Path], images: Path | None, advance: Callable[[str, int, int], None]
) -> dict[str, dict[str, float]]:
    """Figures of every folder's videos by its name, see ``evaluation.motion.summarise``.

    ``images`` holds the first frames that the videos were made from: ``<name>.png`` belongs to ``<name>.mp4`` and to
    ``<name>-0.mp4``. ``advance`` is told a folder, how many of its videos are done, and how many there are.

    Raises:
        DataError: there is no such folder, no video in it, or one that cannot be read (correctable in the call).
    """
    found = {}
    for name, folder in zip(_names(folders), folders, strict=True):
        files = _videos(folder)
        measured = []
        for done, file in enumerate(files, start=1):
            measured.append(measure_file(file, _first_frame(file, images)))
            advance(name, done, len(files))
        found[name] = summarise(measured)
    return found


def measure_file(file: Path, image: Path | None = None) -> Motion:
    """Figures of one video file, perhaps against the picture it was made from.

    Raises:
        DataError: it cannot be read, or is a single frame (correctable in the call).
    """
    try:
        frames, times = decode(file.read_bytes())
        # A file of even spacing has its rate; one without times is taken for the usual one.
        seconds = float(times[-1] - times[0]) if len(times) > 1 else 0.0
        rate = (len(frames) - 1) / seconds if seconds > 0 else 24.0
        given = None
        if image is not None:
            picture = Image.open(io.BytesIO(image.read_bytes())).convert("RGB")
            given = fit(np.asarray(picture), *frames.shape[1:3])
        return measure(frames, rate, given)
    except (DataError, UnidentifiedImageError) as error:
        raise DataError(f"{file}: {error}; leave it out, or write it again", in_call=True) from None


def report(figures: dict[str, dict[str, float]]) -> str:
    """The figures as a Markdown table, and a line for every folder that hardly moves beside the first."""
    lines = [figures_table(figures, decimals=3)]
    first, *_ = figures
    for name, gone in zip(figures, collapsed(list(figures.values()), LOWEST_SHARE), strict=True):
        if gone:
            speed, reference = figures[name]["speed"], figures[first]["speed"]
            lines.append(f"{name} has collapsed towards still pictures: speed {speed:.3f}, {first} {reference:.3f}\n")
        elif figures[name]["still"] == 100:
            lines.append(f"{name} holds nothing but still pictures\n")
    return "\n".join(lines)


def _names(folders: Sequence[Path]) -> list[str]:
    """As short as tells them apart."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _videos(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: name folders of videos", in_call=True)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in CONTAINERS and path.is_file())
    if not files:
        raise DataError(f"{folder} holds no video ({' '.join(CONTAINERS)})", in_call=True)
    return files


def _first_frame(video: Path, images: Path | None) -> Path | None:
    if images is None:
        return None
    stem, _, index = video.stem.rpartition("-")
    for name in (video.stem, *([stem] if index.isdecimal() else [])):
        for suffix in PICTURES:
            if (images / f"{name}{suffix}").is_file():
                return images / f"{name}{suffix}"
    raise DataError(f"{images} holds no {video.stem}.png or .jpg, the first frame of {video}", in_call=True)
