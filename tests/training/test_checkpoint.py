"""A checkpoint restores everything bit by bit, fits nothing else and runs nothing that lies in it."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from phases import CASES, build_phase, differing, files, load, save
from torch.distributed.checkpoint import default_planner

from pose_core.errors import CheckpointError, StorageGoneError
from pose_core.training import checkpoint, checkpoint_files

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


class MakesFolder:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


class Memory:
    """The objects of a checkpoint, in memory."""

    uri = "memory"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def write(self, key: str, data: bytes | memoryview) -> None:
        self.objects[key] = bytes(data)

    def read(self, key: str, start: int = 0, stop: int = sys.maxsize) -> bytearray:
        return bytearray(self.objects[key][start:stop])


@pytest.mark.parametrize("name", CASES)
def test_a_restored_phase_goes_on_bit_by_bit(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    phase, restored = build_phase(name, tiny_folder), build_phase(name, tiny_folder)
    phase.train(0, 2)
    save(tmp_path / "saved", 2, phase)
    assert load(tmp_path / "saved", restored) == 2
    assert differing(phase.tensors(), restored.tensors()) == []
    phase.train(2, 4)
    restored.train(2, 4)
    assert differing(phase.tensors(), restored.tensors()) == []
    assert restored.history == phase.history[2:]


def test_the_frozen_teacher_is_not_stored(tiny_folder: Path, tmp_path: Path) -> None:
    phase = build_phase("priming", tiny_folder)
    save(tmp_path, 0, phase)
    stored = checkpoint_files.Reader(files(tmp_path)).read_metadata().state_dict_metadata
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
    save(tmp_path, 1, phase)
    other = build_phase(asked, tiny_folder, *overrides)
    before = other.tensors()
    with pytest.raises(CheckpointError, match="is not a checkpoint of this run") as caught:
        load(tmp_path, other)
    assert "\n" not in str(caught.value)
    after = other.tensors()
    assert differing(before, {name: after[name] for name in before}) == []


def test_what_is_missing_cut_or_damaged_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    phase = build_phase("equilibrium", tiny_folder)
    with pytest.raises(CheckpointError, match=f"{tmp_path}/nothing is not a checkpoint of this run: .*does not exist"):
        load(tmp_path / "nothing", phase)
    save(tmp_path / "spoilt", 1, phase)
    weights = tmp_path / "spoilt/rank-00000/00000"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(CheckpointError, match="rank-00000/00000 is damaged where"):
        load(tmp_path / "spoilt", phase)
    weights.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    with pytest.raises(CheckpointError, match="rank-00000/00000 is damaged where"):
        load(tmp_path / "spoilt", phase)
    weights.write_bytes(whole)
    assert load(tmp_path / "spoilt", phase) == 1


def test_an_index_is_json_and_holds_nothing_that_runs(tiny_folder: Path, tmp_path: Path) -> None:
    phase = build_phase("equilibrium", tiny_folder)
    save(tmp_path, 1, phase)
    assert json.loads((tmp_path / "index.json").read_bytes())["format"] == 1
    (tmp_path / "index.json").write_bytes(pickle.dumps(MakesFolder(tmp_path / "made")))
    with pytest.raises(CheckpointError):
        load(tmp_path, phase)
    assert not (tmp_path / "made").exists()


def test_an_entry_that_holds_code_does_not_run_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = build_phase("equilibrium", tiny_folder)
    write = dcp.save
    made = MakesFolder(tmp_path / "made")
    monkeypatch.setattr(dcp, "save", lambda state, **where: write({"flat": state["flat"] | {"step": made}}, **where))
    save(tmp_path / "saved", 1, phase)
    with pytest.raises(CheckpointError, match="WeightsUnpickler|weights_only"):
        load(tmp_path / "saved", phase)
    assert not (tmp_path / "made").exists()


class Held(Memory):
    """Takes objects in only once it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def write(self, key: str, data: bytes | memoryview) -> None:
        assert self.go_on.wait(60)
        super().write(key, data)


