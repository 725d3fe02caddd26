"""What ``prepare_data`` does: find or make the raw videos, curate them, encode what is kept, account for every clip.

Two passes. The first looks at every video in a guarded process and lists the clips it gives; the second encodes those
that the rules keep, bucket by bucket. Between the two, rules that need all clips at once (near duplicates) have them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pose_core.data.buckets import Bucket, plan_buckets
from pose_core.data.clip_list import HELDOUT, TRAIN, Clip, judge
from pose_core.data.shards import digits_tar
from pose_core.data.sources import claim
from pose_core.data.sources.source import Unit
from pose_core.errors import DataError
from pose_core.models.codec import compression, encoder_fingerprints
from pose_core.runtime.curating import Inspector, content_rules, inspect, inspection_rules
from pose_core.runtime.curation_report import Picturing, publish, rule_of
from pose_core.runtime.datasets import Prepared
from pose_core.runtime.encoding import Recipe, encode
from pose_core.runtime.raw_files import RawFiles
from pose_core.runtime.stage import StageRun
from pose_core.runtime.storage import Store
from pose_core.settings import DataSettings

MOVING_DIGITS = "moving_digits"
QUARANTINE = "quarantine.jsonl"
SHARDS, CHECKSUMS = "shards.json", "checksums.json"
LAYOUTS = "WebDataset tars, videos with a table of captions, or Parquet with the videos' bytes"


@dataclass(frozen=True)
class RawVideos:
    """Where raw videos are, and the units of work that the sources made of them."""

    files: RawFiles
    units: list[Unit]


def find_raw(uri: str) -> RawVideos:
    """The raw videos below ``data.raw_uri``.

    Raises:
        DataError: (correctable in the call) there is nothing that a source reads.
    """
    files = RawFiles(Store.open(uri))
    units = claim(files.store.stored(), files)
    if not units:
        raise DataError(f"data.raw_uri={uri} holds no videos: name a folder of {LAYOUTS}", in_call=True)
    return RawVideos(files, units)


def raw_shards(run: StageRun) -> RawVideos:
    """What ``data.raw_uri`` names; the embedded domain is rendered and uploaded first, if it is not there yet.

    Raises:
        DataError: (correctable in the call) there is nothing that a source reads.
    """
    data = run.settings.data
    return _upload_digits(run) if data.raw_uri == MOVING_DIGITS else find_raw(data.raw_uri)


def _upload_digits(run: StageRun) -> RawVideos:
    data, seed = run.settings.data, run.settings.run.seed
    name = f"raw/moving_digits-{data.frames}x{data.height}x{data.width}-{data.frames_per_second:g}fps-seed{seed}"
    store = run.root.child(name)
    wanted = [
        (f"{split}-{index:05d}.tar", index, clips, split == "heldout")
        for split, total in (("train", data.digits_clips), ("heldout", data.digits_heldout_clips))
        for index, clips in enumerate(_split(total, data.digits_clips_per_tar))
    ]
    there = set(store.list())
    keys = set()
    for done, (key, index, clips, heldout) in enumerate(wanted):
        key = key.replace(".tar", f"-{clips}.tar")
        keys.add(key)
        if key not in there:
            store.write_bytes(key, digits_tar(seed, index, clips, heldout, base_bucket(data)))
        run.display.update("rendering clips", done + 1, len(wanted))
    files = RawFiles(store)
    return RawVideos(files, claim([stored for stored in store.stored() if stored.key in keys], files))


def _split(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def base_bucket(data: DataSettings) -> Bucket:
    """The size that ``data.frames``, ``data.height`` and ``data.width`` ask for."""
    return Bucket(data.frames, data.height, data.width, data.frames_per_second)


def buckets_of(data: DataSettings, teacher: Path) -> tuple[Bucket, ...]:
    """Every bucket that the settings ask for, as the model's compression allows them."""
    temporal, side = compression(teacher)
    return plan_buckets(
        base_bucket(data), data.aspect_ratios, data.bucket_frames, temporal_factor=temporal, side_step=side
    )


def prepare_shards(run: StageRun, raw: RawVideos, teacher: Path) -> None:
    """Curate and encode the raw videos; shards, counts, pictures and bad clips go into the artifact.

    What an earlier call with the same rules has done is not done again.

    Raises:
        DataError: no clip is left for training (correctable in the call).
    """
    data, curation = run.settings.data, run.settings.curation
    buckets = buckets_of(data, teacher)
    memory, seconds = int(curation.decoder_gibibytes * 2**30), curation.decoder_seconds
    inspector = Inspector(
        raw.files,
        run.artifact,
        inspection_rules(curation, buckets),
        curation.max_video_mebibytes << 20,
        memory,
        seconds,
    )
    listed = inspect(raw.units, inspector, curation.decoder_cpus, _advance(run, "looking at videos"))
    clips = judge(listed, content_rules(curation), curation.max_duplicate_bits, curation.require_caption)
    kept = [clip for clip in clips if not clip.problem]
    recipe = Recipe(
        raw.files, run.artifact, teacher, buckets, data.text_tokens, data.encoder_batch_clips,
        max(1, int(data.encoder_cpus)), encoder_fingerprints(teacher), data.heldout_fraction,
    )  # fmt: skip
    records = encode(kept, recipe, data, _advance(run, run.name))
    _account(run, raw.files, clips, records)
    publish(run, clips, _failed(records), Picturing(raw.files, buckets, memory, seconds))


def _advance(run: StageRun, what: str) -> Callable[[int, int], None]:
    return lambda done, total: run.display.update(what, done, total)


def _failed(records: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [failed for record in records for failed in record["failed"]]


def _account(run: StageRun, files: RawFiles, clips: list[Clip], records: list[dict[str, Any]]) -> None:
    """Write down where every clip went: into which shard, or into quarantine and why."""
    made = [record for record in records if record["rows"]]
    shards = {record["path"]: record["rows"] for record in sorted(made, key=lambda record: record["path"])}
    dropped = [{"key": clip.key, "shard": clip.address.stored.key, "reason": clip.problem} for clip in clips]
    lines = [line for line in [*dropped, *_failed(records)] if line["reason"]]
    text = "".join(json.dumps(line | {"shard": f"{files.store.uri}/{line['shard']}"}) + "\n" for line in lines)
    run.artifact.write_bytes(QUARANTINE, text.encode())
    run.artifact.write_json(SHARDS, shards)
    run.artifact.write_json(CHECKSUMS, {record["path"]: record["sha256"] for record in made})
    run.tracker.log_text(text, QUARANTINE)
    reasons = Counter(rule_of(line["reason"]) for line in lines)
    prepared = Prepared(run.artifact, shards)
    if not prepared.rows(TRAIN):
        most = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3)) or "there was none"
        raise DataError(
            f"no clip of {files.store.uri} is left for training ({most}): relax the curation settings or name "
            f"other data; every clip's reason is in {run.artifact.url(QUARANTINE)}",
            in_call=True,
        )
    run.metrics |= {
        "train_clips": prepared.rows(TRAIN),
        "heldout_clips": prepared.rows(HELDOUT),
        "quarantined_clips": len(lines),
    } | {f"quarantined/{reason}": count for reason, count in reasons.items()}


def open_prepared(run: StageRun) -> Prepared:
    """The training shards that an earlier ``prepare_data`` of this run left."""
    store = run.artifact_of("prepare_data")
    return Prepared(store, store.read_json(SHARDS))
