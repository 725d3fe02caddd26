"""Prepared shards by split; what is held out comes in one size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pose_core.data.shards import parquet_bytes, to_table
from pose_core.errors import DataError
from pose_core.runtime.datasets import Prepared
from pose_core.runtime.storage import Store

SHARDS = {
    "train/9x32x32/a.parquet": 5,
    "validation/9x32x32/b.parquet": 2,
    "validation/17x32x32/c.parquet": 2,
    "validation/17x32x32/d.parquet": 1,
}


def write(store: Store, path: str, rows: int) -> None:
    frames = int(path.split("/")[1].partition("x")[0])
    columns = {
        "key": [f"{path}#{row}" for row in range(rows)],
        "latents": np.zeros((rows, 1, frames, 2, 2), np.float32),
    }
    store.write_bytes(path, parquet_bytes(to_table(columns)))


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    store = Store.open(str(tmp_path))
    for path, rows in SHARDS.items():
        write(store, path, rows)
    return Prepared(store, SHARDS)


def test_rows_are_counted_over_the_buckets_of_a_split(prepared: Prepared) -> None:
    assert [prepared.rows(split) for split in ("train", "validation", "test")] == [5, 5, 0]


def test_heldout_rows_are_of_the_largest_bucket(prepared: Prepared) -> None:
    rows = prepared.heldout("validation", 10)
    assert rows["latents"].shape == (3, 1, 17, 2, 2)
    assert rows["key"] == [f"validation/17x32x32/{name}" for name in ("c.parquet#0", "c.parquet#1", "d.parquet#0")]
    assert prepared.heldout("validation", 2)["key"] == rows["key"][:2]


def test_another_split_stands_in_for_an_empty_one_and_none_is_an_error(prepared: Prepared) -> None:
    assert prepared.heldout("test", 3)["key"] == prepared.heldout("validation", 3)["key"]
    with pytest.raises(DataError, match=r"raise data\.heldout_fraction") as caught:
        Prepared(prepared.store, {"train/9x32x32/a.parquet": 5}).heldout("test", 1)
    assert caught.value.exit_code == 2
