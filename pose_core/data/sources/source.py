"""What a source of raw videos is: the one interface between the layouts found in buckets and the rest of the program.

A source looks at a listing and claims the objects it understands, as ``Unit``s of work; it turns a unit into samples,
and later finds one sample's bytes again by its address. A new layout is one file with one such class, named in
``sources/__init__.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol

from pose_core.data.captions import MISSING, Caption
from pose_core.errors import DataError


@dataclass(frozen=True)
class Stored:
    """An object in a bucket or a file in a folder; ``version`` (ETag, or size and time) changes with its content."""

    key: str
    size: int
    version: str


class Files(Protocol):
    """The place where raw videos are. What it raises for a store that fails is not for sources to catch."""

    def open(self, stored: Stored) -> BinaryIO:
        """The object as a seekable file that reads ahead; fails if it is no longer the version listed."""
        ...

    def read(self, stored: Stored, start: int, size: int) -> bytes:
        """``size`` bytes from ``start`` on, under the same condition."""
        ...


@dataclass(frozen=True)
class Unit:
    """The least that is read or left out as a whole: an object, what belongs to it, and what a table says about it."""

    source: str
    """Name of the source that reads it."""
    stored: Stored
    companion: Stored | None = None
    """A second object that is read with it, such as the tar of captions beside a tar of videos."""
    record: dict[str, str] = field(default_factory=dict)
    """Its row in a caption table."""
    problem: str = ""
    """Why it cannot be read at all."""


@dataclass(frozen=True)
class Address:
    """Where one video's bytes are: a part of an object, or a row of it."""

    source: str
    stored: Stored
    start: int = 0
    size: int = 0
    row: int = -1


@dataclass
class Sample:
    """One video of a unit. ``id`` names it among all videos; ``problem`` says why it cannot be used."""

    id: str
    address: Address
    video: bytes = b""
    caption: Caption = Caption("")
    caption_problem: str = MISSING[2]
    problem: str = ""


class Source(ABC):
    """A layout of raw videos; see the module. It holds nothing but its limits, so that it travels into tasks."""

    name: str

    @abstractmethod
    def claim(self, listing: Sequence[Stored], files: Files) -> list[Unit]:
        """The units that this source reads of what is ``listing``ed; objects it does not know are not its business."""

    @abstractmethod
    def samples(self, unit: Unit, files: Files, max_bytes: int) -> Iterator[Sample]:
        """Every video of a unit, with its bytes unless they are more than ``max_bytes`` or there is a problem."""

    @abstractmethod
    def fetch(self, address: Address, files: Files) -> bytes:
        """The bytes of one video.

        Raises:
            DataError: they are not there any more.
        """


def too_large(size: int, max_bytes: int) -> str:
    """The problem of a video with more bytes than are read into memory; empty for one that may be read."""
    return f"decode: {size >> 20} MiB are more than {max_bytes >> 20}" if size > max_bytes else ""


def captioned(sample: Sample, parse: object, *arguments: object) -> Sample:
    """``sample`` with the caption that ``parse(*arguments)`` gives, or with what it complains about."""
    try:
        sample.caption, sample.caption_problem = parse(*arguments), ""  # type: ignore[operator]
    except DataError as error:
        sample.caption_problem = str(error)
    return sample
