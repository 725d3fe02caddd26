"""The training shards of a run as Ray Data plans read them: rows stream to the trainers, a few blocks in flight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from pose_core.data.shards import from_table, read_parquet_bytes
from pose_core.errors import DataError
from pose_core.runtime.data_plans import in_order_and_quiet
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
        return sum(rows for name, rows in self.shards.items() if name.startswith(f"{split}/"))

    def stream(self, rows: int, seed: int) -> ray.data.Dataset:
        """At least ``rows`` training rows: epoch after epoch, shards and the rows in them in a new order each."""
        names = sorted(name for name in self.shards if name.startswith("train/"))
        if not names:
            raise DataError("no clip was prepared for training: see the quarantine file", in_call=True)
        parts: list[dict[str, Any]] = []
        epoch = planned = 0
        while planned < rows:
            for index in np.random.default_rng([seed, epoch]).permutation(len(names)):
                parts.append({"shard": names[index], "seed": [seed, epoch, int(index)]})
                planned += self.shards[names[index]]
            epoch += 1
        in_order_and_quiet()
        source = ray.data.from_items(parts, override_num_blocks=len(parts))
        return source.map_batches(read_shard, fn_args=(self.store,), batch_size=1, num_cpus=0.25)

    def heldout(self, rows: int) -> dict[str, Any]:
        """The first ``rows`` held-out rows, every column; fewer where there are fewer."""
        tables: list[dict[str, Any]] = []
        for name in sorted(name for name in self.shards if name.startswith("heldout/")):
            if sum(len(table["key"]) for table in tables) >= rows:
                break
            tables.append(from_table(read_parquet_bytes(self.store.read_bytes(name))))
        if not tables:
            raise DataError("no clip was held out: raise data.heldout_fraction or add clips", in_call=True)
        joined: dict[str, Any] = {}
        for name in tables[0]:
            cells = [cell for table in tables for cell in table[name]][:rows]
            joined[name] = cells if isinstance(cells[0], str) else np.stack(cells)
        return joined

    def null_text(self) -> np.ndarray:
        """Embeddings of the empty prompt, ``[1, L, D]``."""
        return np.asarray(from_table(read_parquet_bytes(self.store.read_bytes(NULL_TEXT)))["text"])


def read_shard(part: dict[str, np.ndarray], store: Store) -> dict[str, np.ndarray]:
    """The tensor columns of one shard, its rows shuffled by the part's seed."""
    columns = from_table(read_parquet_bytes(store.read_bytes(str(part["shard"][0]))))
    order = np.random.default_rng(np.asarray(part["seed"][0]).tolist()).permutation(len(columns["key"]))
    return {name: np.asarray(columns[name])[order] for name in TRAINED_ON if name in columns}
