"""MLflow stores that cannot be used: one line at the start, no exception in mid-run, never a password."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pose_core.errors import ConfigError
from pose_core.runtime.tracking import Tracker, start_parent


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def text_file(tmp_path: Path) -> str:
    (tmp_path / "notes.txt").write_text("not a database, only a note that someone put here\n" * 40)
    return f"sqlite:///{tmp_path}/notes.txt"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda tmp_path: f"http://me:hunter2@127.0.0.1:{closed_port()}", "Connection refused"),
        (lambda tmp_path: f"sqlite:///{tmp_path}", "unable to open database file"),
        (text_file, "not a database"),
        (lambda tmp_path: f"{tmp_path}/mlruns", "sqlite"),
        (lambda tmp_path: "ftp://runs", "ftp"),
    ],
    ids=["no-server", "folder", "text-file", "file-store", "unknown-scheme"],
)
def test_a_store_that_cannot_be_used_is_one_line_at_the_start(
    make: Callable[[Path], str], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="tracking.uri=") as caught:
        start_parent(make(tmp_path), "pose", "digits", {})
    message = str(caught.value)
    assert reason in message
    assert "\n" not in message
    assert "hunter2" not in message
    assert caught.value.exit_code == 2


def test_a_deleted_experiment_is_named(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri, uri)
    start_parent(uri, "short-lived", "digits", {})
    experiment = client.get_experiment_by_name("short-lived")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    with pytest.raises(ConfigError, match="'short-lived' was deleted"):
        start_parent(uri, "short-lived", "digits", {})


def test_nothing_raises_while_the_server_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(f"http://me:hunter2@127.0.0.1:{closed_port()}", "pose", "0" * 32)
    tracker.log_settings({"run": {"name": "digits"}})
    tracker.log_metrics(0, {"loss": 1.0})
    tracker.log_text("hello", "hello.txt")
    tracker.log_file(tmp_path / "missing.mp4", "samples")
    tracker.set_tags({"a": "b"})
    tracker.close("FINISHED")
    assert "Connection refused" in caplog.text
    assert "1 points of MLflow run" in caplog.text
    assert "hunter2" not in caplog.text
