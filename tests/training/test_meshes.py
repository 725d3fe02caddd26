"""Five steps of every turn report the same losses and gradient norms however ranks are arranged (gloo, float32)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from meshes import MESHES, STEPS, WORK, train
from phases import CASES
from spawned import run_ranks

from pose_core import config
from pose_core.errors import ConfigError
from pose_core.models import small
from pose_core.training import parallel


@pytest.fixture(scope="module")
def two_heads(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny folder with two attention heads: a context group splits them."""
    folder = tmp_path_factory.mktemp("two_heads") / "wan"
    shutil.copytree(tiny_folder, folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        small.build_transformer(heads=2, layers=2, channels=8, text_width=32).save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="module")
def alone(two_heads: Path) -> dict[str, Any]:
    return train("alone", two_heads)


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_and_gradient_norms_are_those_of_one_process(
    mesh: str, alone: dict[str, Any], two_heads: Path, tmp_path: Path
) -> None:
    ranks = MESHES[mesh][0]
    found = run_ranks(WORK[mesh], two_heads, tmp_path, ranks) if ranks > 1 else [train(mesh, two_heads)]
    for name in CASES:
        histories = [each[name] for each in found]
        assert all(history == histories[0] for history in histories)
        assert len(histories[0]) == len(alone[name]) == STEPS
        for step, (many, one) in enumerate(zip(histories[0], alone[name], strict=True), start=1):
            assert many.keys() == one.keys()
            for curve in one:
                if curve.endswith(("/loss", "/gradient_norm")):
                    assert many[curve] == pytest.approx(one[curve], rel=tolerance(name)), (mesh, name, step, curve)


def tolerance(name: str) -> float:
    """Muon makes its steps in bfloat16, where sums in another order are a thousandth apart, not a millionth."""
    return 1e-3 if name.endswith("muon") else 1e-5


def test_ranks_that_do_not_fill_the_mesh_are_refused() -> None:
    settings = config.load("", ["training.workers=2", "training.replicas=2"]).training
    with pytest.raises(ConfigError, match="1 workers cannot be 2 replicas of groups of 1"):
        parallel.build_mesh(settings, torch.device("cpu"))
