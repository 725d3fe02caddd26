"""A checkpoint restores everything bit by bit, fits nothing else and runs nothing that lies in it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from phases import PHASES, build_phase, differing

from pose_core.errors import CheckpointError
from pose_core.training import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


class MakesFolder:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", PHASES)
def test_a_restored_phase_goes_on_bit_by_bit(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    phase, restored = build_phase(name, tiny_folder), build_phase(name, tiny_folder)
    phase.train(0, 2)
    checkpoint.save(tmp_path / "saved", 2, phase.networks, phase.optimizers)
    assert checkpoint.load(tmp_path / "saved", restored.networks, restored.optimizers) == 2
    assert differing(phase.tensors(), restored.tensors()) == []
    phase.train(2, 4)
    restored.train(2, 4)
    assert differing(phase.tensors(), restored.tensors()) == []
    assert restored.history == phase.history[2:]


def test_the_frozen_teacher_is_not_stored(tiny_folder: Path, tmp_path: Path) -> None:
    phase = build_phase("priming", tiny_folder)
    checkpoint.save(tmp_path, 0, phase.networks, phase.optimizers)
    stored = dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    of_teacher = [name for name in stored if name.startswith("networks.fake_score.")]
    assert of_teacher and all(".lora_" in name for name in of_teacher)


@pytest.mark.parametrize(
    ("saved", "asked", "overrides"),
    [
        ("priming", "equilibrium", []),
        ("equilibrium", "priming", []),
        ("priming", "priming", ["priming.fake_lora_rank=3"]),
        ("equilibrium", "equilibrium", ["equilibrium.head_width=32"]),
        ("equilibrium", "equilibrium", ["equilibrium.feature_blocks=[1]"]),
    ],
)
def test_a_checkpoint_of_other_networks_is_refused_and_changes_nothing(
    tiny_folder: Path, tmp_path: Path, saved: str, asked: str, overrides: list[str]
) -> None:
    phase = build_phase(saved, tiny_folder)
    phase.train(0, 1)
    checkpoint.save(tmp_path, 1, phase.networks, phase.optimizers)
    other = build_phase(asked, tiny_folder, *overrides)
    before = other.tensors()
    with pytest.raises(CheckpointError, match="is not a checkpoint of this run") as caught:
        checkpoint.load(tmp_path, other.networks, other.optimizers)
    assert "\n" not in str(caught.value)
    after = other.tensors()
    assert differing(before, {name: after[name] for name in before}) == []


def test_a_missing_or_half_written_checkpoint_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    phase = build_phase("equilibrium", tiny_folder)
    with pytest.raises(CheckpointError, match=str(tmp_path / "nothing")):
        checkpoint.load(tmp_path / "nothing", phase.networks, phase.optimizers)
    checkpoint.save(tmp_path / "half", 1, phase.networks, phase.optimizers)
    (weights,) = (tmp_path / "half").glob("*.distcp")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=str(tmp_path / "half")):
        checkpoint.load(tmp_path / "half", phase.networks, phase.optimizers)


def test_an_index_that_holds_code_does_not_run_it(tiny_folder: Path, tmp_path: Path) -> None:
    phase = build_phase("equilibrium", tiny_folder)
    checkpoint.save(tmp_path, 1, phase.networks, phase.optimizers)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(MakesFolder(tmp_path / "made")))
    with pytest.raises(CheckpointError, match="mkdir"):
        checkpoint.load(tmp_path, phase.networks, phase.optimizers)
    assert not (tmp_path / "made").exists()


def test_an_entry_that_holds_code_does_not_run_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = build_phase("equilibrium", tiny_folder)
    monkeypatch.setattr(dcp, "save", _save_with_step(dcp.save, MakesFolder(tmp_path / "made")))
    checkpoint.save(tmp_path / "saved", 1, phase.networks, phase.optimizers)
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path / "saved", phase.networks, phase.optimizers)
    assert not (tmp_path / "made").exists()


def _save_with_step(save, step: object):
    return lambda state, **where: save(state | {"step": step}, **where)
