"""One of several ranks over gloo on loopback, in a process of its own: for benchmarks, and for tests of training."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist


def run_as_rank(rank: int, world: int, folder: Path, work: Callable[[], None]) -> None:
    """Run ``work()`` as ``rank`` of ``world``, which meet through a file in ``folder``, and end the process.

    What ``work`` raises is raised here, for whoever spawned the process to see.
    """
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        work()
    finally:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # A mesh keeps its groups beyond their end, and with them gloo's threads. One that lets go of a collective's last
    # tensors while the interpreter finalizes aborts the process (PyTorch's pull request 179291), so it never does.
    os._exit(0)
