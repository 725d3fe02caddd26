"""Raw shards as training reads them: where a shard's samples are, and the clips of some of them."""

from __future__ import annotations

import io
import logging
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from pose_core.data.clips import ClipRules, Row, clips_of
from pose_core.data.shards import quarantine_line, split_of
from pose_core.runtime.steady_files import READ_AHEAD_BYTES, SteadyFiles

_log = logging.getLogger(__name__)


class Span(NamedTuple):
    """Bytes of a shard."""

    start: int
    size: int


@dataclass(frozen=True)
class Located:
    """A sample of a shard: its key, and where its members are by extension."""

    key: str
    members: dict[str, Span]

    @property
    def stop(self) -> int:
        return max(span.start + span.size for span in self.members.values())

    @property
    def start(self) -> int:
        return min(span.start for span in self.members.values())


@dataclass(frozen=True)
class Index:
    """Where a shard's samples are, in the version that was looked at; ``content`` is all of a shard that is small."""

    samples: list[Located]
    version: str
    content: bytes = b""


@dataclass
class Decoded:
    """Clips of some samples: columns by bucket, one line a clip that cannot be used."""

    blocks: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    quarantine: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Clips by bucket."""
        return {bucket: len(columns["key"]) for bucket, columns in self.blocks.items()}


@dataclass(frozen=True)
class RawClips:
    """WebDataset tars and what is to be made of them; travels to whoever decodes."""

    files: SteadyFiles
    shards: tuple[str, ...]
    rules: ClipRules
    heldout_fraction: float

    def index(self, shard: int) -> Index:
        """Find a shard's samples. One that is cut short has those before the cut."""
        samples: dict[str, dict[str, Span]] = {}
        with self.files.open(self.shards[shard]) as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in filter(tarfile.TarInfo.isreg, tar):
                        path = PurePosixPath(member.name)
                        stem, _, extension = path.name.partition(".")
                        span = Span(member.offset_data, member.size)
                        samples.setdefault(str(path.with_name(stem)), {})[extension] = span
            except tarfile.TarError as error:
                _log.warning("%s: %s; what comes before is used", self.files.store.url(self.shards[shard]), error)
            size, version = file.seek(0, io.SEEK_END), file.raw.version  # type: ignore[attr-defined]
            file.seek(0)
            content = file.read(size) if size <= READ_AHEAD_BYTES else b""
        return Index([Located(key, members) for key, members in samples.items()], version, content)

    def decode(self, shard: int, index: Index, samples: slice) -> Decoded:
        """Read, filter, cut and bring to size the training clips of some of a shard's samples."""
        decoded, url = Decoded(), self.files.store.url(self.shards[shard])
        for sample in self._read(shard, index, index.samples[samples]):
            for row in clips_of(sample | {"__url__": url}, self.rules):
                if row["reason"]:
                    decoded.quarantine.append(quarantine_line(row))
                elif split_of(row["split"], row["key"], self.heldout_fraction) == "train":
                    _add(decoded.blocks, row)
        return decoded

    def _read(self, shard: int, index: Index, samples: Sequence[Located]) -> Iterator[dict[str, Any]]:
        """The members' bytes. Neighbours are read together."""
        start, stop, content = 0, len(index.content), memoryview(index.content)
        for at, sample in enumerate(samples):
            if not start <= sample.start <= sample.stop <= stop:
                start, stop = sample.start, sample.stop
                for follower in samples[at + 1 :]:
                    if follower.start < stop or follower.stop - start > READ_AHEAD_BYTES:
                        break
                    stop = follower.stop
                content = memoryview(self.files.read(self.shards[shard], start, stop, index.version))
            yield {"__key__": sample.key} | {
                extension: bytes(content[span.start - start : span.start - start + span.size])
                for extension, span in sample.members.items()
            }


def _add(blocks: dict[str, dict[str, list[Any]]], row: Row) -> None:
    """Clips of one size share a bucket."""
    frames, height, width, _ = row["video"].shape
    columns = blocks.setdefault(f"{frames}x{height}x{width}", {"key": [], "prompt": [], "video": []})
    for name, cells in columns.items():
        cells.append(row[name])
