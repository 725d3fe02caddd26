"""How a distributed checkpoint lies in storage: raw bytes of every rank's shards, and an index in JSON.

Nothing is written to a local disk and nothing is pickled. Every rank puts its own shards into objects of its own,
``rank-00000/00000`` and so on; ``index.json`` says where each piece of each tensor lies, with its CRC-32. Reading takes
of every object only the range that a rank needs, whatever the ranks were that wrote it.
"""

from __future__ import annotations

import io
import json
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import Size, Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

INDEX, FORMAT = "index.json", 1
OBJECT_BYTES = 32 << 20
"""Pieces are joined up to this size; a larger one is an object of its own."""
_ENTRY_BYTES = 2048
"""About what a number takes that is no tensor."""
STREAMS = 4
"""Objects that a rank reads or writes at once."""


class Files(Protocol):
    """The folder of one checkpoint; calls come from several threads. Errors are the storage's own."""

    @property
    def uri(self) -> str:
        """Where a person finds it."""
        ...

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Write an object whole, or not at all."""
        ...

    def read(self, key: str, start: int = 0, stop: int = sys.maxsize) -> bytearray:
        """Bytes ``start`` to ``stop`` of an object, to its end without one."""
        ...


class Piece(NamedTuple):
    """Where a piece of a tensor, or an entry that is none, lies."""

    key: str
    start: int
    length: int
    crc32: int


Commit = Callable[[dict[str, int]], None]
"""Called by the first rank with all objects and their sizes in bytes, once every rank has written its own."""


class Writer(dcp.StorageWriter):
    """Writes one checkpoint. ``commit`` is called last: what it writes is what makes the checkpoint one."""

    def __init__(self, files: Files, commit: Commit):
        self.files, self.commit = files, commit

    def reset(self, checkpoint_id: Any = None) -> None:
        """Part of the interface; a writer is made for each checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Part of the interface; there is nothing to prepare."""

    def prepare_local_plan(self, plan: dcp.SavePlan) -> dcp.SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[dcp.SavePlan]) -> list[dcp.SavePlan]:
        """Tell every rank the folder of its objects."""
        return [replace(plan, storage_data=f"rank-{rank:05d}") for rank, plan in enumerate(plans)]

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's shards, several objects at once; a result is an object and the pieces in it."""

        def write(number: int, items: list[WriteItem]) -> WriteResult:
            key = f"{plan.storage_data}/{number:05d}"
            bodies = [_body(planner.resolve_data(item)) for item in items]
            self.files.write(key, bodies[0] if len(bodies) == 1 else b"".join(bodies))
            pieces, start = {}, 0
            for item, body in zip(items, bodies, strict=True):
                pieces[item.index.fqn, item.index.offset] = Piece(key, start, len(body), zlib.crc32(body))
                start += len(body)
            return WriteResult(MetadataIndex(key), size_in_bytes=start, storage_data=pieces)

        groups = _groups(plan.items)
        with ThreadPoolExecutor(STREAMS) as pool:
            written = list(pool.map(write, range(len(groups)), groups))
        done: Future[list[WriteResult]] = Future()
        done.set_result(written)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index and commit; the first rank alone is asked."""
        written = [each for rank in results for each in rank]
        index = _index(metadata, {name: piece for each in written for name, piece in each.storage_data.items()})
        self.files.write(INDEX, index)
        self.commit({INDEX: len(index)} | {each.index.fqn: each.size_in_bytes for each in written})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """No name alone says where a checkpoint lies."""
        return False


def _groups(items: Iterable[WriteItem]) -> list[list[WriteItem]]:
    """Items that share an object, in order."""
    groups: list[list[WriteItem]] = []
    room = 0
    for item in items:
        size = _bytes_of(item)
        if not groups or size > room:
            groups.append([])
            room = OBJECT_BYTES
        groups[-1].append(item)
        room -= size
    return groups


def _bytes_of(item: WriteItem) -> int:
    if item.tensor_data is None:
        return _ENTRY_BYTES
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def _body(data: Tensor | io.BytesIO) -> memoryview:
    if isinstance(data, io.BytesIO):
        return data.getbuffer()
    flat = data.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _index(metadata: Metadata, pieces: dict[tuple[str, Size | None], Piece]) -> bytes:
    tensors, entries = {}, {}
    for name, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            chunks = [[*map(list, (c.offsets, c.sizes)), *pieces[name, c.offsets]] for c in stored.chunks]
            dtype = str(stored.properties.dtype).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "size": list(stored.size), "chunks": chunks}
        else:
            entries[name] = pieces[name, None]
    return json.dumps({"format": FORMAT, "tensors": tensors, "entries": entries}, separators=(",", ":")).encode()


class Reader(dcp.StorageReader):
    """Reads a checkpoint that ``Writer`` wrote, in parts that any number of ranks may need.

    Raises:
        ValueError: its index is none, or of another format.
    """

    def __init__(self, files: Files):
        self.files = files
        self.pieces: dict[tuple[str, Size | None], Piece] = {}
        self.metadata = self._read_index()

    def reset(self, checkpoint_id: Any = None) -> None:
        """Part of the interface; a reader is made for each checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index."""
        return self.metadata

    def _read_index(self) -> Metadata:
        index = json.loads(self.files.read(INDEX))
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise ValueError(f"its {INDEX} is not of format {FORMAT}")
        found: dict[str, Any] = {}
        for name, piece in index["entries"].items():
            found[name], self.pieces[name, None] = BytesStorageMetadata(), Piece(*piece)
        for name, tensor in index["tensors"].items():
            dtype = getattr(torch, tensor["dtype"])
            chunks = []
            for offsets, sizes, *piece in tensor["chunks"]:
                chunks.append(ChunkStorageMetadata(Size(offsets), Size(sizes)))
                self.pieces[name, Size(offsets)] = Piece(*piece)
            found[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), Size(tensor["size"]), chunks)
        return Metadata(state_dict_metadata=found, planner_data={}, storage_meta=StorageMeta())

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Part of the interface; the index was read when this was made."""

    def prepare_local_plan(self, plan: dcp.LoadPlan) -> dcp.LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[dcp.LoadPlan]) -> list[dcp.LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> Future[None]:
        """Read what this rank needs, several objects at once.

        Raises:
            ValueError: a piece is not what was written.
        """
        by_object: dict[str, list[dcp.ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_object[self._piece(item).key].append(item)

        def read(key: str) -> None:
            pieces = [self._piece(item) for item in by_object[key]]
            first, last = min(p.start for p in pieces), max(p.start + p.length for p in pieces)
            data = memoryview(self.files.read(key, first, last)) if last > first else memoryview(b"")
            for item, piece in zip(by_object[key], pieces, strict=True):
                part = data[piece.start - first : piece.start - first + piece.length]
                if len(part) != piece.length or zlib.crc32(part) != piece.crc32:
                    raise ValueError(f"{key} is damaged where {item.storage_index.fqn} lies")
                self._place(item, part, planner)

        with ThreadPoolExecutor(STREAMS) as pool:
            list(pool.map(read, by_object))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _piece(self, item: dcp.ReadItem) -> Piece:
        offset = None if item.type is LoadItemType.BYTE_IO else item.storage_index.offset
        return self.pieces[item.storage_index.fqn, offset]

    def _place(self, item: dcp.ReadItem, part: memoryview, planner: dcp.LoadPlanner) -> None:
        if item.type is LoadItemType.BYTE_IO:
            planner.load_bytes(item, io.BytesIO(part))
            return
        stored = self.metadata.state_dict_metadata[item.storage_index.fqn]
        assert isinstance(stored, TensorStorageMetadata)
        sizes = next(chunk.sizes for chunk in stored.chunks if chunk.offsets == item.storage_index.offset)
        dtype = stored.properties.dtype
        # A copy, because the part need not begin where the type wants it to.
        whole = torch.frombuffer(bytearray(part), dtype=dtype) if part else torch.empty(0, dtype=dtype)
        source = whole.reshape(sizes)
        for dimension, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            source = source.narrow(dimension, offset, length)
        # Shards of one tensor are read side by side: with gradients one's view would notice that another wrote.
        with torch.no_grad():
            target = planner.resolve_tensor(item).detach()
            target.copy_(source)
        planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """No name alone says where a checkpoint lies."""
        return False
