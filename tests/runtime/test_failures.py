"""A phase ends at once for an error that would come back, and goes on after a worker's death."""

from __future__ import annotations

import pytest
from ray.exceptions import RayActorError

from pose_core.errors import CheckpointError, PoseError, StorageError
from pose_core.runtime.failures import EndAtOnce, final_error


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
