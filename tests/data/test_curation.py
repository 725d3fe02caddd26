"""Each rule drops what it names and nothing while it is off; near duplicates; where kept clips go."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pose_core.data.captions import HELDOUT, TEST, TRAIN, Caption
from pose_core.data.clip_list import (
    Clip,
    clips_of,
    judge,
    plan_shards,
    read_table,
    split_of,
    table_bytes,
)
from pose_core.data.curation import ContentRules, near_duplicates
from pose_core.data.inspection import Inspection, Measures
from pose_core.data.sources.source import Address, Sample, Stored

PLAIN = Measures(0.0, "9x32x32", 0.1, 200.0, 0.0, 0.0, 5.0, "00" * 24)
BAD = replace(PLAIN, cropped_share=0.6, brightness_range=1.0, black_share=0.9, frozen_share=0.8, motion=0.01)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ({"max_cropped_share": 0.5}, "filter: cropped, 60% of the picture"),
        ({"max_black_share": 0.5}, "filter: black, 90% of its frames"),
        ({"min_brightness_range": 8.0}, "filter: blank, brightness range 1.0"),
        ({"max_frozen_share": 0.5}, "filter: frozen, 80% of its frames"),
        ({"min_motion": 1.0}, "filter: still, motion 0.01"),
    ],
)
def test_each_rule_drops_alone_what_it_names(rule: dict[str, float], reason: str) -> None:
    assert ContentRules(**rule).problem(BAD) == reason
    assert ContentRules(**rule).problem(PLAIN) == ""
    assert ContentRules().problem(BAD) == ""


def brute(hashes: list[str], bits: int) -> list[int]:
    numbers, kept, found = [int(each, 16) for each in hashes], list[int](), []
    for index, number in enumerate(numbers):
        twin = next((other for other in kept if (numbers[other] ^ number).bit_count() <= bits), -1)
        found.append(twin)
        if twin < 0:
            kept.append(index)
    return found


@pytest.mark.parametrize("bits", [0, 1, 6, 12, 24])
def test_near_duplicates_are_those_a_comparison_of_all_with_all_finds(bits: int) -> None:
    rng = np.random.default_rng(bits)
    hashes = [rng.bytes(24).hex() for _ in range(40)]
    for origin in rng.integers(0, 40, 80):
        number = int(hashes[origin], 16)
        for place in rng.choice(192, int(rng.integers(0, 2 * bits + 2)), replace=False):
            number ^= 1 << int(place)
        hashes.append(f"{number:048x}")
    found = near_duplicates(hashes, bits)
    assert found == brute(hashes, bits) and max(found) >= 0
    assert near_duplicates([], bits) == []


def sample(name: str, **changes: Any) -> Sample:
    address = Address("webdataset", Stored("0.tar", 10, "v1"), 512, 100)
    values: dict[str, Any] = {"caption": Caption("a square"), "caption_problem": ""}
    return Sample(name, address, b"film", **(values | changes))


def clip(name: str, measures: Measures = PLAIN, **changes: Any) -> Clip:
    (only,) = clips_of(sample(name, **changes), Inspection(clips=[measures]))
    return only


def judged(clips: list[Clip], bits: int | None = None, captions: bool = True) -> dict[str, str]:
    return {each.key: each.problem for each in judge(clips, ContentRules(min_motion=1.0), bits, captions)}


def test_a_key_is_the_video_s_id_and_the_time_the_clip_starts_at() -> None:
    video = Inspection(clips=[PLAIN, replace(PLAIN, start=2.135467)])
    assert [each.key for each in clips_of(sample("0/one"), video)] == ["0/one@0.000", "0/one@2.135"]
    (bad,) = clips_of(sample("0/one"), Inspection(problem="decode: no frames"))
    assert (bad.key, bad.problem) == ("0/one", "decode: no frames")


def test_the_first_problem_is_the_one_that_is_named() -> None:
    no_caption = {"caption": Caption(""), "caption_problem": "caption: no prompt"}
    clips = [clip("a", BAD), clip("b", **no_caption), clip("c"), clip("d", caption_problem="caption: too long, 9")]
    assert judged(clips) == {
        "a@0.000": "filter: still, motion 0.01",
        "b@0.000": "caption: no prompt",
        "c@0.000": "",
        "d@0.000": "caption: too long, 9",
    }
    without = judged(clips, captions=False)
    assert without["b@0.000"] == "" and without["d@0.000"] == "caption: too long, 9"


def test_of_near_duplicates_the_first_key_stays_in_whatever_order_they_come() -> None:
    near, far = replace(PLAIN, hash="01" + "00" * 23), replace(PLAIN, hash="ff" * 24)
    clips = [clip("c", far), clip("b", near), clip("a"), clip("0", replace(BAD, hash=PLAIN.hash))]
    expected = {
        "0@0.000": "filter: still, motion 0.01",
        "a@0.000": "",
        "b@0.000": "filter: duplicate, of a@0.000",
        "c@0.000": "",
    }
    assert judged(clips, 1) == judged(clips[::-1], 1) == expected
    assert judged(clips, 0)["b@0.000"] == judged(clips)["b@0.000"] == ""


def test_two_clips_never_share_a_key() -> None:
    problems = [each.problem for each in judge([clip("a"), clip("a")], ContentRules(), None, True)]
    assert problems == ["", "source: a key that comes again"]


def test_the_list_of_clips_survives_being_written() -> None:
    clips = judge([clip("a"), clip("b", BAD, problem="decode: no frames")], ContentRules(), None, True)
    assert Clip.from_json(clip("a").to_json()) == clip("a")
    content = table_bytes(clips, 0.0)
    assert read_table(content) == clips
    columns = pq.read_table(io.BytesIO(content)).to_pydict()
    assert columns["key"] == ["a@0.000", "b"] and columns["split"] == ["train", ""]
    assert columns["problem"] == ["", "decode: no frames"]


def test_the_clips_of_a_video_are_all_on_one_side() -> None:
    videos = [
        clips_of(sample(f"v{number}"), Inspection(clips=[PLAIN, replace(PLAIN, start=2.0)])) for number in range(400)
    ]
    splits = [{split_of(each, 0.25) for each in clips} for clips in videos]
    assert all(len(split) == 1 for split in splits)
    for name in HELDOUT:
        assert sum(name in split for split in splits) == pytest.approx(50, abs=20)
    assert split_of(clip("x", caption=Caption("a", TEST)), 0.0) == TEST


def test_a_shard_holds_one_split_and_one_bucket() -> None:
    tall = replace(PLAIN, bucket="9x48x16")
    clips = [clip(f"v{number}", tall if number % 3 else PLAIN) for number in range(20)]
    plans = plan_shards(clips, 4, 0.3, 2, "recipe")
    assert sorted(each.key for plan in plans for each in plan.clips) == sorted(each.key for each in clips)
    for plan in plans:
        assert {each.measures.bucket for each in plan.clips} == {plan.bucket} and 1 <= len(plan.clips) <= 4
        assert {split_of(each, 0.3) for each in plan.clips} == {plan.split}
        assert plan.path == f"{plan.split}/{plan.bucket}/{plan.id}.parquet"
    (alone,) = plan_shards([clip("v")], 4, 0.0, 1, "recipe")
    assert alone.path == f"{TRAIN}/{alone.id}.parquet"


def test_a_shard_s_name_changes_with_its_recipe_and_its_clips() -> None:
    def name(recipe: str, **changes: Any) -> str:
        (plan,) = plan_shards([replace(clip("v"), **changes)], 4, 0.0, 1, recipe)
        return plan.id

    moved = replace(clip("v").address, stored=Stored("0.tar", 10, "v2"))
    names = {name("one"), name("two"), name("one", prompt="another"), name("one", address=moved)}
    assert len(names) == 4 and name("one") in names


def test_the_order_of_shards_depends_on_their_clips_alone() -> None:
    def order(recipe: str, version: str) -> list[list[str]]:
        clips = [clip(f"v{number:02}") for number in range(20)]
        stored = Stored("0.tar", 10, version)
        clips = [replace(each, address=replace(each.address, stored=stored)) for each in clips]
        plans = sorted(plan_shards(clips, 4, 0.0, 1, recipe), key=lambda plan: plan.path)
        return [[each.key for each in plan.clips] for plan in plans]

    assert order("one", "v1") == order("two", "v1") == order("one", "v2"), "encoders and dates have no say in it"
