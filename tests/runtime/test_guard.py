"""Whatever a function does to its process, the caller gets a reason and the next call works."""

from __future__ import annotations

import operator
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pose_core.data.inspection import InspectionRules, inspect_video
from pose_core.data.video import container_format
from pose_core.errors import DataError
from pose_core.runtime.guard import Guard


@pytest.fixture(scope="module")
def guard() -> Iterator[Guard]:
    guard = Guard(2 << 30, 30.0)
    yield guard
    guard.close()


def test_it_returns_and_raises_what_the_function_does(guard: Guard) -> None:
    assert guard.call(operator.add, b"a" * 3_000_000, b"b") == b"a" * 3_000_000 + b"b"
    with pytest.raises(DataError, match="decode: no bytes"):
        guard.call(container_format, b"")
    assert guard.call(inspect_video, b"noise" * 99, InspectionRules(())).problem.startswith("decode: unreadable")


def test_one_child_serves_many_calls(guard: Guard) -> None:
    assert guard.call(os.getpid) == guard.call(os.getpid) != os.getpid()


@pytest.mark.parametrize(
    ("function", "arguments", "reason"),
    [
        (os.abort, (), "decode: crashed the decoder, SIGABRT"),
        (os._exit, (3,), "decode: crashed the decoder, exit 3"),
        (bytearray, (50 << 30,), "decode: needs too much memory"),
        (int, ("x",), "decode: unreadable, ValueError"),
        (time.sleep, (60,), "decode: took longer than 1 seconds"),
    ],
)
def test_the_worst_costs_only_its_own_call(
    guard: Guard, function: Callable[..., Any], arguments: tuple[Any, ...], reason: str
) -> None:
    guard.seconds = 1 if function is time.sleep else 30
    with pytest.raises(DataError) as caught:
        guard.call(function, *arguments)
    assert str(caught.value) == reason
    guard.seconds = 30
    assert guard.call(operator.add, 1, 2) == 3


def test_it_writes_no_files(guard: Guard, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        guard.call(Path(tmp_path / "bomb").write_bytes, bytes(100))
    assert not (tmp_path / "bomb").exists() or (tmp_path / "bomb").stat().st_size == 0
    assert guard.call(operator.add, 1, 2) == 3


def test_it_prints_nothing_between_the_answers(guard: Guard) -> None:
    assert guard.call(print, "hello") is None
    assert guard.call(os.write, 1, b"noise") == 5
    assert guard.call(operator.add, 1, 2) == 3


def test_the_child_ends_with_its_guard() -> None:
    guard = Guard(2 << 30, 30.0)
    child = guard.call(os.getpid)
    guard.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, signal.SIGCONT)
