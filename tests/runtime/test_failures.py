"""A phase ends at once for an error that would come back, and goes on after a worker's death."""

from __future__ import annotations

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError

from pose_core.errors import CheckpointError, PoseError, StorageError
from pose_core.runtime.failures import EndAtOnce, final_error
from pose_core.runtime.out_of_memory import MemoryExhausted
from pose_core.runtime.phases import plain


@pytest.mark.parametrize(
    "failures",
    [
        [RayActorError()],
        [RuntimeError("connection closed by peer"), RayActorError()],
        [CheckpointError("read while its peer died"), RayActorError()],
        [StorageError("the store does not answer")],
        [ValueError("not ours")],
    ],
)
def test_what_may_pass_is_left_to_a_restart(failures: list[Exception]) -> None:
    assert final_error(failures) is None
    EndAtOnce().after_exception(None, dict(enumerate(failures)))


def test_an_error_of_ours_comes_back_so_it_is_final_whatever_the_other_ranks_say() -> None:
    error = PoseError("step 6: not finite, three in a row")
    assert final_error([RuntimeError("connection closed by peer"), error]) is error
    with pytest.raises(PoseError, match="^step 6"):
        EndAtOnce().after_exception(None, {0: error, 1: error})


class Ended(Exception):
    """As Ray Train tells of workers that failed."""

    def __init__(self, *failures: Exception):
        super().__init__("worker group failed")
        self.worker_failures = dict(enumerate(failures))


def test_the_line_at_the_end_says_what_ended_the_phase_for_good() -> None:
    ours, dead = PoseError("step 6: not finite"), RayActorError()
    assert plain(Ended(dead, ours), "priming", ["rank 0: late"], {}) is ours
    hung = str(plain(Ended(dead), "priming", ["rank 1: step 3 has taken more than 60 s"], {}))
    assert "the watchdog ended rank 1: step 3 has taken more than 60 s: see the stacks in its log" in hung
    assert "training.slow_step_seconds" in hung
    killed = plain(Ended(OutOfMemoryError("memory usage threshold of 0.95")), "priming", [], {})
    assert isinstance(killed, MemoryExhausted)
    assert str(plain(Ended(dead), "priming", [], {})).startswith("priming failed more often than training.max_failures")
