"""Videos as files, with a table of captions: CSV, JSON Lines or Parquet, one row a video.

A table's rows name videos by a path relative to the table's own folder (or to the root), in a column ``file_name``,
``file``, ``path``, ``video`` or ``filename``, and a caption in ``prompt``, ``caption``, ``text`` or ``description``.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pose_core.data.captions import PROMPT_NAMES, from_record
from pose_core.data.sources.source import Address, Files, Sample, Source, Stored, Unit, captioned, too_large
from pose_core.errors import DataError

VIDEO_ENDINGS = ("mp4", "mov", "m4v", "mkv", "webm", "avi", "ts", "mpg", "mpeg", "flv", "ogv", "wmv")
_TABLE_ENDINGS = ("csv", "jsonl", "ndjson", "parquet")
_FILE_NAMES = ("file_name", "file", "path", "video", "filename")
_TWICE = "caption: two rows of tables name this video"


class Videos(Source):
    """Video files and the tables beside them; a unit is a file and its row."""

    name = "videos"

    def claim(self, listing: Sequence[Stored], files: Files) -> list[Unit]:
        videos = {stored.key: stored for stored in listing if _ending(stored.key) in VIDEO_ENDINGS}
        if not videos:
            return []
        records: dict[str, dict[str, str]] = {}
        units, twice = [], set[str]()
        for table in (stored for stored in listing if _ending(stored.key) in _TABLE_ENDINGS):
            for number, row in enumerate(_rows(table, files)):
                name = next((row[column] for column in _FILE_NAMES if row.get(column)), None)
                key = _find(str(name), table, videos) if name is not None else None
                if key is None:
                    lost = Stored(f"{table.key}#{number}", 0, table.version)
                    units.append(Unit(self.name, lost, problem=f"caption: no such file, {str(name)[:200]!r}"))
                elif key in records:
                    twice.add(key)
                else:
                    records[key] = row
        for key, stored in videos.items():
            units.append(Unit(self.name, stored, record=records.get(key, {}), problem=_TWICE * (key in twice)))
        return units

    def samples(self, unit: Unit, files: Files, max_bytes: int) -> Iterator[Sample]:
        stored = unit.stored
        problem = unit.problem or too_large(stored.size, max_bytes)
        sample = Sample(stored.key, Address(self.name, stored, 0, stored.size), problem=problem)
        if unit.record:
            captioned(sample, from_record, unit.record)
        if not problem:
            sample.video = files.read(stored, 0, stored.size)
        yield sample

    def fetch(self, address: Address, files: Files) -> bytes:
        return files.read(address.stored, 0, address.size)


def _ending(key: str) -> str:
    return PurePosixPath(key).suffix.removeprefix(".").lower()


def _find(name: str, table: Stored, videos: dict[str, Stored]) -> str | None:
    """Key of the video a row names; only names of the listing count, so that no path leads out of it."""
    folder = PurePosixPath(table.key).parent
    return next((key for key in (str(folder / name), name, name.removeprefix("./")) if key in videos), None)


def _rows(table: Stored, files: Files) -> Iterable[dict[str, Any]]:
    """Rows of a table that names videos; none of one that does not.

    Raises:
        DataError: (correctable in the call) the table cannot be read.
    """
    ending = _ending(table.key)
    try:
        if ending == "parquet":
            return _parquet_rows(table, files)
        text = files.read(table, 0, table.size).decode("utf-8-sig", "surrogateescape")
        return _csv_rows(text) if ending == "csv" else _json_rows(text)
    except (csv.Error, pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{table.key} is not a readable table of captions: {reason}", in_call=True) from None


def _parquet_rows(table: Stored, files: Files) -> Iterable[dict[str, Any]]:
    with files.open(table) as file, pq.ParquetFile(file) as opened:
        schema = opened.schema_arrow
        wanted = [name for name in (*_FILE_NAMES, *PROMPT_NAMES, "split") if name in schema.names]
        texts = [name for name in wanted if _is_text(schema.field(name).type)]
        if not set(texts) & set(_FILE_NAMES):
            return []
        # As bytes, because one text that is not UTF-8 would cost the table.
        columns = {name: opened.read([name])[name].cast(pa.large_binary()).to_pylist() for name in texts}
    cells = ([cell and cell.decode("utf-8", "surrogateescape") for cell in column] for column in columns.values())
    return [dict(zip(texts, row, strict=True)) for row in zip(*cells, strict=True)]


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _csv_rows(text: str) -> list[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    return list(csv.DictReader(io.StringIO(text.replace("\0", "\ufffd"), newline="")))


def _json_rows(text: str) -> list[dict[str, Any]]:
    rows = []
    for line in text.split("\n"):
        try:
            row = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError):
            row = {"file_name": line[:200]}
        rows += [row] if isinstance(row, dict) and row else []
    return rows
