"""Notice that a train worker is about to be taken away: SIGTERM, or its node being drained.

Cloud agents, Kubernetes and schedulers send SIGTERM some seconds before they take a machine back. A worker that gets
it goes on to the end of its step, all ranks store a checkpoint together, and the attempt ends; one that does not
come that far in ``training.preemption_grace_seconds`` ends all the same. Of a node that Ray itself drains, Ray Train
tells all workers: they store a checkpoint and go on until Ray Train restarts them elsewhere.
"""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.execution.context import get_train_context

from pose_core.errors import ClusterError

NONE, DRAINED, TERMINATED = 0, 1, 2
"""Levels of notice, the more urgent the higher."""
_EXIT_CODE = 128 + signal.SIGTERM
_terminated = threading.Event()


class PreemptedError(ClusterError):
    """A worker was told to end, and everything up to here is stored."""


def level() -> int:
    """The most urgent notice that this worker has got so far."""
    if _terminated.is_set():
        return TERMINATED
    # The public question is one to all workers, which costs a round trip each step; this is what it asks for.
    return DRAINED if get_train_context().preemption_context.preemption_info is not None else NONE


def listen(grace_seconds: float) -> None:
    """Take SIGTERM for a notice from here on; called in the worker's main thread, which alone may do that."""

    def on_notice(*_: Any) -> None:
        if not _terminated.is_set():
            _terminated.set()
            end = threading.Timer(grace_seconds, os._exit, (_EXIT_CODE,))
            end.daemon = True
            end.start()

    _terminated.clear()
    signal.signal(signal.SIGTERM, on_notice)


class _ListeningBackend(_TorchBackend):
    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(listen, backend_config.grace_seconds)


@dataclass
class ListeningTorchConfig(TorchConfig):
    """Ray Train's process group, in workers that take SIGTERM for a notice."""

    grace_seconds: float = 30.0

    @property
    def backend_cls(self) -> type[_ListeningBackend]:
        """What sets the workers up."""
        return _ListeningBackend
