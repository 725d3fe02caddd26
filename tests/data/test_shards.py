"""Shards: what is written comes back, the same inputs give the same bytes, and foreign shards are refused."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pose_core.data import shards
from pose_core.data.buckets import Bucket
from pose_core.data.captions import SPLITS
from pose_core.data.clips import decode
from pose_core.data.moving_digits import LEVELS, DigitClip, Mover, render
from pose_core.errors import DataError

RULES = Bucket(5, 16, 32, 8.0)


def members(tar: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]


def training_rows(count: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "key": [f"clip-{index}@0.000" for index in range(count)],
        "source": [f"clip-{index}" for index in range(count)],
        "prompt": np.array(["ein Läufer", "走る人", "", "a runner"][:count], dtype=object),
        "latents": rng.normal(size=(count, 8, 5, 4, 4)).astype(np.float32),
        "text": rng.normal(size=(count, 16, 8)).astype(np.float16),
        "image": rng.normal(size=(count, 17, 12)).astype(np.float32),
        "first_frame": rng.normal(size=(count, 10, 5, 4, 4)).astype(np.float32),
        "video": rng.integers(0, 256, (count, 9, 32, 32, 3), dtype=np.uint8),
    }


def through_parquet(rows: dict[str, Any]) -> dict[str, Any]:
    return shards.from_table(shards.read_parquet_bytes(shards.parquet_bytes(shards.to_table(rows))))


def test_tar_holds_the_samples_in_order_and_without_the_writer_s_time_or_name(tmp_path: Path) -> None:
    samples = [("b/one", {"mp4": b"film", "json": b"{}"}), ("a", {"mp4": b""})]
    shards.write_tar(tmp_path / "0.tar", samples)
    buffer = io.BytesIO()
    shards.write_tar(buffer, iter(samples))
    assert (tmp_path / "0.tar").read_bytes() == buffer.getvalue()
    assert list(members(buffer.getvalue()).items()) == [("b/one.mp4", b"film"), ("b/one.json", b"{}"), ("a.mp4", b"")]
    with tarfile.open(tmp_path / "0.tar") as archive:
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in archive} == {(0, 0, 0, "")}


@pytest.mark.parametrize("keys", [["v1.5"], ["a", "a"], [""]])
def test_tar_refuses_keys_that_readers_would_mix_up(keys: list[str]) -> None:
    with pytest.raises(DataError, match="rename it"):
        shards.write_tar(io.BytesIO(), [(key, {"mp4": b"x"}) for key in keys])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("split", SPLITS)
def test_digits_tar_gives_the_same_bytes_twice(split: str, level: str) -> None:
    assert shards.digits_tar(3, 1, 12, split, level, RULES) == shards.digits_tar(3, 1, 12, split, level, RULES)


def test_digits_tars_differ_by_seed_index_and_split() -> None:
    calls = [(0, 0, "train"), (1, 0, "train"), (0, 1, "train"), (0, 0, "validation"), (0, 0, "test")]
    tars = [shards.digits_tar(seed, index, 2, split, "two", RULES) for seed, index, split in calls]
    captions = [tuple(content for name, content in members(tar).items() if name.endswith("json")) for tar in tars]
    assert len(set(captions)) == 5


@pytest.mark.parametrize("level", LEVELS)
def test_digits_tar_shows_what_its_captions_say(level: str) -> None:
    files = members(shards.digits_tar(0, 2, 6, "test", level, RULES))
    keys = sorted({name.split(".")[0] for name in files})
    assert keys == [f"test-00002-{number:04d}" for number in range(6)]
    for key in keys:
        caption = json.loads(files[f"{key}.json"])
        prompt, split = caption.pop("prompt"), caption.pop("split")
        clip = DigitClip(*(Mover(**mover) for mover in caption.values() if mover is not None))
        assert (prompt, split) == (clip.prompt, "test") and len(clip.movers) == 1 + LEVELS.index(level)
        frames, times = decode(files[f"{key}.mp4"])
        assert times == pytest.approx(np.arange(5) / 8)
        assert np.abs(frames.astype(int) - render(clip, 5, 16, 32)).mean() < 1


def test_tars_of_different_splits_share_no_handwriting() -> None:
    def handwriting(split: str) -> set[int]:
        files = members(shards.digits_tar(0, 0, 100, split, "one", Bucket(1, 16, 32, 8.0)))
        return {json.loads(content)["front"]["sample"] for name, content in files.items() if name.endswith("json")}

    used = [handwriting(split) for split in SPLITS]
    assert len(set.union(*used)) == sum(map(len, used))


def test_canvas_without_room_is_refused_by_the_name_of_its_setting() -> None:
    with pytest.raises(DataError, match=r"data\.width = 32 x 16 .* at least 12 x 27") as caught:
        shards.digits_tar(0, 0, 1, "train", "two", Bucket(5, 32, 16, 8.0))
    assert caught.value.exit_code == 2


def test_training_shard_comes_back_as_it_was_written() -> None:
    rows = training_rows()
    back = through_parquet(rows)
    assert list(back) == list(rows)
    assert back["key"] == rows["key"] and back["prompt"] == list(rows["prompt"])
    for name in ("latents", "text", "image", "first_frame", "video"):
        assert back[name].dtype == rows[name].dtype
        assert np.array_equal(back[name], rows[name])


def test_text_to_video_shards_have_no_image_columns() -> None:
    rows = training_rows()
    kept = {name: rows[name] for name in ("key", "prompt", "latents", "text")}
    assert list(through_parquet(kept)) == ["key", "prompt", "latents", "text"]


@pytest.mark.parametrize("count", [0, 1])
def test_shards_of_no_and_one_row(count: int) -> None:
    back = through_parquet(training_rows(count))
    assert back["latents"].shape == (count, 8, 5, 4, 4) and len(back["key"]) == count


def test_memory_order_of_the_array_does_not_matter() -> None:
    flipped = np.arange(24, dtype=np.float32).reshape(4, 3, 2).transpose(2, 1, 0)
    table = shards.to_table({"any": flipped})
    assert table["any"].type == pa.fixed_shape_tensor(pa.float32(), (3, 4))
    assert np.array_equal(shards.from_table(table)["any"], flipped)


def test_shards_in_several_row_groups_and_chunks_come_back_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 100_000)
    rows = training_rows()
    content = shards.parquet_bytes(shards.to_table(rows))
    assert pq.ParquetFile(io.BytesIO(content)).num_row_groups > 1
    table = shards.read_parquet_bytes(content)
    assert np.array_equal(shards.from_table(table)["video"], rows["video"])
    twice = pa.concat_tables([table, table])
    assert np.array_equal(shards.from_table(twice)["text"], np.concatenate([rows["text"], rows["text"]]))


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ({"latents": np.zeros((2, 8, 4, 4), np.float32)}, r"'latents' .* needs cells \[C T h w\]"),
        ({"key": np.zeros((2, 3))}, "'key' .* needs cells"),
        ({"any": [1, 2]}, "text or tensors"),
        ({"any": ["a", None]}, "text or tensors"),
        ({"any": [[1.0], [2.0, 3.0]]}, "text or tensors"),
        ({"any": np.zeros((2, 2), dtype=complex)}, "must hold numbers"),
        ({"key": ["a"], "prompt": ["a", "b"]}, "equally many rows"),
    ],
)
def test_columns_that_do_not_fit_are_named(rows: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        shards.to_table(rows)


def test_shards_of_another_version_or_none_are_refused() -> None:
    table = shards.to_table(training_rows())
    newer = shards.parquet_bytes(table.replace_schema_metadata({shards.VERSION_KEY: b"99"}))
    with pytest.raises(DataError, match="version 99, this program reads 2: run prepare_data again"):
        shards.read_parquet_bytes(newer)
    with pytest.raises(DataError, match="version none"):
        shards.read_parquet_bytes(shards.parquet_bytes(table.replace_schema_metadata(None)))


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"no parquet at all"])
def test_unreadable_shards_are_refused(damage: bytes) -> None:
    whole = shards.parquet_bytes(shards.to_table(training_rows()))
    for content in (damage, whole[:-100]):
        with pytest.raises(DataError, match="not readable Parquet"):
            shards.read_parquet_bytes(content)


def test_a_flipped_bit_is_noticed() -> None:
    content = bytearray(shards.parquet_bytes(shards.to_table(training_rows())))
    content[len(content) // 2] ^= 1
    with pytest.raises(DataError, match="not readable Parquet"):
        shards.read_parquet_bytes(bytes(content))


def test_a_shard_says_how_it_was_made() -> None:
    details = {"encoders": {"vae": "abc"}, "bucket": "9x32x32"}
    content = shards.parquet_bytes(shards.to_table(training_rows(), details))
    assert shards.details_of(shards.read_parquet_bytes(content)) == details
