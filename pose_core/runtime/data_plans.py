"""What every Ray Data plan of this project has in common: quiet, in order, and with errors a person can read."""

from __future__ import annotations

import base64
import json
import logging
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from pose_core.errors import ClusterError, PoseError

_ERROR = "pose_error"


def in_order_and_quiet() -> None:
    """Set up the plans that this process makes from here on."""
    context = ray.data.DataContext.get_current()
    # What a resumed phase skips must be what the first attempt saw.
    context.execution_options.preserve_order = True
    # Ray Data's own bars move the cursor in the job's log, and lines of ours that follow would not be found.
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def in_any_order_and_quiet() -> None:
    """The same for a plan whose rows may come as they are done, so that a slow one holds up none."""
    in_order_and_quiet()
    ray.data.DataContext.get_current().execution_options.preserve_order = False


def work_through(items: Sequence[dict[str, Any]], function: Any, **how: Any) -> Iterator[dict[str, Any]]:
    """Call ``function`` on every item, one at a time, on the cluster; yields what it returns, as it is done.

    Items and results are JSON values. ``function`` is a function or a class, ``how`` what ``map_batches`` takes.

    Raises:
        PoseError: what the function raised, or what became of the cluster.
    """
    if not items:
        return
    in_any_order_and_quiet()
    if isinstance(function, type):
        how["fn_constructor_args"] = (function, *how.get("fn_constructor_args", ()))
    work = _TellingActor if isinstance(function, type) else _Telling(function)
    source = ray.data.from_items([{"item": json.dumps(item)} for item in items], override_num_blocks=len(items))
    try:
        for row in source.map_batches(work, batch_size=1, **how).iter_rows():
            result = json.loads(row["result"])
            if isinstance(result, dict) and _ERROR in result:
                raise pickle.loads(base64.b64decode(result[_ERROR]))
            yield result
    except RayError as error:
        raise plain(error) from error


class _Telling:
    """Calls a function and returns an error of ours instead of raising it: Ray Data keeps no more than its text."""

    def __init__(self, function: Any):
        self._function = function

    def __call__(self, rows: Any) -> Any:
        try:
            return self._function(rows)
        except PoseError as error:
            return _told(error)


class _TellingActor:
    """The same with an actor of ``kind``, also for what making it raises."""

    def __init__(self, kind: Any, *arguments: Any):
        self._failure: PoseError | None = None
        try:
            self._work = _Telling(kind(*arguments))
        except PoseError as error:
            self._failure = error

    def __call__(self, rows: Any) -> Any:
        return _told(self._failure) if self._failure else self._work(rows)


def _told(error: PoseError) -> dict[str, np.ndarray]:
    told = {_ERROR: base64.b64encode(pickle.dumps(error)).decode()}
    return {"result": np.array([json.dumps(told)], dtype=object)}


def plain(error: RayError) -> PoseError:
    """One line about what became of a task."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ClusterError(f"a data task failed: {lines[-1][:300] if lines else type(error).__name__}")
