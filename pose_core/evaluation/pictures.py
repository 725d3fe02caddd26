"""Pictures that let a person compare videos: a contact sheet for paper and browser, a row of videos for one mp4."""

from __future__ import annotations

import textwrap

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pose_core.errors import DataError

Video = NDArray[np.uint8]
"""``[T, H, W, 3]`` uint8 RGB."""

SHEET_MIN_HEIGHT, SHEET_MAX_HEIGHT = 96, 192
SHEET_WIDTH = 1600
"""Pixels a sheet may take before its blocks no longer stand side by side."""

PAPER, INK, PALE = (246, 246, 244), (32, 32, 36), (96, 96, 102)
GAP, BLOCK_GAP, MARGIN = 3, 28, 24
CAPTION_SIZE, LABEL_SIZE = 17, 15


def contact_sheet(rows: list[tuple[str, list[Video]]], captions: list[str], *, frames_shown: int = 5) -> Image.Image:
    """One block a clip: its caption, then a line of evenly spaced frames for each label.

    Args:
        rows: ``(label, videos)``, for example ``("one step", [...])``; every list holds one video a caption, each
            ``[T, H, W, 3]`` uint8. Sizes and lengths may differ between videos.
        captions: one prompt a clip.
        frames_shown: frames a line, first and last included; a shorter video shows all of its frames.

    Returns:
        An RGB picture. Frames are 96 to 192 pixels high: smaller ones grow by a whole factor, with sharp pixels.

    Raises:
        DataError: if a list does not hold one video a caption, or an array is not a uint8 video.
    """
    if not rows or not captions:
        raise DataError("a contact sheet needs at least one row of videos and one caption")
    for label, videos in rows:
        if len(videos) != len(captions):
            raise DataError(f"contact sheet: {label!r} has {len(videos)} videos for {len(captions)} captions")
    lines = [[_strip(video, frames_shown) for video in videos] for _, videos in rows]
    label_font = ImageFont.load_default(LABEL_SIZE)
    indent = int(max(label_font.getlength(label) for label, _ in rows)) + 14
    width = indent + max(strip.width for strips in lines for strip in strips)
    labels = [label for label, _ in rows]
    blocks = [
        _block(caption, labels, [strips[clip] for strips in lines], width, indent)
        for clip, caption in enumerate(captions)
    ]
    return _arrange(blocks)


def side_by_side(videos: list[Video], *, min_height: int = 128) -> Video:
    """Put videos in one row, ``[T, H', W', 3]`` uint8, as for one mp4 that shows real, teacher and one step.

    All are brought to one height of at least ``min_height`` pixels (small ones grow by a whole factor, with sharp
    pixels). A shorter video rests on its last frame. ``H'`` and ``W'`` are even, as H.264 wants them.

    Raises:
        DataError: if there is no video, or an array is not a uint8 video.
    """
    if not videos:
        raise DataError("side_by_side needs at least one video")
    height = max(_enlarged(_checked(video).shape[1], min_height) for video in videos)
    frames = []
    for index in range(max(len(video) for video in videos)):
        frames.append(_row([_resize(video[min(index, len(video) - 1)], height) for video in videos]))
    return np.stack([np.pad(frame, _to_even(frame), mode="edge") for frame in map(np.asarray, frames)])


def _to_even(frame: NDArray[np.uint8]) -> list[tuple[int, int]]:
    return [(0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)]


def _checked(video: Video) -> Video:
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise DataError(f"a video must be uint8 [T, H, W, 3], this one is {video.dtype} {list(video.shape)}")
    return video


def _enlarged(height: int, least: int) -> int:
    return height * -(-least // height)


def _resize(frame: NDArray[np.uint8], height: int) -> Image.Image:
    image = Image.fromarray(frame)
    # A whole factor keeps the true pixels of a small video visible; any other ratio needs a filter.
    method = Image.Resampling.NEAREST if height % image.height == 0 else Image.Resampling.LANCZOS
    return image.resize((max(1, round(image.width * height / image.height)), height), method)


def _row(images: list[Image.Image]) -> Image.Image:
    width = sum(image.width for image in images) + GAP * (len(images) - 1)
    row = Image.new("RGB", (width, max(image.height for image in images)), PAPER)
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + GAP
    return row


def _strip(video: Video, frames_shown: int) -> Image.Image:
    """Evenly spaced frames of one video, side by side."""
    count, height = _checked(video).shape[:2]
    shown = np.linspace(0, count - 1, min(frames_shown, count)).round().astype(int)
    height = min(_enlarged(height, SHEET_MIN_HEIGHT), SHEET_MAX_HEIGHT)
    return _row([_resize(video[index], height) for index in shown])


def _block(caption: str, labels: list[str], strips: list[Image.Image], width: int, indent: int) -> Image.Image:
    caption_font, label_font = ImageFont.load_default(CAPTION_SIZE), ImageFont.load_default(LABEL_SIZE)
    characters = max(10, int((width - indent) / caption_font.getlength("n")))
    text = textwrap.fill(caption, characters, max_lines=2, placeholder=" …")
    top = int(ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=caption_font)[3]) + 8
    block = Image.new("RGB", (width, top + sum(strip.height + GAP for strip in strips) - GAP), PAPER)
    draw = ImageDraw.Draw(block)
    draw.multiline_text((indent, 0), text, fill=INK, font=caption_font)
    for label, strip in zip(labels, strips, strict=True):
        draw.text((indent - 10, top + strip.height // 2), label, fill=PALE, font=label_font, anchor="rm")
        block.paste(strip, (indent, top))
        top += strip.height + GAP
    return block


def _arrange(blocks: list[Image.Image]) -> Image.Image:
    """Blocks of equal width in reading order, side by side while that fits the sheet and is not wider than long."""
    width, height = blocks[0].width, max(block.height for block in blocks)
    columns = max(1, min(SHEET_WIDTH // (width + BLOCK_GAP), round(len(blocks) ** 0.5)))
    lines = -(-len(blocks) // columns)
    size = (columns * (width + BLOCK_GAP) - BLOCK_GAP, lines * (height + BLOCK_GAP) - BLOCK_GAP)
    sheet = Image.new("RGB", (size[0] + 2 * MARGIN, size[1] + 2 * MARGIN), PAPER)
    for index, block in enumerate(blocks):
        line, column = divmod(index, columns)
        sheet.paste(block, (MARGIN + column * (width + BLOCK_GAP), MARGIN + line * (height + BLOCK_GAP)))
    return sheet
