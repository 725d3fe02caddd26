"""A person's own raw folder through ``prepare_data`` alone: bad clips are named, their neighbours are kept."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pose_core.data.clips import encode_mp4
from pose_core.data.moving_digits import draw_clip, render
from pose_core.data.shards import from_table, read_parquet_bytes, write_tar
from pose_core.runtime.local_ray import LocalRay

pytestmark = pytest.mark.integration

Members = dict[str, bytes]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What a client of a running cluster has in its environment."""
    with LocalRay(tmp_path_factory.mktemp("cluster")) as ray:
        yield ray.environment


def good(seed: int) -> Members:
    clip = draw_clip(np.random.default_rng(seed))
    return {"mp4": encode_mp4(render(clip), 8.0), "json": json.dumps({"prompt": clip.prompt}).encode()}


def empty() -> Members:
    return good(0) | {"mp4": b""}


def truncated() -> Members:
    whole = good(1)
    return whole | {"mp4": whole["mp4"][: len(whole["mp4"]) // 2]}


def without_prompt() -> Members:
    return good(2) | {"json": b"{}"}


def prepare(
    script: Callable[..., list[str]], folder: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    own = (f"storage.uri={folder / 'store'}", f"data.raw_uri={folder / 'raw'}", "run.name=own", "evaluation.judge=")
    settings = ("data.heldout_fraction=0", "data.clips_per_shard=4", "data.encoder_actors=1")
    command = script("prepare_data", *own, *settings)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def quarantined(folder: Path) -> dict[str, tuple[str, str]]:
    """Shard and reason by the key of every clip that was not used."""
    lines = (folder / "store/runs/own/prepare_data/quarantine.jsonl").read_text().splitlines()
    return {entry["key"]: (Path(entry["shard"]).name, entry["reason"]) for entry in map(json.loads, lines)}


def test_bad_clips_are_named_and_their_neighbours_kept(
    script: Callable[..., list[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    """On a Ray that the stage starts for itself."""
    (tmp_path / "raw").mkdir()
    mixed = {"before": good(3), "empty": empty(), "between": good(4), "truncated": truncated(), "after": good(5)}
    write_tar(tmp_path / "raw/first.tar", mixed.items())
    write_tar(tmp_path / "raw/second.tar", {"whole": good(6), "silent": without_prompt(), "last": good(7)}.items())
    ended = prepare(script, tmp_path, environment)
    assert ended.returncode == 0, ended.stderr
    bad = quarantined(tmp_path)
    assert bad["first/empty"] == ("first.tar", "decode: no bytes")
    assert bad["first/truncated"][0] == "first.tar" and bad["first/truncated"][1].startswith("decode: ")
    assert bad["second/silent@0.000"] == ("second.tar", "caption: no prompt")
    artifact = tmp_path / "store/runs/own/prepare_data"
    shards = [from_table(read_parquet_bytes(path.read_bytes())) for path in (artifact / "train").glob("*.parquet")]
    keys = [key for shard in shards for key in shard["key"]]
    names = ["first/after", "first/before", "first/between", "second/last", "second/whole"]
    assert sorted(keys) == [f"{name}@0.000" for name in names] and len(bad) == 3
    assert all(np.isfinite(shard["latents"]).all() for shard in shards)
    metrics = json.loads((artifact / "manifest.json").read_text())["metrics"]
    assert (metrics["train_clips"], metrics["quarantined_clips"]) == (5, 3)


def test_a_folder_of_only_bad_clips_is_refused(
    script: Callable[..., list[str]],
    refusal: Callable[[subprocess.CompletedProcess[str]], str],
    cluster: dict[str, str],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    (tmp_path / "raw").mkdir()
    write_tar(tmp_path / "raw/first.tar", {"empty": empty(), "truncated": truncated()}.items())
    line = refusal(prepare(script, tmp_path, environment | cluster))
    assert "no clip" in line and "decode: no bytes" in line and "quarantine.jsonl" in line
    assert set(quarantined(tmp_path)) == {"first/empty", "first/truncated"}
    assert not (tmp_path / "store/runs/own/prepare_data/manifest.json").exists()


def test_more_workers_than_the_cluster_can_ever_hold_are_refused(
    script: Callable[..., list[str]],
    refusal: Callable[[subprocess.CompletedProcess[str]], str],
    cluster: dict[str, str],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    command = script("full_distill", f"storage.uri={tmp_path / 'store'}", "training.workers=1000")
    ended = subprocess.run(command, cwd=tmp_path, env=environment | cluster, capture_output=True, text=True)
    line = refusal(ended)
    assert "training.workers=1000" in line and "set training.workers=" in line
    assert not list((tmp_path / "store").rglob("manifest.json"))
