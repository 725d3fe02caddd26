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
from pose_core.data.captions import HELDOUT, TRAIN
from pose_core.data.clip_list import Clip, judge, split_of
from pose_core.data.moving_digits import EDITION, MOVING_DIGITS
from pose_core.data.shards import digits_tar
from pose_core.data.sources import claim
from pose_core.data.sources.source import Unit
from pose_core.data_settings import DataSettings
from pose_core.errors import DataError
from pose_core.models import families
from pose_core.models.codec import encoder_fingerprints
from pose_core.runtime.curating import Inspector, content_rules, inspect, inspection_rules
from pose_core.runtime.curation_report import Picturing, publish, rule_of
from pose_core.runtime.datasets import Prepared
from pose_core.runtime.encoding import Recipe, encode
from pose_core.runtime.raw_files import RawFiles
from pose_core.runtime.stage import StageRun
from pose_core.runtime.steady_files import SteadyFiles
from pose_core.runtime.storage import Store
from pose_core.settings import Settings

QUARANTINE = "quarantine.jsonl"
SHARDS, CHECKSUMS = "shards.json", "checksums.json"
LAYOUTS = "WebDataset tars, videos with a table of captions, or Parquet with the videos' bytes"


@dataclass(frozen=True)
class RawVideos:
    """Where raw videos are, and the units of work that the sources made of them."""

    files: RawFiles
    units: list[Unit]


def find_raw(data: DataSettings, retry_seconds: float) -> RawVideos:
    """The raw videos below ``data.raw_uri``.

    Raises:
        DataError: (correctable in the call) there is nothing that a source reads.
    """
    files = RawFiles(SteadyFiles(Store.open(data.raw_uri), retry_seconds))
    units = claim(files.store.stored(), files)
    if not units:
        raise DataError(f"data.raw_uri={data.raw_uri} holds no videos: name a folder of {LAYOUTS}", in_call=True)
    return RawVideos(files, units)


def raw_files(run: StageRun) -> RawFiles:
    """Where the raw videos of a run are, whether they are there yet or not."""
    data = run.settings.data
    store = Store.open(data.raw_uri) if data.raw_uri != MOVING_DIGITS else run.root.child(_digits_folder(run.settings))
    return RawFiles(SteadyFiles(store, run.settings.storage.retry_seconds))


def raw_videos(run: StageRun) -> RawVideos:
    """What ``data.raw_uri`` names; the embedded domain is rendered and uploaded first, if it is not there yet.

    Raises:
        DataError: (correctable in the call) there is nothing that a source reads.
    """
    data = run.settings.data
    if data.raw_uri == MOVING_DIGITS:
        return _upload_digits(run)
    return find_raw(data, run.settings.storage.retry_seconds)


def _digits_folder(settings: Settings) -> str:
    data = settings.data
    size = f"{data.frames}x{data.height}x{data.width}-{data.frames_per_second:g}fps"
    return f"raw/moving_digits-{EDITION}-{data.digits_level}-{size}-seed{settings.run.seed}"


def _upload_digits(run: StageRun) -> RawVideos:
    data, files = run.settings.data, raw_files(run)
    wanted = {
        f"{split}-{index:05d}-{clips}.tar": (index, clips, split)
        for split, total in digits_clips(data).items()
        for index, clips in enumerate(_split(total, data.digits_clips_per_tar))
    }
    there = set(files.store.list())
    for done, (key, (index, clips, split)) in enumerate(wanted.items()):
        if key not in there:
            tar = digits_tar(run.settings.run.seed, index, clips, split, data.digits_level, base_bucket(data))
            files.store.write_bytes(key, tar)
        run.display.update("rendering clips", done + 1, len(wanted))
    return RawVideos(files, claim([stored for stored in files.store.stored() if stored.key in wanted], files))


def digits_clips(data: DataSettings) -> dict[str, int]:
    """Clips of the embedded domain by split."""
    return {TRAIN: data.digits_clips} | dict.fromkeys(HELDOUT, data.digits_heldout_clips)


def _split(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def base_bucket(data: DataSettings) -> Bucket:
    """The size that ``data.frames``, ``data.height`` and ``data.width`` ask for."""
    return Bucket(data.frames, data.height, data.width, data.frames_per_second)


def buckets_of(settings: Settings, teacher: Path) -> tuple[Bucket, ...]:
    """Every bucket that the settings ask for, as the model's compression allows them."""
    data = settings.data
    temporal, side = families.get(settings.model.family).compression(teacher)
    return plan_buckets(
        base_bucket(data), data.aspect_ratios, data.bucket_frames, temporal_factor=temporal, side_step=side
    )


def prepare_shards(run: StageRun, raw: RawVideos, teacher: Path) -> None:
    """Curate and encode the raw videos; shards, counts, pictures and bad clips go into the artifact.

    What an earlier call with the same rules has done is not done again. With ``data.train_from=raw`` only held-out
    clips are encoded: the others are on the list, and training reads them from where they are.

    Raises:
        DataError: (correctable in the call) no clip is left for training, or none beside those that stay raw.
    """
    data, curation = run.settings.data, run.settings.curation
    buckets = buckets_of(run.settings, teacher)
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
        raw.files, run.artifact, run.settings.model, buckets, data.text_tokens, data.encoder_batch_clips,
        max(1, int(data.encoder_cpus)), encoder_fingerprints(teacher), data.heldout_fraction,
    )  # fmt: skip
    encoded = kept
    if data.train_from == "raw":
        encoded = [clip for clip in kept if split_of(clip, data.heldout_fraction) != TRAIN]
    records = encode(encoded, recipe, data, _advance(run, run.name))
    _account(run, raw.files, clips, records, left_raw=len(kept) - len(encoded))
    publish(run, clips, _failed(records), Picturing(raw.files, buckets, memory, seconds))


def _advance(run: StageRun, what: str) -> Callable[[int, int], None]:
    return lambda done, total: run.display.update(what, done, total)


def _failed(records: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [failed for record in records for failed in record["failed"]]


def _account(run: StageRun, files: RawFiles, clips: list[Clip], records: list[dict[str, Any]], left_raw: int) -> None:
    """Write down where every clip went: into which shard, or into quarantine and why.

    ``left_raw`` training clips are not in any shard.
    """
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
    if not prepared.rows(TRAIN) + left_raw:
        most = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3)) or "there was none"
        raise DataError(
            f"no clip of {files.store.uri} is left for training ({most}): relax the curation settings or name "
            f"other data; every clip's reason is in {run.artifact.url(QUARANTINE)}",
            in_call=True,
        )
    if left_raw and not any(map(prepared.rows, HELDOUT)):
        # Whatever is prepared beside them, the empty prompt too, is made with the clips that are held out.
        raise DataError("no clip was held out: raise data.heldout_fraction or add clips", in_call=True)
    run.metrics |= {
        f"{TRAIN}_clips": prepared.rows(TRAIN) + left_raw,
        **{f"{split}_clips": prepared.rows(split) for split in HELDOUT},
        "quarantined_clips": len(lines),
    } | {f"quarantined/{reason}": count for reason, count in reasons.items()}


def open_prepared(run: StageRun) -> Prepared:
    """The training shards that an earlier ``prepare_data`` of this run left."""
    store = run.artifact_of("prepare_data")
    return Prepared(store, store.read_json(SHARDS))
