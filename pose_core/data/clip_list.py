"""The list of clips between curation and encoding: what each is, where its bytes are, and which shard it goes to."""

from __future__ import annotations

import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pose_core.data.captions import TEST, TRAIN, VALIDATION, as_text
from pose_core.data.curation import ContentRules, caption_problem, near_duplicates
from pose_core.data.inspection import Inspection, Measures
from pose_core.data.sources.source import Address, Sample, Stored

NO_MEASURES = Measures(0.0, "", 0.0, 0.0, 0.0, 0.0, 0.0, "")


@dataclass(frozen=True)
class Clip:
    """A clip, or the video that gives none; ``problem`` says why it is not used, empty if it is."""

    key: str
    """Unlike any other clip's: its source's id and the time it starts at."""
    source: str
    """Id of the video it is of."""
    address: Address
    prompt: str
    split: str
    caption_problem: str
    measures: Measures
    problem: str

    @property
    def identity(self) -> str:
        """Changes with anything that its row in a shard depends on."""
        return digest([self.key, asdict(self.address), self.prompt, self.measures.start, self.measures.bucket])

    def to_json(self) -> dict[str, Any]:
        """As ``from_json`` takes it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Clip:
        """Inverse of ``to_json``."""
        address = dict(value["address"]) | {"stored": Stored(**value["address"]["stored"])}
        return cls(**(dict(value) | {"address": Address(**address), "measures": Measures(**value["measures"])}))


def clips_of(sample: Sample, inspection: Inspection | None) -> list[Clip]:
    """A sample's clips by its ``inspection``; one clip with a problem for a video that gives none."""
    problem = sample.problem or (inspection.problem if inspection else "")
    caption = sample.caption
    base = Clip(
        as_text(sample.id), as_text(sample.id), sample.address, caption.prompt, caption.split, sample.caption_problem,
        NO_MEASURES, problem,
    )  # fmt: skip
    if problem or inspection is None:
        return [base]
    return [
        replace(base, key=f"{base.source}@{measures.start:.3f}", measures=measures) for measures in inspection.clips
    ]


def judge(clips: Iterable[Clip], content: ContentRules, max_duplicate_bits: int | None, captions: bool) -> list[Clip]:
    """The clips in the order of their keys, each with the first rule's problem that drops it.

    ``captions`` says whether every clip needs one. Of near duplicates the one with the first key stays.
    """
    judged: list[Clip] = []
    keys = set[str]()
    for clip in sorted(clips, key=lambda clip: (clip.key, clip.address.stored.key)):
        again = "source: a key that comes again" if clip.key in keys else ""
        keys.add(clip.key)
        problem = again or caption_problem(clip.caption_problem, captions) * (not clip.problem) or clip.problem
        judged.append(
            replace(clip, problem=problem or (content.problem(clip.measures) if clip.measures.bucket else ""))
        )
    if max_duplicate_bits is None:
        return judged
    kept = [index for index, clip in enumerate(judged) if not clip.problem]
    twins = near_duplicates([judged[index].measures.hash for index in kept], max_duplicate_bits)
    for index, twin in zip(kept, twins, strict=True):
        if twin >= 0:
            judged[index] = replace(judged[index], problem=f"filter: duplicate, of {judged[kept[twin]].key}")
    return judged


def split_of(clip: Clip, heldout_fraction: float) -> str:
    """A clip's own split; or else ``validation`` and ``test`` for half of the share each.

    The hash of its video's id decides, and not of its own key: two clips of one video are too much alike to be on both
    sides.
    """
    if clip.split:
        return clip.split
    place = int.from_bytes(hashlib.sha256(clip.source.encode()).digest()[:4], "big") / 2**32
    return VALIDATION if place < heldout_fraction / 2 else TEST if place < heldout_fraction else TRAIN


@dataclass(frozen=True)
class ShardPlan:
    """A training shard to be made: its path in the artifact and its clips, all of one bucket."""

    path: str
    bucket: str
    split: str
    clips: tuple[Clip, ...]

    @property
    def id(self) -> str:
        """Last part of its path."""
        return self.path.rpartition("/")[2].removesuffix(".parquet")


def plan_shards(
    clips: Sequence[Clip], clips_per_shard: int, heldout_fraction: float, buckets: int, recipe: str
) -> list[ShardPlan]:
    """Put clips into shards of at most ``clips_per_shard``, each of one split and one bucket.

    A shard's name is two digests: of its clips' keys, so that the order of shards by name, and with it what is trained
    on when and which clips are held out first, depends on the clips alone; and of what is in it and of ``recipe``, how
    it is made. With more than one of ``buckets`` paths are ``split/bucket/name.parquet``, else ``split/name.parquet``.
    """
    groups: dict[tuple[str, str], list[Clip]] = defaultdict(list)
    for clip in clips:
        groups[split_of(clip, heldout_fraction), clip.measures.bucket].append(clip)
    plans = []
    for (split, bucket), members in sorted(groups.items()):
        folder = f"{split}/{bucket}" if buckets > 1 else split
        for start in range(0, len(members), clips_per_shard):
            chosen = tuple(members[start : start + clips_per_shard])
            place = digest([clip.key for clip in chosen])
            content = digest([recipe, split, bucket, [clip.identity for clip in chosen]])
            plans.append(ShardPlan(f"{folder}/{place}-{content}.parquet", bucket, split, chosen))
    return plans


def table_bytes(clips: Sequence[Clip], heldout_fraction: float) -> bytes:
    """The list as Parquet, a row a clip, for a person to query and ``read_table`` to read."""
    rows = [
        {"key": clip.key, "source": clip.source, "object": clip.address.stored.key, "prompt": clip.prompt}
        | {"split": "" if clip.problem else split_of(clip, heldout_fraction), "problem": clip.problem}
        | {name: value for name, value in asdict(clip.measures).items() if name != "hash"}
        | {"clip": json.dumps(clip.to_json())}
        for clip in clips
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, compression="zstd")
    return buffer.getvalue()


def read_table(content: bytes) -> list[Clip]:
    """Inverse of ``table_bytes``."""
    column = pq.read_table(pa.BufferReader(content), columns=["clip"])["clip"]
    return [Clip.from_json(json.loads(cell.as_py())) for cell in column]


def digest(value: Any) -> str:
    """16 hexadecimal digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
