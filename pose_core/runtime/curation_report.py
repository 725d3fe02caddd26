"""What curation kept and dropped, in numbers and in pictures, in the artifact and in MLflow."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pose_core.data.buckets import Bucket
from pose_core.data.clip_list import Clip, table_bytes
from pose_core.data.examples import example_frames
from pose_core.data.sources import SOURCES
from pose_core.errors import DataError
from pose_core.evaluation.pictures import contact_sheet
from pose_core.runtime.data_plans import work_through
from pose_core.runtime.guard import Guard
from pose_core.runtime.raw_clips import CLIP_LIST
from pose_core.runtime.raw_files import RawFiles
from pose_core.runtime.stage import StageRun

FOLDER = "curation"
REPORT, DROPPED, KEPT = "report.json", "dropped.png", "kept.png"
CAPTION_CHARACTERS = 110


def rule_of(problem: str) -> str:
    """The rule behind a problem, without its details: ``filter: still``."""
    return problem.partition(",")[0]


def report(clips: Sequence[Clip], failed: Sequence[dict[str, str]]) -> dict[str, Any]:
    """How many clips there were, how many are kept in each bucket, and how many each rule dropped.

    ``failed`` are those that could not be read again when they were to be encoded.
    """
    lost = {each["key"]: each["reason"] for each in failed}
    problems = {clip.key: clip.problem or lost.get(clip.key, "") for clip in clips}
    dropped = Counter(rule_of(clip.problem or lost.get(clip.key, "")) for clip in clips)
    kept = Counter(clip.measures.bucket for clip in clips if not problems[clip.key])
    return {
        "videos": len({clip.source for clip in clips}),
        "clips": len(clips),
        "kept": dropped.pop("", 0),
        "dropped": dict(dropped.most_common()),
        "buckets": dict(sorted(kept.items())),
    }


@dataclass(frozen=True)
class Picturing:
    """Fetches the frames of one example; travels into tasks."""

    files: RawFiles
    buckets: tuple[Bucket, ...]
    memory_bytes: int
    seconds: float

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Frames of one clip; none where there is nothing to see."""
        item = json.loads(rows["item"][0])
        clip = Clip.from_json(item["clip"])
        bucket = next((bucket for bucket in self.buckets if bucket.name == clip.measures.bucket), None)
        guard = Guard(self.memory_bytes, self.seconds)
        frames = None
        try:
            content = SOURCES[clip.address.source].fetch(clip.address, self.files) if clip.address.size else b""
            frames = guard.call(example_frames, content, bucket, clip.measures.start)
        except DataError:
            pass
        finally:
            guard.close()
        return {"result": np.array([json.dumps(item | {"frames": _packed(frames)})], dtype=object)}


def _packed(frames: np.ndarray | None) -> str | None:
    if frames is None:
        return None
    buffer = io.BytesIO()
    np.savez_compressed(buffer, frames=frames)
    return base64.b64encode(buffer.getvalue()).decode()


def _unpacked(text: str) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(text)))["frames"]


def publish(run: StageRun, clips: Sequence[Clip], failed: Sequence[dict[str, str]], picturing: Picturing) -> None:
    """Write the report, the list of clips and a sheet each of kept and dropped ones to the artifact and to MLflow."""
    numbers = json.dumps(report(clips, failed), indent=2) + "\n"
    run.artifact.write_bytes(f"{FOLDER}/{REPORT}", numbers.encode())
    run.tracker.log_text(numbers, f"{FOLDER}/{REPORT}")
    if clips:
        run.artifact.write_bytes(CLIP_LIST, table_bytes(clips, run.settings.data.heldout_fraction))
    curation = run.settings.curation
    chosen = _examples(clips, curation.examples_per_rule)
    # Small pictures of a few clips: none of them is worth a task of its own at a million.
    shown = list(work_through(chosen, picturing, num_cpus=curation.decoder_cpus))
    with tempfile.TemporaryDirectory() as folder:
        for name in (DROPPED, KEPT):
            examples = sorted((each for each in shown if each["sheet"] == name), key=lambda each: each["order"])
            sheet = _sheet(examples)
            if sheet is not None:
                local = Path(folder) / name
                sheet.save(local)
                run.artifact.write_bytes(f"{FOLDER}/{name}", local.read_bytes())
                run.tracker.log_file(local, FOLDER)


def _examples(clips: Iterable[Clip], most: int) -> list[dict[str, Any]]:
    """The first clips of every rule and of every bucket, rule by rule."""
    groups: dict[tuple[str, str], list[Clip]] = defaultdict(list)
    for clip in clips:
        groups[(DROPPED, rule_of(clip.problem)) if clip.problem else (KEPT, clip.measures.bucket)].append(clip)
    chosen = [(sheet, clip) for (sheet, _), group in sorted(groups.items()) for clip in group[:most]]
    return [{"sheet": sheet, "order": index, "clip": clip.to_json()} for index, (sheet, clip) in enumerate(chosen)]


def _sheet(examples: Sequence[dict[str, Any]]) -> Image.Image | None:
    seen = [each for each in examples if each["frames"] is not None]
    if not seen:
        return None
    clips = [Clip.from_json(each["clip"]) for each in seen]
    captions = [f"{clip.problem or clip.measures.bucket} · {clip.key}" for clip in clips]
    videos = [_unpacked(each["frames"]) for each in seen]
    return contact_sheet([("", videos)], [caption[:CAPTION_CHARACTERS] for caption in captions])
