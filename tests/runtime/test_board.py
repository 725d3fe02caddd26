"""What workers say on a phase's board is what the driver and the other workers find there, once and in order."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from pose_core.runtime.board import Board, drawn
from pose_core.runtime.local_ray import LocalRay

pytestmark = pytest.mark.integration


class Seen:
    """A display that remembers."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def update(self, stage: str, done: int, total: int, **values: float) -> None:
        self.calls.append((done, total, values))

    def note(self, text: str) -> None:
        self.calls.append((text.removeprefix("priming").strip(),))

    def close(self) -> None:
        """Nothing was opened."""


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with LocalRay(tmp_path_factory.mktemp("ray")):
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


def test_everyone_who_has_a_board_finds_the_same_on_it() -> None:
    board = Board()
    assert (board.newest(), board.rung(), board.notes(), board.kills()) == ((0, {}), 0, {}, {})
    other = pickle.loads(pickle.dumps(board))
    other.update(3, {"loss": 0.5})
    other.at_work("node", 2)
    other.at_work("node", 7)
    other.at_work("other", 0)
    for number in range(12):
        other.ring(f"rank {number}", "its stacks")
    assert board.newest() == (3, {"loss": 0.5})
    assert board.kills() == {"node": 2, "other": 0}
    assert board.rung() == 12
    assert list(board.rings().values()) == [(f"rank {number}", "its stacks") for number in range(12)]


def test_boards_are_apart_and_one_that_is_cleared_is_empty() -> None:
    one, other = Board(), Board()
    one.note("of one")
    other.note("of the other")
    one.clear()
    assert one.notes() == {} and list(other.notes().values()) == ["of the other"]


def test_each_line_is_drawn_once_and_the_last_ones_too(capsys: pytest.CaptureFixture[str]) -> None:
    seen = Seen()
    with drawn(seen, "priming", 9) as board:
        board.update(0, {})
        board.update(4, {"loss": 0.25})
        board.update(2, {})
        board.note("a line")
        board.ring("rank 1: it hangs", "stacks of rank 1")
    rung = "ended by the watchdog, rank 1: it hangs; its stacks are in this stage's log"
    assert [call for call in seen.calls if len(call) == 1] == [(rung,), ("goes on from step 2",), ("a line",)]
    assert seen.calls[-1] == (2, 9, {})
    assert capsys.readouterr().out == "stacks of rank 1\n"
    assert board.notes() == {} and board.newest() == (0, {})
