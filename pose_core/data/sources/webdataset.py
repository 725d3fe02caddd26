"""WebDataset tars: a sample is ``KEY.mp4`` and ``KEY.json`` (or ``KEY.txt``) next to each other in one tar.

Also as cosmos-curate writes them: ``…/video/part_000000/000000.tar`` holds the videos and the tar of the same name
under ``metas/`` their metadata, by the same keys. Its pickles are never opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import BinaryIO

from pose_core.data.captions import MAX_JSON_BYTES, as_text, parse_json, parse_text
from pose_core.data.sources import tar
from pose_core.data.sources.source import Address, Files, Sample, Source, Stored, Unit, captioned, too_large
from pose_core.data.sources.videos import VIDEO_ENDINGS

_CAPTION_ENDINGS = ("json", "txt")
_VIDEOS, _METADATA, _EMBEDDINGS = "video", "metas", "t5_xxl"


class WebDataset(Source):
    """Tars of samples; a unit is a tar."""

    name = "webdataset"

    def claim(self, listing: Sequence[Stored], files: Files) -> list[Unit]:
        tars = {stored.key: stored for stored in listing if stored.key.lower().endswith(".tar")}
        units = []
        for key, stored in tars.items():
            if any(_beside(key, folder, _VIDEOS) in tars for folder in (_METADATA, _EMBEDDINGS)):
                continue
            units.append(Unit(self.name, stored, tars.get(_beside(key, _VIDEOS, _METADATA))))
        return units

    def samples(self, unit: Unit, files: Files, max_bytes: int) -> Iterator[Sample]:
        captions = _captions(unit.companion, files) if unit.companion else {}
        seen, again = set[str](), ""
        pending: Sample | None = None
        with files.open(unit.stored) as file:
            for member in tar.walk(file, unit.stored.size):
                key, ending = _split(member.name)
                if ending not in VIDEO_ENDINGS and ending not in _CAPTION_ENDINGS and not member.problem:
                    continue
                name = _id(unit, key)
                if pending is not None and pending.id != name:
                    yield _whole(pending)
                    pending = None
                if member.problem:
                    yield _unusable(unit, member, member.problem)
                    continue
                if pending is None and key in seen:
                    if key != again:
                        yield _unusable(unit, member, "tar: a key that comes again")
                    again = key
                    continue
                if pending is None:
                    pending = Sample(name, Address(self.name, unit.stored))
                    if key in captions:
                        captioned(pending, parse_json, captions[key])
                seen.add(key)
                _add(pending, member, ending, file, max_bytes)
        if pending is not None:
            yield _whole(pending)

    def fetch(self, address: Address, files: Files) -> bytes:
        return files.read(address.stored, address.start, address.size)


def _unusable(unit: Unit, member: tar.Member, problem: str) -> Sample:
    """A row about one member; its place makes its id unlike that of any sample."""
    return Sample(f"{_id(unit, member.name)}!{member.start}", Address(unit.source, unit.stored), problem=problem)


def _whole(sample: Sample) -> Sample:
    if not sample.address.start and not sample.problem:
        sample.problem = "decode: no video member"
    return sample


def _add(sample: Sample, member: tar.Member, ending: str, file: BinaryIO, max_bytes: int) -> None:
    """Take one member of a sample in."""
    if ending in VIDEO_ENDINGS:
        if sample.address.start:
            sample.problem = "tar: two videos under one key"
            return
        sample.address = replace(sample.address, start=member.start, size=member.size)
        sample.problem = too_large(member.size, max_bytes)
        if not sample.problem:
            sample.video = _content(file, member)
    elif not sample.caption.prompt:
        parse = parse_json if ending == "json" else parse_text
        # One byte more than is allowed says that there are too many.
        captioned(sample, parse, _content(file, member, MAX_JSON_BYTES + 1))


def _content(file: BinaryIO, member: tar.Member, most: int | None = None) -> bytes:
    file.seek(member.start)
    return file.read(member.size if most is None else min(member.size, most))


def _captions(stored: Stored, files: Files) -> dict[str, bytes]:
    """What a tar of metadata says, by key."""
    with files.open(stored) as file:
        members = [member for member in tar.walk(file, stored.size) if not member.problem]
        wanted = [member for member in members if _split(member.name)[1] == "json"]
        return {_split(member.name)[0]: _content(file, member, MAX_JSON_BYTES + 1) for member in wanted}


def _split(name: str) -> tuple[str, str]:
    """Key and extension: the name is cut at the first dot of its last part, as WebDataset does."""
    path = PurePosixPath(name)
    stem, _, ending = path.name.partition(".")
    return (str(path.with_name(stem)) if stem else name), ending.lower()


def _id(unit: Unit, key: str) -> str:
    return as_text(f"{unit.stored.key.removesuffix('.tar')}/{key}" if key else unit.stored.key)


def _beside(key: str, folder: str, other: str) -> str:
    """``key`` with its last folder called ``folder`` renamed to ``other``; unlike any key if there is none."""
    parts = key.split("/")
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == folder:
            return "/".join([*parts[:index], other, *parts[index + 1 :]])
    return ""
