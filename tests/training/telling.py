"""What each rank does for ``test_telemetry.py``; a module of its own, because a new process imports it by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from phases import build_phase, differing

from pose_core.training import collectives
from pose_core.training.telemetry import HostClock, StepTimes

CPU = torch.device("cpu")


def ranks_tell(rank: int, folder: Path, out: Path) -> dict[str, Any]:
    """What two ranks report with and without a record, and their seconds."""
    plain, told = (build_phase("equilibrium", folder, sharded=True) for _ in range(2))
    times = StepTimes(HostClock())
    plain.train(0, 2)
    with collectives.recorded(times.part, CPU):
        told.train(0, 2, record=times.part)
    times.end_step()
    same = plain.history == told.history and not differing(plain.tensors(), told.tensors())
    return {"same": same, "seconds": times.take()[1]}
