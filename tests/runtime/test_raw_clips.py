"""Raw training reads the very clips that curation kept, in shards of one size, from wherever they are."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import footage
import numpy as np
import pytest

from pose_core.data.buckets import Bucket
from pose_core.data.clip_list import Clip, clips_of, table_bytes
from pose_core.data.clips import read_clip
from pose_core.data.inspection import InspectionRules, inspect_video
from pose_core.data.shards import write_tar
from pose_core.data.sources import SOURCES, claim
from pose_core.errors import ReplacedError
from pose_core.runtime.raw_clips import CLIP_LIST, RawClips
from pose_core.runtime.raw_files import RawFiles
from pose_core.runtime.steady_files import SteadyFiles
from pose_core.runtime.storage import Store

good = functools.cache(footage.good)
"""One encoding of each: another run of the encoder may give other bytes."""
WIDE, SHORT = Bucket(5, 32, 32, 8.0), Bucket(3, 32, 32, 8.0)


def sample(seed: int, split: str) -> dict[str, bytes]:
    return {"mp4": good(seed), "json": json.dumps({"prompt": f"square {seed}", "split": split}).encode()}


@pytest.fixture
def raw(tmp_path: Path) -> RawClips:
    """Six videos in a tar, one of them for the test, and one in a file beside a table; the third is not kept."""
    (tmp_path / "raw").mkdir()
    write_tar(
        tmp_path / "raw/0.tar", [(f"s{seed}", sample(seed, "test" if seed == 5 else "train")) for seed in range(6)]
    )
    (tmp_path / "raw/film.mp4").write_bytes(good(7))
    (tmp_path / "raw/metadata.csv").write_text("file_name,caption,split\nfilm.mp4,square 7,train\n")
    files, listed = RawFiles(SteadyFiles(Store.open(str(tmp_path / "raw")), 0)), Store.open(str(tmp_path / "listed"))
    clips: list[Clip] = []
    for unit in claim(files.store.stored(), files):
        for each in SOURCES[unit.source].samples(unit, files, 1 << 20):
            clips += clips_of(each, inspect_video(each.video, InspectionRules(buckets=(WIDE,))))
    clips[2] = replace(clips[2], problem="filter: still")
    clips[4] = replace(clips[4], measures=replace(clips[4].measures, bucket=SHORT.name))
    listed.write_bytes(CLIP_LIST, table_bytes(clips, 0.0))
    return RawClips(files, listed, clips_per_shard=2, heldout_fraction=0.0, frames_per_second=8.0)


def test_shards_hold_the_training_clips_that_were_kept_each_of_one_size(raw: RawClips) -> None:
    shards = raw.shards()
    found = [[clip.key for clip in shard.clips] for shard in shards]
    assert sorted(key for keys in found for key in keys) == [
        *(f"0/s{seed}@0.000" for seed in (0, 1, 3, 4)),
        "film.mp4@0.000",
    ]
    assert all(len(keys) <= 2 for keys in found)
    assert {shard.bucket for shard in shards} == {WIDE.name, SHORT.name}
    assert all({clip.measures.bucket for clip in shard.clips} == {shard.bucket} for shard in shards)


def test_what_is_decoded_are_the_pixels_that_preparing_encodes(raw: RawClips) -> None:
    clips = [clip for shard in raw.shards() for clip in shard.clips]
    decoded = raw.decode(clips)
    assert decoded.quarantine == [] and decoded.counts == {WIDE.name: 4, SHORT.name: 1}
    for name, columns in decoded.blocks.items():
        bucket = Bucket.named(name, 8.0)
        for prompt, video in zip(columns["prompt"], columns["video"], strict=True):
            assert np.array_equal(video, read_clip(good(int(prompt.split()[1])), bucket))


def test_a_clip_that_cannot_be_read_costs_only_itself(raw: RawClips) -> None:
    clips = [clip for shard in raw.shards() for clip in shard.clips if clip.address.start]
    broken = replace(clips[0], address=replace(clips[0].address, start=clips[0].address.start + 512, size=700))
    decoded = raw.decode([broken, *clips[1:]])
    assert sum(decoded.counts.values()) == len(clips) - 1
    (line,) = map(json.loads, decoded.quarantine)
    assert line["key"] == broken.key and line["shard"].endswith("raw/0.tar") and line["reason"].startswith("decode: ")


def test_a_video_that_was_replaced_is_not_taken_for_the_one_on_the_list(raw: RawClips) -> None:
    clips = [clip for shard in raw.shards() for clip in shard.clips]
    raw.files.store.write_bytes("film.mp4", good(8))
    with pytest.raises(ReplacedError, match=r"film\.mp4 was replaced"):
        raw.decode(clips)
