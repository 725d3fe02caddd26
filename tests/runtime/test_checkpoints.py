"""Of a phase's checkpoints only whole ones count, the newest and the good ones stay, a store may be away a while."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest
from phases import Phase, build_phase, differing

from pose_core.errors import StorageGoneError
from pose_core.runtime import local_files
from pose_core.runtime.checkpoints import PhaseCheckpoints, Saved
from pose_core.runtime.storage import Store

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def save(kept: PhaseCheckpoints, phase: Phase, step: int, *, good: bool = True) -> None:
    kept.save(
        step,
        phase.networks,
        phase.optimizers,
        good_step=step if good else 0,
        armed=["motion"],
        position=f"[{step}]",
        before_commit=lambda: None,
    )


def steps(folder: Path) -> list[int]:
    """Steps of the folders below ``checkpoints``."""
    return sorted(int(path.name.split("-")[1]) for path in (folder / "checkpoints").iterdir() if any(path.iterdir()))


def opened(folder: Path, keep: int = 2, retry_seconds: float = 0.0) -> PhaseCheckpoints:
    return PhaseCheckpoints(Store.open(str(folder)), keep, retry_seconds)


@pytest.fixture
def phase(tiny_folder: Path) -> Phase:
    return build_phase("priming", tiny_folder)


def test_another_attempt_finds_the_newest_with_all_that_it_stands_for(
    phase: Phase, tiny_folder: Path, tmp_path: Path
) -> None:
    first = opened(tmp_path)
    assert first.newest() is None and first.newest_good() is None
    for step in (1, 2):
        phase.train(step - 1, step)
        save(first, phase, step)
    first.wait()
    second, restored = opened(tmp_path), build_phase("priming", tiny_folder)
    found = second.newest()
    assert isinstance(found, Saved)
    assert (found.step, found.good_step, found.armed, found.position) == (2, 2, ["motion"], "[2]")
    assert second.load(found, restored.networks, restored.optimizers) == 2
    assert differing(phase.tensors(), restored.tensors()) == []


@pytest.mark.parametrize(
    ("good", "left", "best"),
    [
        ([True, True, True, True], [3, 4], 4),
        ([True, True, False, False], [1, 2, 4], 2),
        ([True, False, False, False], [1, 4], 1),
        ([False, False, False, False], [3, 4], 0),
    ],
)
def test_the_newest_and_the_newest_good_ones_stay(
    phase: Phase, tmp_path: Path, good: list[bool], left: list[int], best: int
) -> None:
    kept = opened(tmp_path)
    for step, each in enumerate(good, start=1):
        save(kept, phase, step, good=each)
    newest, newest_good = kept.newest(), kept.newest_good()
    assert newest is not None and newest.step == 4
    assert (newest_good.step if newest_good else 0) == best
    assert steps(tmp_path) == left


def test_what_was_not_committed_or_lost_an_object_is_never_read_and_is_removed(phase: Phase, tmp_path: Path) -> None:
    kept = opened(tmp_path, keep=5)
    for step in (1, 2, 3, 4, 5):
        save(kept, phase, step)
    kept.wait()
    folders = sorted((tmp_path / "checkpoints").iterdir())
    (folders[4] / "manifest.json").unlink()
    (folders[3] / "manifest.json").write_text("{")
    (folders[2] / "rank-00000/00000").unlink()
    weights = folders[1] / "rank-00000/00000"
    weights.write_bytes(weights.read_bytes()[:-1])
    again = opened(tmp_path, keep=5)
    newest = again.newest()
    assert newest is not None and newest.step == 1
    assert steps(tmp_path) == [1]


def test_a_manifest_names_every_object_and_comes_last(
    phase: Phase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = local_files.write_whole
    monkeypatch.setattr(
        "pose_core.runtime.storage.write_whole", lambda path, data: (written.append(path.name), write(path, data))
    )
    kept = opened(tmp_path)
    save(kept, phase, 1)
    kept.wait()
    assert written[-2:] == ["index.json", "manifest.json"] and len(written) > 2
    (folder,) = (tmp_path / "checkpoints").iterdir()
    found = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    del found["manifest.json"]
    assert json.loads((folder / "manifest.json").read_text())["objects"] == found


def test_two_attempts_at_the_same_step_do_not_meet(phase: Phase, tmp_path: Path) -> None:
    one, other = opened(tmp_path, keep=5), opened(tmp_path, keep=5)
    save(one, phase, 1)
    save(other, phase, 1)
    one.wait()
    other.wait()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def full_disk(path: Path, data: bytes) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_full_disk_is_waited_for_and_then_said_in_one_line(
    phase: Phase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, kept = local_files.write_whole, opened(tmp_path, retry_seconds=30.0)
    save(kept, phase, 1)
    kept.wait()
    monkeypatch.setattr("pose_core.runtime.storage.write_whole", full_disk)
    save(kept, phase, 2)
    freed = threading.Timer(0.5, monkeypatch.setattr, ("pose_core.runtime.storage.write_whole", write))
    freed.start()
    kept.wait()
    assert steps(tmp_path) == [1, 2]
    hasty = opened(tmp_path, retry_seconds=0.2)
    monkeypatch.setattr("pose_core.runtime.storage.write_whole", full_disk)
    save(hasty, phase, 3)
    with pytest.raises(StorageGoneError, match="no space left on the disk of .*; gave up after 0.2 s") as caught:
        hasty.wait()
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1
    newest = opened(tmp_path).newest()
    assert newest is not None and newest.step == 2
