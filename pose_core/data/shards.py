"""The two shard formats: raw clips in WebDataset tars, and training shards, Parquet with one fixed-shape tensor a cell.

Everything is bytes in, bytes out; where shards lie is not this module's business.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pose_core.data.buckets import Bucket
from pose_core.data.captions import SPLITS
from pose_core.data.clips import encode_mp4
from pose_core.data.moving_digits import CLEAR_PIXELS, DIGIT_PIXELS, draw_clip, render
from pose_core.errors import DataError

SHARD_VERSION = "2"
VERSION_KEY = b"pose.shard_version"
DETAILS_KEY = b"pose.details"
ROW_GROUP_BYTES = 64 * 2**20
"""Readers take a row group at a time: what they hold of a shard stays near this size."""

TRAINING_COLUMNS = {
    "key": "",
    "source": "",
    "prompt": "",
    "latents": "C T h w",
    "text": "L D",
    "image": "N D",
    "first_frame": "C2 T h w",
    "video": "F H W 3",
}
"""Columns of a training shard and a cell's axes (none: a string).

``key`` names the clip, ``source`` the video it is of, ``latents`` clean video latents, ``text`` and ``image``
embeddings, ``first_frame`` the image condition's latents with their mask (absent for text-to-video, as ``image`` is),
``video`` uint8 pixels, in held-out shards only.
"""


def write_tar(target: str | Path | IO[bytes], samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write ``samples``, pairs of key and {extension: bytes}, as a WebDataset tar to a path or an open binary file.

    The same samples always give the same bytes.

    Raises:
        DataError: a key is empty, repeated, or has a dot in its last part, where readers would cut it.
    """
    if isinstance(target, str | Path):
        with open(target, "wb") as file:
            return write_tar(file, samples)
    seen: set[str] = set()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for key, members in samples:
            if not key or key in seen or "." in PurePosixPath(key).name:
                raise DataError(f"tar key {key!r} is empty, repeated or has a dot in its name: rename it")
            seen.add(key)
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def digits_tar(seed: int, index: int, clips: int, split: str, level: str, rules: Bucket) -> bytes:
    """Render tar number ``index`` of the moving-digits domain: ``clips`` mp4 clips of ``rules``' size and rate.

    Each sample's json holds ``prompt``, ``split`` (one of ``SPLITS``) and every field of ``DigitClip``. The same
    arguments always give the same bytes; tars of different splits share no handwriting.

    Raises:
        DataError: the canvas leaves a digit no room to move.
    """
    widest = DIGIT_PIXELS + int(1.5 * CLEAR_PIXELS)
    if rules.height < DIGIT_PIXELS or rules.width < widest:
        raise DataError(
            f"data.height x data.width = {rules.height} x {rules.width} leaves moving digits no room: use at least "
            f"{DIGIT_PIXELS} x {widest}",
            in_call=True,
        )
    rng = np.random.default_rng([seed, index, SPLITS.index(split)])

    def samples() -> Iterable[tuple[str, dict[str, bytes]]]:
        for number in range(clips):
            clip = draw_clip(rng, level=level, split=split, width=rules.width)
            frames = render(clip, rules.frames, rules.height, rules.width)
            caption = {"prompt": clip.prompt, "split": split, **asdict(clip)}
            # Thin coloured strokes would not survive one colour for four pixels.
            video = encode_mp4(frames, rules.frames_per_second, quality=6, every_colour=True)
            members = {"mp4": video, "json": json.dumps(caption).encode()}
            yield f"{split}-{index:05d}-{number:04d}", members

    buffer = io.BytesIO()
    write_tar(buffer, samples())
    return buffer.getvalue()


def to_table(rows: Mapping[str, np.ndarray | list[str]], details: Mapping[str, Any] | None = None) -> pa.Table:
    """Put columns of B rows into a table that ``parquet_bytes`` writes, with ``details`` on how they were made.

    An array ``[B, ...]`` with two axes or more becomes a fixed-shape tensor column of its own type; a list or a
    one-dimensional array of text becomes a string column.

    Raises:
        DataError: a column is neither, has other axes than ``TRAINING_COLUMNS`` says, or another number of rows.
    """
    counts = {name: len(column) for name, column in rows.items()}
    if len(set(counts.values())) > 1:
        raise DataError(f"columns of a shard need equally many rows, got {counts}")
    columns = {name: _column(name, column) for name, column in rows.items()}
    metadata = {VERSION_KEY: SHARD_VERSION.encode(), DETAILS_KEY: json.dumps(details or {}, sort_keys=True).encode()}
    return pa.table(columns).replace_schema_metadata(metadata)


