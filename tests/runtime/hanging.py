"""What the ranks of ``test_watchdog.py`` do; a module of its own, because a new process imports it by name."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist

from pose_core.runtime.watchdog import Limits, Watchdog


class FileBell:
    """A bell that processes share through a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def ring(self, reason: str, stacks: str) -> None:
        (self.folder / reason.split(":")[0]).write_text(f"{reason}\n{stacks}")

    def rung(self) -> int:
        return len(list(self.folder.glob("rank*")))


def hang(rank: int, folder: str) -> None:
    """Rank 1 never comes to the fifth collective, in which rank 0 waits for it."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    # Rank 0 would never notice by itself.
    limits = Limits(factor=3, least=1.0 if rank else 600.0, pause=600.0)
    with Watchdog(limits, FileBell(Path(folder)), rank, 2, listen_seconds=0.5) as dog:
        for step in range(1, 6):
            dog.begin_step(step, "")
            if rank == 1 and step == 5:
                time.sleep(600)
            dist.all_reduce(torch.ones(1))
            dog.end_step()
