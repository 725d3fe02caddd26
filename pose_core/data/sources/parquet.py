"""Parquet with the videos' bytes inside: a column of bytes, or of ``{"bytes", "path"}`` as Hugging Face datasets write.

Captions and splits are columns of the same file, called as in any caption table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pose_core.data.captions import PROMPT_NAMES, from_record
from pose_core.data.sources.source import Address, Files, Sample, Source, Stored, Unit, captioned, too_large
from pose_core.errors import DataError

_VIDEO_NAMES = ("video", "mp4", "bytes", "content")
_ROWS_AT_ONCE = 4


class ParquetVideos(Source):
    """Rows of Parquet files; a unit is a file. A file without a column of videos is somebody else's."""

    name = "parquet"

    def claim(self, listing: Sequence[Stored], files: Files) -> list[Unit]:
        units = []
        for stored in listing:
            if stored.key.lower().endswith(".parquet"):
                problem, column = _look(stored, files)
                if column or problem:
                    units.append(Unit(self.name, stored, problem=problem))
        return units

    def samples(self, unit: Unit, files: Files, max_bytes: int) -> Iterator[Sample]:
        stored = unit.stored
        if unit.problem:
            yield Sample(stored.key, Address(self.name, stored), problem=unit.problem)
            return
        row = 0
        try:
            with files.open(stored) as file, pq.ParquetFile(file) as opened:
                column = _video_column(opened.schema_arrow) or ""
                captions = [name for name in (*PROMPT_NAMES, "split") if name in opened.schema_arrow.names]
                for batch in opened.iter_batches(_ROWS_AT_ONCE, columns=[column, *captions]):
                    for index in range(batch.num_rows):
                        yield _sample(stored, row, batch, index, column, captions, max_bytes)
                        row += 1
        except (pa.ArrowException, OSError) as error:
            problem = f"parquet: unreadable from row {row} on, {' '.join(str(error).split())[:120]}"
            yield Sample(f"{stored.key}!{row}", Address(self.name, stored), problem=problem)

    def fetch(self, address: Address, files: Files) -> bytes:
        with files.open(address.stored) as file, pq.ParquetFile(file) as opened:
            column, first = _video_column(opened.schema_arrow) or "", 0
            for group in range(opened.num_row_groups):
                rows = opened.metadata.row_group(group).num_rows
                if address.row < first + rows:
                    table = opened.read_row_group(group, columns=[column])
                    return _bytes(table[column][address.row - first]) or b""
                first += rows
        raise DataError(f"decode: {address.stored.key} has no row {address.row}")


def _look(stored: Stored, files: Files) -> tuple[str, str | None]:
    """What is wrong with a file, and its column of videos."""
    try:
        with files.open(stored) as file, pq.ParquetFile(file) as opened:
            return "", _video_column(opened.schema_arrow)
    except (pa.ArrowException, OSError):
        return "parquet: unreadable", None


def _video_column(schema: pa.Schema) -> str | None:
    for name in _VIDEO_NAMES:
        if name in schema.names and _holds_bytes(schema.field(name).type):
            return name
    return None


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _bytes(cell: Any) -> bytes | None:
    value = cell["bytes"] if pa.types.is_struct(cell.type) and cell.is_valid else cell
    return value.as_py() if value.is_valid else None


def _sample(
    stored: Stored, row: int, batch: pa.RecordBatch, index: int, column: str, captions: list[str], max_bytes: int
) -> Sample:
    video = _bytes(batch.column(column)[index])
    size = len(video or b"")
    sample = Sample(f"{stored.key}#{row}", Address(ParquetVideos.name, stored, 0, size, row))
    sample.problem = "decode: no video in this row" if video is None else too_large(size, max_bytes)
    if not sample.problem:
        sample.video = video or b""
    try:
        record = {name: batch.column(name)[index].as_py() for name in captions}
    except UnicodeDecodeError:
        sample.caption_problem = "caption: not UTF-8"
        return sample
    return captioned(sample, from_record, record) if captions else sample