def test_training_goes_on_while_a_checkpoint_of_the_step_before_is_written(tiny_folder: Path) -> None:
    """The second, into the buffers of the first, as well."""
    phase, restored, saver = (
        build_phase("priming", tiny_folder),
        build_phase("priming", tiny_folder),
        checkpoint.Saver(),
    )
    phase.train(0, 1)
    for step in (1, 2):
        before, committed, held = phase.tensors(), [], Held()
        saver.start(held, step, phase.networks, phase.optimizers, committed.append)
        phase.train(step, step + 1)
        assert not held.objects and not committed
        held.go_on.set()
        saver.wait()
        assert committed == [{key: len(data) for key, data in held.objects.items()}]
        assert checkpoint.load(held, restored.networks, restored.optimizers) == step
        assert differing(before, restored.tensors()) == []
        assert differing(before, phase.tensors()) != []


def test_a_save_that_fails_in_the_background_comes_out_of_the_next_one(tiny_folder: Path) -> None:
    phase, saver, committed = build_phase("priming", tiny_folder), checkpoint.Saver(), []

    class Away(Memory):
        def write(self, key: str, data: bytes | memoryview) -> None:
            raise StorageGoneError("the store is gone")

    saver.start(Away(), 1, phase.networks, phase.optimizers, committed.append)
    with pytest.raises(StorageGoneError, match="the store is gone"):
        saver.start(Memory(), 2, phase.networks, phase.optimizers, committed.append)
    assert committed == []
    saver.start(Memory(), 3, phase.networks, phase.optimizers, committed.append)
    saver.wait()
    assert len(committed) == 1


def test_each_save_of_a_saver_holds_the_state_of_its_own_step(tiny_folder: Path) -> None:
    phase, saver = build_phase("priming", tiny_folder), checkpoint.Saver()
    for step in (1, 2, 3):
        restored, files = build_phase("priming", tiny_folder), Memory()
        phase.train(step - 1, step)
        saver.start(files, step, phase.networks, phase.optimizers, lambda objects: None)
        saver.wait()
        assert checkpoint.load(files, restored.networks, restored.optimizers) == step
        assert differing(phase.tensors(), restored.tensors()) == []


def test_what_lies_where_is_worked_out_again_only_for_other_tensors(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, plan = [], default_planner.create_default_local_save_plan
    monkeypatch.setattr(
        default_planner, "create_default_local_save_plan", lambda *own: planned.append(own) or plan(*own)
    )
    saver, phases = checkpoint.Saver(), [build_phase(name, tiny_folder) for name in ("priming", "equilibrium")]
    for phase, plans in zip([phases[0], phases[0], phases[1], phases[1], phases[0]], [1, 1, 2, 2, 3], strict=True):
        files = Memory()
        phase.train(0, 1)
        saver.start(files, 1, phase.networks, phase.optimizers, lambda objects: None)
        saver.wait()
        assert len(planned) == plans
        before = phase.tensors()
        phase.train(1, 2)
        checkpoint.load(files, phase.networks, phase.optimizers)
        assert differing(before, phase.tensors()) == []


def test_no_byte_is_written_to_a_disk(tiny_folder: Path) -> None:
    """As on a machine whose disks are all full: the kernel lets this process write to no file."""
    phase, files, committed, saver = build_phase("priming", tiny_folder), Memory(), [], checkpoint.Saver()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        saver.start(files, 1, phase.networks, phase.optimizers, committed.append)
        saver.wait()
        step = checkpoint.load(files, phase.networks, phase.optimizers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert step == 1 and committed


def test_pieces_share_objects_up_to_a_size_and_ranges_are_read(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_files, "OBJECT_BYTES", 10_000)
    phase, restored, files = build_phase("priming", tiny_folder), build_phase("priming", tiny_folder), Memory()
    phase.train(0, 1)
    saver = checkpoint.Saver()
    saver.start(files, 1, phase.networks, phase.optimizers, lambda objects: None)
    saver.wait()
    largest = max(value.numel() * value.element_size() for value in phase.tensors().values())
    sizes = [len(data) for key, data in files.objects.items() if key.startswith("rank-")]
    assert len(sizes) > 3 and max(sizes) <= max(10_000, largest)
    checkpoint.load(files, restored.networks, restored.optimizers)
    assert differing(phase.tensors(), restored.tensors()) == []
