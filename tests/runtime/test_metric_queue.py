"""The queue of metrics: order, batches, and what a failing receiver costs."""

from __future__ import annotations

import threading

import pytest

from pose_core.runtime import metric_queue
from pose_core.runtime.metric_queue import BATCH_POINTS, MetricQueue, Point


class Receiver:
    """Takes points, or refuses them while ``up`` is false."""

    def __init__(self) -> None:
        self.up = True
        self.sizes: list[int] = []
        self.steps: list[int] = []

    def __call__(self, points: list[Point]) -> bool:
        if self.up:
            self.sizes.append(len(points))
            self.steps += [point.step for point in points]
        return self.up


def points(first: int, last: int) -> list[Point]:
    return [Point("loss", 1.0, 0, step) for step in range(first, last)]


def test_all_points_arrive_in_order_and_in_batches() -> None:
    receiver = Receiver()
    queue = MetricQueue(receiver)
    for step in range(2 * BATCH_POINTS + 10):
        queue.add(points(step, step + 1))
    assert queue.close() == 0
    assert receiver.steps == list(range(2 * BATCH_POINTS + 10))
    assert max(receiver.sizes) <= BATCH_POINTS
    assert len(receiver.sizes) < 20


def test_points_are_sent_without_being_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric_queue, "FLUSH_SECONDS", 0.01)
    arrived = threading.Event()

    def send(batch: list[Point]) -> bool:
        arrived.set()
        return True

    queue = MetricQueue(send)
    queue.add(points(0, 1))
    assert arrived.wait(timeout=30)
    queue.close()


def test_an_outage_costs_no_point_and_no_order() -> None:
    receiver = Receiver()
    queue = MetricQueue(receiver)
    receiver.up = False
    queue.add(points(0, 700))
    assert not queue.flush()
    queue.add(points(700, 900))
    receiver.up = True
    assert queue.flush()
    assert queue.close() == 0
    assert receiver.steps == list(range(900))


def test_a_full_queue_keeps_the_newest_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric_queue, "QUEUE_POINTS", 100)
    receiver = Receiver()
    queue = MetricQueue(receiver)
    receiver.up = False
    queue.add(points(0, 60))
    queue.flush()
    queue.add(points(60, 400))
    receiver.up = True
    queue.close()
    assert receiver.steps == [*range(60), *range(300, 400)]


def test_close_tells_how_many_points_were_lost() -> None:
    receiver = Receiver()
    queue = MetricQueue(receiver)
    receiver.up = False
    queue.add(points(0, 700))
    assert queue.close() == 700


def test_a_closed_queue_takes_up_work_again() -> None:
    receiver = Receiver()
    queue = MetricQueue(receiver)
    queue.add(points(0, 3))
    queue.close()
    queue.add(points(3, 5))
    queue.close()
    assert receiver.steps == [0, 1, 2, 3, 4]