def details_of(table: pa.Table) -> dict[str, Any]:
    """What ``to_table`` was told of how the rows were made: the ``encoders``' fingerprints and the ``bucket``."""
    return dict(json.loads((table.schema.metadata or {}).get(DETAILS_KEY, b"{}")))


def _column(name: str, column: np.ndarray | list[str]) -> pa.Array:
    array = column if isinstance(column, np.ndarray) else np.array(column, dtype=object)
    axes = TRAINING_COLUMNS.get(name)
    if axes is not None and len(axes.split()) != array.ndim - 1:
        raise DataError(f"column {name!r} of a training shard needs cells [{axes}], got {list(array.shape[1:])}")
    if array.ndim == 1:
        try:
            texts = pa.array(column, type=pa.string())
        except (TypeError, ValueError):
            texts = None
        if texts is None or texts.null_count:
            raise DataError(f"column {name!r} of a shard must hold text or tensors in every row")
        return texts
    cell = array.shape[1:]
    if array.dtype.kind not in "iuf" or 0 in cell:
        raise DataError(f"column {name!r} of a shard must hold numbers, got {array.dtype} cells {list(cell)}")
    # Not from_numpy_ndarray: it refuses zero rows, and records unusual strides as a permutation readers trip over.
    values = pa.array(np.ascontiguousarray(array).reshape(-1))
    storage = pa.FixedSizeListArray.from_arrays(values, math.prod(cell))
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(values.type, cell), storage)


def from_table(table: pa.Table) -> dict[str, np.ndarray | list[str]]:
    """Inverse of ``to_table``: tensor columns as arrays ``[B, ...]``, read-only views where possible; text as lists."""
    columns: dict[str, np.ndarray | list[str]] = {}
    for name in table.column_names:
        column = table[name]
        if isinstance(column.type, pa.FixedShapeTensorType):
            parts = [chunk.to_numpy_ndarray() for chunk in column.chunks]
            empty = np.empty((0, *column.type.shape), column.type.value_type.to_pandas_dtype())
            columns[name] = parts[0] if len(parts) == 1 else np.concatenate([empty, *parts])
        else:
            columns[name] = column.to_pylist()
    return columns


def parquet_bytes(table: pa.Table) -> bytes:
    """Write ``table`` as Parquet in row groups of about ``ROW_GROUP_BYTES``, with a checksum on every page."""
    rows = max(1, ROW_GROUP_BYTES * table.num_rows // max(table.nbytes, 1))
    buffer = io.BytesIO()
    options = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(table, buffer, row_group_size=rows, **options)
    return buffer.getvalue()


def read_parquet_bytes(content: bytes) -> pa.Table:
    """Read what ``parquet_bytes`` wrote.

    Raises:
        DataError: not Parquet, a page that is not what was written, or a training shard of another version.
    """
    try:
        table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
    except (pa.ArrowException, OSError):
        raise DataError("a training shard is not readable Parquet: run prepare_data again") from None
    _check_version(table.schema)
    return table


def read_rows(file: IO[bytes], columns: Sequence[str], start: int, stop: int, rows: int) -> dict[str, Any]:
    """Rows ``start`` to ``stop`` of an open training shard of ``rows`` rows, of those ``columns`` that it has.

    Only row groups that hold any of them are read.

    Raises:
        DataError: not Parquet, a training shard of another version, or one with another number of rows.
    """
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as shard:
            _check_version(shard.schema_arrow)
            found = shard.metadata.num_rows
            if found != rows:
                raise DataError(f"a training shard has {found} rows instead of {rows}: run prepare_data again")
            ends = np.cumsum([shard.metadata.row_group(group).num_rows for group in range(shard.num_row_groups)])
            first, last = np.searchsorted(ends, [start, stop - 1], side="right")
            names = [name for name in columns if name in shard.schema_arrow.names]
            table = shard.read_row_groups(range(first, last + 1), columns=names, use_threads=False)
            before = int(ends[first - 1]) if first else 0
            return from_table(table.slice(start - before, stop - start))
    except (pa.ArrowException, OSError):
        raise DataError("a training shard is not readable Parquet: run prepare_data again") from None


def _check_version(schema: pa.Schema) -> None:
    version = (schema.metadata or {}).get(VERSION_KEY, b"none").decode("utf-8", "replace")
    if version != SHARD_VERSION:
        raise DataError(f"training shard version {version}, this program reads {SHARD_VERSION}: run prepare_data again")
