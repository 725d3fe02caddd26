"""Each kind of hostile file gives the right clip or a reason, and its neighbours come out whole."""

from __future__ import annotations

from collections.abc import Callable

import footage
import hostile
import numpy as np
import pytest
from memory_files import MemoryFiles

from pose_core.data.buckets import Bucket
from pose_core.data.clip_list import Clip, clips_of, judge
from pose_core.data.clips import read_clip
from pose_core.data.curation import ContentRules
from pose_core.data.inspection import InspectionRules, inspect_video
from pose_core.data.sources import SOURCES

BUCKET = Bucket(9, 32, 32, 8.0)
RULES = InspectionRules((BUCKET,), min_side_pixels=16)
Make = Callable[[int], hostile.Hostile]


def curated(objects: dict[str, bytes], max_bytes: int = 1 << 30) -> tuple[list[Clip], MemoryFiles]:
    """Every clip of these objects with what the rules say to it."""
    files = MemoryFiles(objects)
    clips = [
        clip
        for sample in files.samples(max_bytes)
        for clip in clips_of(sample, None if sample.problem else inspect_video(sample.video, RULES))
    ]
    return judge(clips, ContentRules(), None, captions=True), files


def pixels(clip: Clip, files: MemoryFiles) -> np.ndarray:
    return read_clip(SOURCES[clip.address.source].fetch(clip.address, files), BUCKET, clip.measures.start)


def good(seed: int) -> hostile.Hostile:
    return hostile.Hostile("good", hostile.GOOD, {"mp4": footage.good(seed), "json": hostile.caption(seed)})


def is_right(clip: np.ndarray, seed: int) -> bool:
    """Whether a clip shows ``moving_square(seed)``; codecs of eight bits and half colours blur its edges a little."""
    return float(np.abs(clip.astype(int) - footage.moving_square(seed)).mean()) < 6


EVERY = [make for kinds in (hostile.VIDEOS, hostile.CAPTIONS, hostile.IN_TARS) for make in kinds]


@pytest.mark.parametrize("make", EVERY, ids=lambda make: make(0).kind)
def test_it_gives_the_right_clip_or_a_reason_and_spares_its_neighbours(make: Make) -> None:
    bad = make(5)
    objects = {"0.tar": hostile.tar_of([("before", good(1)), ("odd", bad), ("after", good(2))])}
    clips, files = curated(objects)
    by_source = {clip.source: clip for clip in clips}
    for name, seed in (("0/before", 1), ("0/after", 2)):
        assert by_source[name].problem == "" and by_source[name].prompt == f"a square {seed}"
        assert is_right(pixels(by_source[name], files), seed)
    (odd,) = (clip for clip in clips if clip.source not in ("0/before", "0/after"))
    if bad.outcome == hostile.GOOD:
        assert odd.problem == "" and odd.key == "0/odd@0.000"
        # An interlaced frame is 64 x 64; what is left of combing would show at half that size.
        assert bad.kind == "interlaced" or is_right(pixels(odd, files), 5)
    elif bad.outcome != hostile.EITHER:
        assert odd.problem.startswith(bad.outcome)


def test_a_tar_cut_short_keeps_what_came_before() -> None:
    whole = hostile.tar_of([(f"clip-{seed}", good(seed)) for seed in range(4)])
    for length in (len(whole) // 2, len(whole) // 2 + 512, 700):
        clips, files = curated({"0.tar": whole[:length]})
        kept = [clip for clip in clips if not clip.problem]
        assert all(is_right(pixels(clip, files), int(clip.source[-1])) for clip in kept)
        assert any(clip.problem.startswith("tar: cut short") for clip in clips)
        assert len(kept) == (0 if length == 700 else 1) or length > 700


def test_a_damaged_header_costs_one_sample() -> None:
    content = bytearray(hostile.tar_of([(f"clip-{seed}", good(seed)) for seed in range(3)]))
    at = content.index(b"clip-1.mp4")
    content[at + 130 : at + 160] = b"\xff" * 30
    clips, files = curated({"0.tar": bytes(content)})
    kept = {clip.source for clip in clips if not clip.problem}
    assert kept == {"0/clip-0", "0/clip-2"}
    assert any(clip.problem.startswith("tar: damaged") for clip in clips)


def test_a_key_that_comes_again_gives_its_first_clip_and_a_reason() -> None:
    samples = [("twin", good(1)), ("other", good(2)), ("twin", good(3))]
    clips, files = curated({"0.tar": hostile.tar_of(samples)})
    problems = {clip.key: clip.problem for clip in clips}
    assert problems["0/twin@0.000"] == problems["0/other@0.000"] == ""
    assert sorted(problems.values()) == ["", "", "tar: a key that comes again"]
    first = next(clip for clip in clips if clip.key == "0/twin@0.000")
    assert is_right(pixels(first, files), 1)


def test_a_video_over_the_limit_is_never_read() -> None:
    clips, _ = curated({"0.tar": hostile.tar_of([("clip", good(1))])}, max_bytes=100)
    assert clips[0].problem.startswith("decode: 0 MiB are more than")


def test_no_damage_to_a_tar_raises() -> None:
    whole = hostile.tar_of([(f"clip-{seed}", good(seed)) for seed in range(2)])
    rng = np.random.default_rng(0)
    for _ in range(60):
        content = np.frombuffer(whole, np.uint8).copy()
        content[rng.integers(0, len(content), 40)] = rng.integers(0, 256, 40)
        content[rng.integers(0, 512, 3)] = rng.integers(0, 256, 3)
        clips, _ = curated({"0.tar": content.tobytes()})
        assert clips


def test_no_damage_to_a_video_raises() -> None:
    for seed in range(150):
        inspected = inspect_video(hostile.damaged(seed), RULES)
        assert inspected.problem or inspected.clips
