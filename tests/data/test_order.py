"""The order of clips: each once an epoch, a new one each epoch, the same for a seed, resumed with any batch size."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from pose_core.data.order import Chunk, Counts, Order, Place, Planned, Position, plan
from pose_core.errors import CheckpointError, DataError

SHARDS = [("wide", 23), ("tall", 7), ("wide", 1), ("tall", 16), ("wide", 40), ("wide", 9), ("tall", 5)]
ORDER = Order(len(SHARDS), side_by_side=3, seed=5)
CHUNK = 8


def counts(chunk: Chunk) -> dict[str, int] | None:
    bucket, rows = SHARDS[chunk.shard]
    left = rows - CHUNK * chunk.number
    return {bucket: min(left, CHUNK)} if left > 0 else None


def planned(batches: int, position: Position | None = None, batch: int = 4, order: Order = ORDER) -> list[Planned]:
    return list(itertools.islice(plan(order, counts, batch, position or Position()), batches))


def every_place(epoch: int) -> set[tuple[int, int]]:
    return {(shard, row) for shard, (_, rows) in enumerate(SHARDS) for row in range(rows)}


def by_epoch(batches: list[Planned]) -> dict[int, Counter[tuple[int, int]]]:
    """How often each clip, as shard and row, comes in each epoch."""
    seen: dict[int, Counter[tuple[int, int]]] = {}
    for place in itertools.chain.from_iterable(batch.places for batch in batches):
        clip = (place.chunk.shard, CHUNK * place.chunk.number + place.row)
        seen.setdefault(place.chunk.epoch, Counter())[clip] += 1
    return seen


def test_each_clip_comes_once_an_epoch_and_batches_are_whole_and_of_one_bucket() -> None:
    batches = planned(200)
    seen = by_epoch(batches)
    assert max(seen) > 5
    for epoch in range(5):
        assert seen[epoch] == Counter(every_place(epoch)), epoch
    for batch in batches:
        assert len(batch.places) == 4 and {place.bucket for place in batch.places} == {batch.bucket}


def test_the_same_seed_gives_the_same_order_and_another_another() -> None:
    assert planned(50) == planned(50)
    assert [b.places for b in planned(50)] != [b.places for b in planned(50, order=Order(len(SHARDS), 3, seed=6))]


def test_epochs_differ_and_shards_are_mixed() -> None:
    rows: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
    for batch in planned(40):
        for place in batch.places:
            if place.chunk.epoch in rows:
                rows[place.chunk.epoch].append((place.chunk.shard, place.row))
    assert rows[0] != rows[1] and sorted(rows[0]) != rows[0]
    assert max(len({place.chunk.shard for place in batch.places}) for batch in planned(40)) > 1


@pytest.mark.parametrize("done", [1, 2, 7, 19, 40, 77])
def test_a_run_goes_on_from_any_batch_as_if_it_had_not_stopped(done: int) -> None:
    undisturbed = planned(120)
    position = Position.from_json(undisturbed[done - 1].after.to_json())
    assert position == undisturbed[done - 1].after
    rest = planned(120 - done, position)
    assert [batch.places for batch in rest] == [batch.places for batch in undisturbed[done:]]


def test_with_other_batch_sizes_on_the_way_each_clip_still_comes_once_an_epoch() -> None:
    batches: list[Planned] = []
    for batch, count in [(4, 5), (2, 9), (6, 3), (1, 7), (4, 4), (8, 6), (3, 11)] * 3:
        batches += planned(count, batches[-1].after if batches else None, batch)
    seen = by_epoch(batches)
    assert max(seen) > 2
    for epoch in range(max(seen) - 1):
        assert seen[epoch] == Counter(every_place(epoch)), epoch


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_workers_slices_are_disjoint_and_make_up_the_batch(ranks: int) -> None:
    for batch in planned(30):
        slices = [batch.slice(rank, ranks) for rank in range(ranks)]
        assert tuple(itertools.chain(*slices)) == batch.places


def test_workers_read_disjoint_shards_where_shards_are_alike() -> None:
    order, even = Order(8, 4, 0), lambda chunk: {"": 8} if chunk.number < 2 else None
    for batch in itertools.islice(plan(order, even, 8, Position()), 32):
        first, second = ({place.chunk for place in batch.slice(rank, 2)} for rank in range(2))
        assert not first & second


def test_only_one_window_and_what_is_left_over_has_to_be_known() -> None:
    asked: list[Chunk] = []

    def watched(chunk: Chunk) -> dict[str, int] | None:
        asked.append(chunk)
        return counts(chunk)

    next(plan(ORDER, watched, 4, Position()))
    assert {chunk.number for chunk in asked} == {0} and len(asked) == ORDER.side_by_side
    for batch in planned(100):
        assert len(batch.after.left) < 2 * 4  # of two buckets, less than a batch each


def test_an_epoch_without_a_clip_is_an_error_and_not_an_endless_search() -> None:
    empty: Counts = lambda chunk: {} if chunk.number == 0 else None  # noqa: E731
    with pytest.raises(DataError, match="no clip is usable"):
        next(plan(ORDER, empty, 4, Position()))


def test_a_clip_that_never_fills_a_batch_waits_for_the_next_epochs() -> None:
    rare: Counts = lambda chunk: {"rare": 1, "often": 4} if chunk.number == 0 else None  # noqa: E731
    batches = list(itertools.islice(plan(Order(1, 1, 0), rare, 4, Position()), 10))
    found = [batch for batch in batches if batch.bucket == "rare"]
    assert [place.chunk.epoch for place in found[0].places] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"epoch": "x"}', '{"epoch":0,"group":0,"window":0,"taken":1,"left":[]}']
)
def test_a_damaged_position_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="position is damaged"):
        Position.from_json(text)


def test_places_sort_by_chunk() -> None:
    places = [Place(Chunk(0, 2, 0), "", 1), Place(Chunk(0, 1, 0), "", 9)]
    assert sorted(places)[0].chunk.shard == 1
