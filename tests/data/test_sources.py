"""Every layout gives the videos that are in it, once each, with their captions, and finds their bytes again."""

from __future__ import annotations

import io
import json
import pickle
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from memory_files import MemoryFiles

from pose_core.data.shards import write_tar
from pose_core.data.sources import SOURCES, claim
from pose_core.errors import DataError

A, B, C = b"film A", b"film B!", b"film C!!"


def tar(samples: dict[str, dict[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    write_tar(buffer, samples.items())
    return buffer.getvalue()


def parquet(columns: dict[str, Any], **how: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **how)
    return buffer.getvalue()


def prompt(text: str, **more: str) -> bytes:
    return json.dumps({"prompt": text} | more).encode()


def found(objects: dict[str, bytes]) -> dict[str, tuple[bytes, str, str]]:
    """Bytes, prompt and split by id; what a sample holds and what its address leads to must be the same."""
    files = MemoryFiles(objects)
    samples = files.samples()
    assert len({sample.id for sample in samples}) == len(samples)
    for sample in samples:
        assert sample.problem == sample.caption_problem == ""
        assert SOURCES[sample.address.source].fetch(sample.address, files) == sample.video
    return {sample.id: (sample.video, sample.caption.prompt, sample.caption.split) for sample in samples}


def problems(objects: dict[str, bytes]) -> dict[str, str]:
    return {sample.id: sample.problem or sample.caption_problem for sample in MemoryFiles(objects).samples()}


def test_tars_of_videos_and_json_or_text() -> None:
    first = tar({"one": {"mp4": A, "json": prompt("a", split="test")}, "folder/two": {"txt": b"b\n", "webm": B}})
    assert found({"x/0.tar": first, "x/1.tar": tar({"one": {"mp4": C, "json": prompt("c")}})}) == {
        "x/0/one": (A, "a", "test"),
        "x/0/folder/two": (B, "b", ""),
        "x/1/one": (C, "c", ""),
    }


def test_long_and_foreign_names_in_a_tar() -> None:
    long, foreign = "n" * 300, "caf\u00e9 \u8d70"
    content = tar({long: {"mp4": A, "json": prompt("a")}, foreign: {"mp4": B, "json": prompt("b")}})
    assert set(found({"0.tar": content})) == {f"0/{long}", f"0/{foreign}"}


def test_other_members_of_a_sample_are_left_alone() -> None:
    assert found({"0.tar": tar({"one": {"mp4": A, "json": prompt("a"), "cls": b"3", "pickle": b"x"}})}) == {
        "0/one": (A, "a", "")
    }


def test_tars_as_cosmos_curate_writes_them() -> None:
    """Videos, metadata and embeddings in tars of their own, by the same keys; pickles are never loaded."""

    def metadata(*captions: dict[str, str]) -> bytes:
        windows = [{"start_frame": 0, "end_frame": 256} | caption for caption in captions]
        return json.dumps({"span_uuid": "u", "width": 1280, "windows": windows}).encode()

    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return pytest.fail, ("a pickle was loaded",)

    place = "v0/resolution_720/aspect_ratio_16_9/frames_0_255"
    objects = {
        f"{place}/video/part_000000/000000.tar": tar({"u1": {"mp4": A}, "u2": {"mp4": B}}),
        f"{place}/metas/part_000000/000000.tar": tar(
            {
                "u1": {"json": metadata({"qwen_caption": "plain"}, {"qwen_caption": "later"})},
                "u2": {"json": metadata({"qwen_caption": "plain", "qwen_lm_enhanced_caption": "rich"})},
            }
        ),
        f"{place}/t5_xxl/part_000000/000000.tar": tar({"u1": {"pickle": pickle.dumps(Trap())}}),
    }
    assert found(objects) == {
        f"{place}/video/part_000000/000000/u1": (A, "plain", ""),
        f"{place}/video/part_000000/000000/u2": (B, "rich", ""),
    }


TABLES = {
    "metadata.csv": b"file_name,caption,split\na.mp4,film a,\nsub/b.MOV,\"film b, cut\",validation\n",
    "captions.jsonl": b'{"path": "a.mp4", "text": "film a"}\n\n{"path": "sub/b.MOV", "text": "film b, cut",'
    b' "split": "validation"}\n',
    "any.parquet": parquet(
        {"file": ["a.mp4", "sub/b.MOV"], "prompt": ["film a", "film b, cut"], "split": ["", "validation"]}
    ),
}  # fmt: skip


@pytest.mark.parametrize("table", TABLES)
def test_videos_with_a_table_of_captions(table: str) -> None:
    objects = {"clips/a.mp4": A, "clips/sub/b.MOV": B, "clips/notes.md": b"x", f"clips/{table}": TABLES[table]}
    assert found(objects) == {
        "clips/a.mp4": (A, "film a", ""),
        "clips/sub/b.MOV": (B, "film b, cut", "validation"),
    }


def test_what_a_table_and_a_folder_do_not_agree_on() -> None:
    table = b"file_name,caption\na.mp4,film a\na.mp4,again\nabsent.mp4,no\n../../etc/passwd,no\nb.mp4,\n"
    assert problems({"a.mp4": A, "b.mp4": B, "c.mp4": C, "metadata.csv": table}) == {
        "metadata.csv#2": "caption: no such file, 'absent.mp4'",
        "metadata.csv#3": "caption: no such file, '../../etc/passwd'",
        "a.mp4": "caption: two rows of tables name this video",
        "b.mp4": "caption: empty prompt",
        "c.mp4": "caption: none",
    }


@pytest.mark.parametrize("table", ["t.csv", "t.jsonl", "t.parquet"])
def test_a_caption_that_is_no_text_costs_only_its_own_video(table: str) -> None:
    content = {
        "t.csv": b"file_name,caption\na.mp4,caf\xff\nb.mp4,fine\n",
        "t.jsonl": b'{"file_name": "a.mp4", "caption": "caf\xff"}\n{"file_name": "b.mp4", "caption": "fine"}\n',
        "t.parquet": parquet(
            {
                "file_name": ["a.mp4", "b.mp4"],
                "caption": pa.Array.from_buffers(
                    pa.string(), 2, pa.array([b"caf\xff", b"fine"]).buffers()
                ),
            }
        ),
    }[table]  # fmt: skip
    assert problems({"a.mp4": A, "b.mp4": B, table: content}) == {"a.mp4": "caption: prompt is not text", "b.mp4": ""}


def test_lines_that_are_no_json_are_named() -> None:
    table = b'{"file_name": "a.mp4", "caption": "a"}\n{"file_name": "b.mp4", "cap\n'
    assert problems({"a.mp4": A, "b.mp4": B, "t.jsonl": table}) == {
        "t.jsonl#1": 'caption: no such file, \'{"file_name": "b.mp4", "cap\'',
        "a.mp4": "",
        "b.mp4": "caption: none",
    }


def test_a_table_that_cannot_be_read_is_named() -> None:
    with pytest.raises(DataError, match="t.parquet is not a readable table"):
        problems({"a.mp4": A, "t.parquet": b"PAR1 and no more"})


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_with_the_bytes_of_videos(nested: bool) -> None:
    videos = [A, B, C]
    cells = [{"bytes": video, "path": "x.mp4"} for video in videos] if nested else videos
    content = parquet({"video": cells, "caption": ["a", "b", "c"], "n": [1, 2, 3]}, row_group_size=2)
    assert found({"p/0.parquet": content}) == {
        "p/0.parquet#0": (A, "a", ""),
        "p/0.parquet#1": (B, "b", ""),
        "p/0.parquet#2": (C, "c", ""),
    }


def test_parquet_that_is_damaged_or_lacks_a_video() -> None:
    whole = parquet({"video": [A, None], "caption": ["a", "b"]})
    listed = problems({"0.parquet": whole, "1.parquet": whole[: len(whole) // 2], "2.parquet": parquet({"n": [1]})})
    assert listed == {
        "0.parquet#0": "",
        "0.parquet#1": "decode: no video in this row",
        "1.parquet": "parquet: unreadable",
    }


def test_one_place_may_hold_several_layouts() -> None:
    files = MemoryFiles(
        {
            "0.tar": tar({"one": {"mp4": A, "json": prompt("a")}}),
            "b.mp4": B,
            "metadata.csv": b"file_name,caption\nb.mp4,b\n",
            "c.parquet": parquet({"video": [C], "caption": ["c"]}),
        }
    )
    assert [unit.source for unit in claim(files.listing(), files)] == ["webdataset", "videos", "parquet"]
    assert {sample.id: sample.caption.prompt for sample in files.samples()} == {
        "0/one": "a",
        "b.mp4": "b",
        "c.parquet#0": "c",
    }


def test_a_unit_changes_with_its_caption_and_its_content() -> None:
    def unit(objects: dict[str, bytes]) -> Any:
        files = MemoryFiles(objects)
        (only,) = claim(files.listing(), files)
        return only

    table = {"t.csv": b"file_name,caption\na.mp4,film a\n"}
    before = unit({"a.mp4": A} | table)
    assert unit({"a.mp4": A} | table) == before
    assert unit({"a.mp4": B} | table) != before
    assert unit({"a.mp4": A, "t.csv": b"file_name,caption\na.mp4,another\n"}) != before
