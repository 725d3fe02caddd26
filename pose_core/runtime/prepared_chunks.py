"""Chunks of prepared training shards, read by threads of the train worker that needs them."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from pose_core.data.order import Chunk
from pose_core.data.shards import read_rows
from pose_core.runtime.datasets import bucket_of
from pose_core.runtime.steady_files import SteadyFiles

READERS = 2
"""Threads that read ahead; one is enough to keep up with a loop that trains, two hide the store's latency."""


class PreparedChunks:
    """Shards by path and number of rows, each of one bucket: ``<split>/<bucket>/<name>`` or ``<split>/<name>``.

    ``columns`` are read of them, those that there are, ``chunk_clips`` rows at a time.
    """

    def __init__(self, files: SteadyFiles, shards: dict[str, int], columns: tuple[str, ...], chunk_clips: int):
        self.files, self.columns, self.chunk_clips = files, columns, chunk_clips
        self.shards = sorted(shards.items())
        self._loads: dict[tuple[Chunk, str], Future[dict[str, Any]]] = {}
        self._versions: dict[str, str] = {}
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="shards")

    def counts(self, chunk: Chunk) -> dict[str, int] | None:
        """Rows by bucket; None behind the shard's end."""
        path, rows = self.shards[chunk.shard]
        left = rows - chunk.number * self.chunk_clips
        return {bucket_of(path): min(left, self.chunk_clips)} if left > 0 else None

    def want(self, chunk: Chunk, bucket: str) -> None:
        """Begin to read a chunk."""
        if (chunk, bucket) not in self._loads:
            self._loads[chunk, bucket] = self._readers.submit(self._load, chunk)

    def rows(self, chunk: Chunk, bucket: str) -> dict[str, Any]:
        """The columns of a chunk that was wanted; waits for it.

        Raises:
            StorageError, DataError: it cannot be read, or is not what was prepared.
        """
        return self._loads[chunk, bucket].result()

    def drop(self, chunk: Chunk, bucket: str) -> None:
        """Forget a chunk."""
        self._loads.pop((chunk, bucket), None)

    def refused(self) -> list[str]:
        """None: what was prepared can be used."""
        return []

    def close(self) -> None:
        """Stop reading."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _load(self, chunk: Chunk) -> dict[str, Any]:
        path, rows = self.shards[chunk.shard]
        start = chunk.number * self.chunk_clips
        stop = min(rows, start + self.chunk_clips)
        if stop - start == rows:
            return self.files.parse(path, lambda content: self._rows(pa.BufferReader(content), start, stop, rows))
        # Other chunks of the shard must be of the same version; one that was replaced is an error then.
        with self.files.open(path, self._versions.get(path, "")) as file:
            loaded = self._rows(file, start, stop, rows)
            self._versions[path] = file.raw.version  # type: ignore[attr-defined]
        return loaded

    def _rows(self, file: Any, start: int, stop: int, rows: int) -> dict[str, Any]:
        return read_rows(file, self.columns, start, stop, rows)
