"""Which clips are kept: one rule a line, each off unless it is asked for, and near duplicates among all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pose_core.data.captions import MISSING
from pose_core.data.inspection import Measures


@dataclass(frozen=True)
class ContentRules:
    """Limits on what a clip shows; None and 0 drop nothing. Grey levels are 0 to 255."""

    max_cropped_share: float | None = None
    max_black_share: float | None = None
    min_brightness_range: float = 0.0
    max_frozen_share: float | None = None
    min_motion: float = 0.0

    def problem(self, clip: Measures) -> str:
        """Why ``clip`` is dropped, ``filter: ...``; empty if it is kept."""
        if self.max_cropped_share is not None and clip.cropped_share > self.max_cropped_share:
            return f"filter: cropped, {clip.cropped_share:.0%} of the picture"
        if self.max_black_share is not None and clip.black_share > self.max_black_share:
            return f"filter: black, {clip.black_share:.0%} of its frames"
        if clip.brightness_range < self.min_brightness_range:
            return f"filter: blank, brightness range {clip.brightness_range:.1f}"
        if self.max_frozen_share is not None and clip.frozen_share > self.max_frozen_share:
            return f"filter: frozen, {clip.frozen_share:.0%} of its frames"
        if clip.motion < self.min_motion:
            return f"filter: still, motion {clip.motion:.2f}"
        return ""


def caption_problem(problem: str, required: bool) -> str:
    """What remains of a caption's ``problem`` where captions may be missing: one that is there must be readable."""
    return "" if problem in MISSING and not required else problem


def near_duplicates(hashes: Sequence[str], max_bits: int) -> list[int]:
    """For each hash (all of one length, hexadecimal) the index of an earlier kept one that differs in at most
    ``max_bits`` bits; -1 for those that are kept themselves.

    Two hashes that differ in at most b bits agree on one of b + 1 stretches of them, so only those with a stretch in
    common are compared: with a million clips that is a few hundred comparisons each instead of a million.
    """
    if not hashes:
        return []
    bits = np.unpackbits(np.array([list(bytes.fromhex(each)) for each in hashes], dtype=np.uint8), axis=1)
    stretches = np.array_split(np.arange(bits.shape[1]), max_bits + 1)
    seen: list[dict[bytes, list[int]]] = [{} for _ in stretches]
    packed = np.packbits(bits, axis=1)
    first: list[int] = []
    for index, row in enumerate(bits):
        keys = [row[stretch].tobytes() for stretch in stretches]
        candidates = sorted({other for table, key in zip(seen, keys, strict=True) for other in table.get(key, ())})
        match = -1
        if candidates:
            differing = np.bitwise_count(packed[candidates] ^ packed[index]).sum(axis=1)
            near = np.flatnonzero(differing <= max_bits)
            match = candidates[near[0]] if len(near) else -1
        first.append(match)
        if match < 0:
            for table, key in zip(seen, keys, strict=True):
                table.setdefault(key, []).append(index)
    return first
