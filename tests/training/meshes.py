"""What each rank does for ``test_meshes.py``: five steps of every case, from a well-conditioned start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from phases import CASES, Phase, build_phase

from pose_core.training import build, parallel
from pose_core.training.optimizers import build_optimizers

STEPS = 5
MESHES = {
    "two shards": (2, []),
    "2 x 2 hybrid": (4, ["training.replicas=2"]),
    "two context ranks": (2, ["training.context_workers=2"]),
    "two parts": (1, ["training.accumulation=2"]),
}
"""Number of ranks and the settings that make the mesh."""
SAME_PENALTY = ["equilibrium.r1_every_clips=1"]
"""Each rank takes every so many-th of its own clips for the penalty: here all of them."""
SMALL_STEPS = ["equilibrium.heads_learning_rate=1e-5"]
"""A weight without gradient (a key's bias, say) moves by its rounding's sign times the learning rate."""


def train(mesh: str, folder: Path) -> dict[str, Any]:
    """What five steps of every case report, averaged over the ranks."""
    ranks, overrides = MESHES.get(mesh, (1, []))
    return {name: train_case(name, folder, f"training.workers={ranks}", *overrides) for name in CASES}


def train_case(name: str, folder: Path, *overrides: str) -> list[dict[str, float]]:
    phase = build_phase(name, folder, *SAME_PENALTY, *SMALL_STEPS, *overrides)
    condition(phase)
    if parallel.ranks() > 1:
        build.shard_networks(
            phase.networks, phase.settings, parallel.build_mesh(phase.settings.training, torch.device("cpu"))
        )
        phase.optimizers = build_optimizers(phase.networks, phase.turns, weight_decay=0.0)
    phase.train(0, STEPS)
    return phase.history


def condition(phase: Phase) -> None:
    """Move the start to where no quantity is the small difference of two that are equal but for rounding.

    At the real start fake and real score are equal, so are adapters that are all zero, and a head's last bias has no
    gradient while its logits are within the hinge's margins: what is left is rounding, which AdamW turns into steps.
    """
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for role in ("generator", "average", "fake_score"):
            if role in phase.networks.roles():
                for key, value in sorted(phase.networks.roles()[role].weights().items()):
                    if ".lora_B." in key:
                        value.add_(0.1 * torch.randn(value.shape, generator=generator))
        if phase.networks.heads is not None:
            for key, value in phase.networks.heads.named_parameters():
                if key.endswith((".3.bias", "logit.bias")):
                    value.add_(2.0)  # real clips are then beyond the margin, generated ones within
                elif key.endswith((".3.weight", "logit.weight")):
                    value.mul_(5)


def shards(_rank: int, folder: Path, _out: Path) -> dict[str, Any]:
    return train("two shards", folder)


def hybrid(_rank: int, folder: Path, _out: Path) -> dict[str, Any]:
    return train("2 x 2 hybrid", folder)


def context(_rank: int, folder: Path, _out: Path) -> dict[str, Any]:
    return train("two context ranks", folder)


WORK = {"two shards": shards, "2 x 2 hybrid": hybrid, "two context ranks": context}
"""What the ranks of a mesh run; by name, as spawned processes import it."""
