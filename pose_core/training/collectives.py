"""Where ranks wait for each other: the collectives of a step, wrapped as they are called."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from pose_core.training.telemetry import Record

# On the CPU FSDP2 calls its collectives and waits in the call. On a GPU a call only puts them into streams of their
# own; computing waits where the results are asked for.
_CALLS: dict[str, list[tuple[Any, str]]] = {
    "cpu": [
        (dist, "all_gather_single"),
        (dist, "reduce_scatter_single"),
        (dist, "all_reduce"),
        (functional, "wait_tensor"),
    ],
    "cuda": [
        (FSDPParamGroup, "wait_for_unshard"),
        (FSDPParamGroup, "finalize_backward"),
        (dist, "all_reduce"),
        (functional, "wait_tensor"),
    ],
}


@contextmanager
def recorded(record: Record, device: torch.device) -> Iterator[None]:
    """Inside, waiting for other ranks is recorded as ``communication``, in whatever thread it happens."""
    with ExitStack() as stack:
        for owner, name in _CALLS[device.type]:
            stack.enter_context(mock.patch.object(owner, name, _wrapped(getattr(owner, name), record)))
        yield


def _wrapped(call: Callable[..., Any], record: Record) -> Callable[..., Any]:
    @functools.wraps(call)
    def waiting(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # what is traced into a compiled block is a part of it
            return call(*args, **kwargs)
        with record("communication"):
            return call(*args, **kwargs)

    return waiting
