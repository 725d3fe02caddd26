"""The training shards of a run, as ``prepare_data`` left them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from pose_core.data.captions import HELDOUT
from pose_core.data.shards import from_table, read_parquet_bytes
from pose_core.errors import DataError
from pose_core.runtime.storage import Store

TRAINED_ON = ("latents", "text", "image", "first_frame")
NULL_TEXT = "null_text.parquet"


@dataclass(frozen=True)
class Prepared:
    """The training shards of a run: where they are and how many rows each holds."""

    store: Store
    shards: dict[str, int]

    def rows(self, split: str) -> int:
        """Clips in a split."""
        return sum(self._of(split).values())

    def heldout(self, split: str, rows: int) -> dict[str, Any]:
        """The first ``rows`` rows of ``validation`` or ``test``, every column; fewer where there are fewer.

        All are of one size: those of the bucket that holds most of the split. Where a split is empty, which happens to
        small datasets, the other one stands in for it.

        Raises:
            DataError: both are empty (correctable in the call).
        """
        shards = next(filter(None, map(self._of, (split, *HELDOUT))), {})
        if not shards:
            raise DataError("no clip was held out: raise data.heldout_fraction or add clips", in_call=True)
        sizes = Counter[str]()
        for name, count in sorted(shards.items()):
            sizes[bucket_of(name)] += count
        largest = max(sizes, key=lambda bucket: sizes[bucket])
        tables: list[dict[str, Any]] = []
        for name in sorted(name for name in shards if bucket_of(name) == largest):
            if sum(len(table["key"]) for table in tables) >= rows:
                break
            tables.append(from_table(read_parquet_bytes(self.store.read_bytes(name))))
        joined: dict[str, Any] = {}
        for name in tables[0]:
            cells = [cell for table in tables for cell in table[name]][:rows]
            joined[name] = cells if isinstance(cells[0], str) else np.stack(cells)
        return joined

    def null_text(self) -> np.ndarray:
        """Embeddings of the empty prompt, ``[1, L, D]``."""
        return np.asarray(from_table(read_parquet_bytes(self.store.read_bytes(NULL_TEXT)))["text"])

    def _of(self, split: str) -> dict[str, int]:
        return {name: rows for name, rows in self.shards.items() if name.startswith(f"{split}/")}


def bucket_of(path: str) -> str:
    """The bucket that a shard's path, ``split/bucket/name`` or ``split/name``, names; empty where there is only one."""
    parts = PurePosixPath(path).parts
    return parts[1] if len(parts) > 2 else ""
