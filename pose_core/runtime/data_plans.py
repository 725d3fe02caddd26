"""What every Ray Data plan of this project has in common: quiet, in order, and with errors a person can read."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from pose_core.errors import ClusterError, PoseError


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
    source = ray.data.from_items([{"item": json.dumps(item)} for item in items], override_num_blocks=len(items))
    try:
        for row in source.map_batches(function, batch_size=1, **how).iter_rows():
            yield json.loads(row["result"])
    except RayError as error:
        raise plain(error) from error


def plain(error: BaseException) -> PoseError:
    """The error of ours that a task meant; else one line about what became of it."""
    link: BaseException | None = error
    while link is not None:
        cause = getattr(link, "cause", None)
        for each in (link, cause):
            if isinstance(each, PoseError) and not isinstance(each, RayError):
                return each
        link = cause if isinstance(cause, BaseException) else link.__cause__ or link.__context__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ClusterError(f"a data task failed: {lines[-1][:300] if lines else type(error).__name__}")
