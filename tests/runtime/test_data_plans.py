"""What a data task raises reaches the person as it was meant."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import ray

from pose_core.errors import CheckpointError, ClusterError, PoseError, StorageError
from pose_core.runtime.data_plans import plain, work_through
from pose_core.runtime.local_ray import LocalRay


def test_what_is_not_ours_is_named_by_its_last_line() -> None:
    error = plain(ray.exceptions.RayError("a long\nstory\n  ValueError: the end  "))
    assert isinstance(error, ClusterError) and str(error) == "a data task failed: ValueError: the end"


def work(rows: dict[str, Any]) -> dict[str, Any]:
    if "bad" in rows["item"][0]:
        raise StorageError("s3://films is gone; bring it back", in_call=True)
    return {"result": rows["item"]}


class Actor:
    """Fails while it is made."""

    def __init__(self, weights: str):
        raise CheckpointError(f"{weights} has no vae")

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        return rows


@pytest.mark.integration
def test_items_come_back_and_errors_of_ours_stay_ours(tmp_path: Path) -> None:
    with LocalRay(tmp_path):
        folder = str(Path(__file__).parents[2])
        ray.init(address="auto", log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": folder}})
        try:
            items = [{"number": number} for number in range(5)]
            assert sorted(work_through(items, work), key=lambda item: item["number"]) == items
            assert list(work_through([], work)) == []
            with pytest.raises(PoseError) as caught:
                list(work_through([{"bad": 1}], work))
            assert type(caught.value) is StorageError and caught.value.exit_code == 2
            assert str(caught.value) == "s3://films is gone; bring it back"
            pool = {"fn_constructor_args": ("teacher",), "compute": ray.data.ActorPoolStrategy(min_size=1, max_size=1)}
            with pytest.raises(CheckpointError, match="teacher has no vae"):
                list(work_through([{"good": 1}], Actor, **pool))
            assert not [thread for thread in threading.enumerate() if "usage" in thread.name]  # nothing is told of it
        finally:
            ray.shutdown()
