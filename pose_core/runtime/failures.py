"""Which failures of a worker end a phase at once; all others are what Ray Train restarts its workers for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ray.train
from ray.exceptions import RayActorError

from pose_core.errors import ClusterError, PoseError, ReplacedError, StorageError, StorageGoneError


def final_error(failures: Iterable[Exception]) -> PoseError | None:
    """The error that would only come back after a restart, if one of the workers' ``failures`` is one.

    Errors of ours speak of the settings, the data or the weights, which a restart does not change. Those of the store
    or the cluster may pass, unless they have been waited for already; and beside a worker that died any other error may
    only follow from that.
    """
    failures = [getattr(failure, "cause", failure) for failure in failures]
    if any(isinstance(failure, RayActorError) for failure in failures):
        return None
    ours = [failure for failure in failures if isinstance(failure, PoseError)]
    return next((failure for failure in ours if not _may_pass(failure)), None)


def _may_pass(failure: PoseError) -> bool:
    final = isinstance(failure, StorageGoneError | ReplacedError)
    return isinstance(failure, StorageError | ClusterError) and not final


class EndAtOnce(ray.train.UserCallback):
    """Keeps Ray Train from restarting the workers after a final error: what a callback raises is not retried."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called in Ray Train's controller with the workers' exceptions by rank.

        Raises:
            PoseError: the final one among them.
        """
        error = final_error(worker_exceptions.values())
        if error is not None:
            raise error
