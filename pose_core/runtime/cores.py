"""How a rank that trains on a CPU shares the cores with Ray and with its neighbours; see docs/recovery.md."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress


def take_cores(rank: int, ranks: int, threads: int) -> None:
    """Let this process train undisturbed, as ``rank`` of ``ranks`` on this machine, each computing in ``threads``.

    On the Ray that a command starts, whose processes are batch work, it leaves that and, where the ranks leave no core
    free, keeps to cores of its own; elsewhere the machine may be busy with what is not ours, and nothing changes.
    """
    if sys.platform != "linux" or os.sched_getscheduler(0) != os.SCHED_BATCH:
        return
    cores = sorted(os.sched_getaffinity(0))
    own = share(cores, rank, ranks)
    if len(own) > threads:
        # The kernel chooses better among cores that are free, and not all of a laptop's are as fast.
        own = cores
    for thread in map(int, os.listdir("/proc/self/task")):
        with suppress(OSError):  # the thread has ended, or a container forbids it
            os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
            os.sched_setaffinity(thread, own)


def share(cores: Sequence[int], rank: int, ranks: int) -> Sequence[int]:
    """The part of ``cores`` that is for ``rank`` alone; all of them where there are fewer than ranks."""
    if ranks > len(cores):
        return cores
    return cores[rank::ranks]
