"""Walks through a tar file that may be damaged or hostile. Nothing is ever extracted: members are places in the file.

Python's tarfile reads headers of any size into memory and takes a damaged one for the end; this neither does.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

BLOCK = 512
MAX_NAME_BYTES = 1 << 16
"""Most bytes of an extended header (a long name, pax records) that are read."""
_ENCODING = ("utf-8", "surrogateescape")
_LONG_NAME, _LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
_EXTENDED = (_LONG_NAME, _LONG_LINK, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_ODD = {
    tarfile.LNKTYPE: "a link",
    tarfile.SYMTYPE: "a link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


@dataclass(frozen=True)
class Member:
    """A file in a tar: its name and where its bytes are; ``problem`` (``tar: ...``) says why they cannot be used."""

    name: str
    start: int
    size: int
    problem: str = ""


def walk(file: BinaryIO, size: int) -> Iterator[Member]:
    """Members of the tar in ``file``, ``size`` bytes long, in order; folders are left out.

    What is wrong with the archive itself comes as a member without a name. After a damaged header the walk goes on at
    the next one that is whole.
    """
    at, lost, ended = 0, False, False
    extended: dict[str, str] = {}
    while at + BLOCK <= size and not ended:
        header = _header(file, at)
        ended = header is None and not lost and _is_end(file, at)
        if header is None:
            if not lost and not ended:
                yield Member("", at, 0, f"tar: damaged, no header at byte {at}")
            lost, at, extended = True, at + BLOCK, {}
            continue
        start = at + BLOCK
        if header.type in _EXTENDED:
            at = start + _padded(header.size)
            if header.size > MAX_NAME_BYTES or at > size:
                yield Member("", start, 0, f"tar: extended header of {header.size} bytes")
            else:
                file.seek(start)
                extended |= _extended(header.type, file.read(header.size))
            lost = False
            continue
        length = _number(extended.get("size"), header.size)
        if not header.isdir():
            yield _member(extended.get("path", header.name), start, length, header.type, extended, size)
        at, lost, extended = start + _padded(length), False, {}
    if not ended:
        yield Member("", size, 0, "tar: cut short")


def _header(file: BinaryIO, at: int) -> tarfile.TarInfo | None:
    file.seek(at)
    try:
        header = tarfile.TarInfo.frombuf(file.read(BLOCK), *_ENCODING)
    except (tarfile.HeaderError, ValueError):
        return None
    return header if header.size >= 0 else None


def _is_end(file: BinaryIO, at: int) -> bool:
    file.seek(at)
    return not any(file.read(BLOCK))


def _extended(kind: bytes, content: bytes) -> dict[str, str]:
    """Name, size and sparseness of the next member, from the header in front of it."""
    if kind == _LONG_NAME:
        return {"path": content.rstrip(b"\0").decode(*_ENCODING)}
    if kind in (_LONG_LINK, tarfile.XGLTYPE):
        return {}
    records = {}
    while content:
        length = _number(content.partition(b" ")[0].decode("ascii", "replace"), 0)
        if not 0 < length <= len(content):
            break
        name, _, value = content[:length].partition(b" ")[2].rstrip(b"\n").partition(b"=")
        records[name.decode(*_ENCODING)] = value.decode(*_ENCODING)
        content = content[length:]
    return records


def _number(text: str | None, default: int) -> int:
    return int(text) if text and text.isdecimal() and len(text) < 20 else default


def _member(name: str, start: int, length: int, kind: bytes, extended: dict[str, str], size: int) -> Member:
    problem = ""
    if kind in _ODD or any(record.startswith("GNU.sparse") for record in extended):
        problem = f"tar: {_ODD.get(kind, 'a sparse file')}"
    elif start + length > size:
        problem = "tar: cut short"
    elif name.startswith("/") or ".." in PurePosixPath(name).parts or "\0" in name:
        problem = "tar: a name that leaves the archive"
    return Member(name, start, length, problem)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
