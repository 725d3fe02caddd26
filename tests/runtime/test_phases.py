"""When a phase whose workers failed too often goes on all the same, and when it ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.train

from pose_core import config
from pose_core.errors import ClusterError, PoseError, StorageGoneError
from pose_core.runtime import phases
from pose_core.runtime.checkpoints import FOLDER, Kept, Saved, last_step
from pose_core.runtime.preemption import PreemptedError
from pose_core.runtime.steady_files import SteadyFiles
from pose_core.runtime.storage import Store

Fit = Callable[[], SimpleNamespace]


def failed(cause: Exception) -> Exception:
    """What Ray Train raises once ``training.max_failures`` restarts have failed."""
    return ray.train.WorkerGroupError("failed", {0: cause})


class Attempts:
    """In the place of a trainer: each time it either makes a checkpoint or not, and then fails or ends."""

    def __init__(self, artifact: Store, *outcomes: tuple[int, Exception | None]):
        self.artifact, self.left = artifact, list(outcomes)

    def fit(self) -> SimpleNamespace:
        step, error = self.left.pop(0)
        if step:
            Kept(SteadyFiles(self.artifact.child(FOLDER), 0), 2).commit(Saved(f"step-{step}", step, step, [], "{}"))
        if error is not None:
            raise failed(error)
        return SimpleNamespace(return_value={"good_step": step})


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, float]]:
    """Runs a phase with these outcomes."""

    def run(*outcomes: tuple[int, Exception | None]) -> dict[str, float]:
        artifact = Store.open(str(tmp_path))
        attempts = Attempts(artifact, *outcomes)
        monkeypatch.setattr(phases, "_trainer", lambda job, fingerprint: attempts)
        monkeypatch.setattr(phases, "_told", lambda error, run, job: phases.plain(error, run.name, [], {}))
        stage = SimpleNamespace(artifact=artifact, settings=config.load(""), fingerprint="f", name="priming")
        stage.display = SimpleNamespace(note=lambda line: None)
        result = phases._fit(None, stage)
        assert attempts.left == [] and last_step(artifact, 0) == result["good_step"]
        return result

    return run


def test_as_long_as_checkpoints_are_made_failures_are_never_too_many(fit: Callable[..., dict[str, float]]) -> None:
    away = PreemptedError("a worker was told to end")
    assert fit((3, away), (5, away), (9, RuntimeError("connection closed")), (12, None)) == {"good_step": 12}


def test_failures_without_a_checkpoint_in_between_end_it(fit: Callable[..., dict[str, float]]) -> None:
    with pytest.raises(ClusterError, match="priming failed more often than training.max_failures allows: no such"):
        fit((4, RuntimeError("no such device")), (0, RuntimeError("no such device")), (9, None))


@pytest.mark.parametrize("final", [PoseError("a setting is wrong"), StorageGoneError("the store stayed away")])
def test_an_error_that_would_only_come_back_ends_it_at_once(
    fit: Callable[..., dict[str, float]], final: PoseError
) -> None:
    with pytest.raises(type(final), match=str(final)):
        fit((4, final), (9, None))
