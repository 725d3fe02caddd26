"""What ``prepare_data`` does: find or make the raw shards, stream them into training shards, account for every clip."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pose_core.data.shards import HELDOUT, digits_tar
from pose_core.errors import DataError
from pose_core.runtime.datasets import Prepared, clip_rules, prepare
from pose_core.runtime.stage import StageRun
from pose_core.runtime.storage import Store
from pose_core.settings import DataSettings

MOVING_DIGITS = "moving_digits"
QUARANTINE = "quarantine.jsonl"


@dataclass(frozen=True)
class RawShards:
    """Tars of raw clips: where they are and their keys there."""

    store: Store
    tars: list[str]


def raw_shards(run: StageRun) -> RawShards:
    """The tars below ``data.raw_uri``; the embedded domain is rendered and uploaded first, if it is not there yet.

    Raises:
        DataError: there is no tar (correctable in the call).
    """
    data = run.settings.data
    if data.raw_uri == MOVING_DIGITS:
        return _upload_digits(run)
    store = Store.open(data.raw_uri)
    tars = [key for key in store.list() if key.endswith(".tar")]
    if not tars:
        raise DataError(
            f"data.raw_uri={data.raw_uri} holds no .tar shard: name a folder of WebDataset tars", in_call=True
        )
    return RawShards(store, tars)


def _upload_digits(run: StageRun) -> RawShards:
    data, seed = run.settings.data, run.settings.run.seed
    size = f"{data.frames}x{data.height}x{data.width}-{data.frames_per_second:g}fps"
    name = f"raw/moving_digits-{data.digits_level}-{size}-seed{seed}"
    store = run.root.child(name)
    wanted = [
        (f"{split}-{index:05d}-{clips}.tar", index, clips, split)
        for split, total in digits_clips(data).items()
        for index, clips in enumerate(_split(total, data.digits_clips_per_tar))
    ]
    there = set(store.list())
    for done, (key, index, clips, split) in enumerate(wanted):
        if key not in there:
            store.write_bytes(key, digits_tar(seed, index, clips, split, data.digits_level, clip_rules(data)))
        run.display.update("rendering clips", done + 1, len(wanted))
    return RawShards(store, [key for key, *_ in wanted])


def digits_clips(data: DataSettings) -> dict[str, int]:
    """Clips of the embedded domain by split."""
    return {"train": data.digits_clips} | dict.fromkeys(HELDOUT, data.digits_heldout_clips)


def _split(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def prepare_shards(run: StageRun, raw: RawShards, teacher: Path) -> None:
    """Stream the raw shards through decoding, filtering and encoding; counts and bad clips go into the artifact.

    Raises:
        DataError: no clip is left for training (correctable in the call).
    """
    shards: dict[str, int] = {}
    quarantine: list[str] = []
    for report in prepare(raw.store, raw.tars, run.artifact, run.settings.data, teacher):
        shards |= report["shards"]
        quarantine += report["quarantine"]
        done = sum(shards.values()) + len(quarantine)
        run.display.update(run.name, done, max(done, _expected(run.settings.data)), quarantined=len(quarantine))
    run.artifact.write_bytes(QUARANTINE, "".join(line + "\n" for line in quarantine).encode())
    run.artifact.write_json("shards.json", shards)
    reasons = Counter(json.loads(line)["reason"].split(",")[0] for line in quarantine)
    prepared = Prepared(run.artifact, shards)
    if not prepared.rows("train") and run.settings.data.train_from == "prepared":
        most = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3)) or "there was none"
        raise DataError(
            f"no clip of {raw.store.uri} is left for training ({most}): relax the data.min_… settings or name "
            f"other data; "
            f"every clip's reason is in {run.artifact.url(QUARANTINE)}",
            in_call=True,
        )
    run.tracker.log_text("".join(line + "\n" for line in quarantine), QUARANTINE)
    run.metrics |= {
        **{f"{split}_clips": prepared.rows(split) for split in ("train", *HELDOUT)},
        "quarantined_clips": len(quarantine),
    } | {f"quarantined/{reason}": count for reason, count in reasons.items()}


def _expected(data: DataSettings) -> int:
    """Clips to come where that is known, for the progress bar."""
    return sum(digits_clips(data).values()) if data.raw_uri == MOVING_DIGITS else 0


def open_prepared(run: StageRun) -> Prepared:
    """The training shards that an earlier ``prepare_data`` of this run left."""
    store = run.artifact_of("prepare_data")
    return Prepared(store, store.read_json("shards.json"))
