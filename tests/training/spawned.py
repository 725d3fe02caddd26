"""Ranks over gloo on loopback, each in a process of its own; shared by the tests of training."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from loopback import run_as_rank

RANKS = 2
LIMIT_SECONDS = 480
Work = Callable[[int, Path, Path], dict[str, Any]]


def run_ranks(work: Work, folder: Path, out: Path, world: int = RANKS) -> list[dict[str, Any]]:
    """Run ``work(rank, folder, out)`` on every rank, wait for all of them and return what each found, by rank."""
    context = mp.spawn(_rank, (work, folder, out, world), nprocs=world, join=False)
    assert context is not None
    give_up = time.monotonic() + LIMIT_SECONDS
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < give_up, f"the ranks did not end in {LIMIT_SECONDS} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


def _rank(rank: int, work: Work, folder: Path, out: Path, world: int) -> None:
    run_as_rank(rank, world, out, lambda: torch.save(work(rank, folder, out), out / f"rank{rank}.pt"))
