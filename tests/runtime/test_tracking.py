"""MLflow on SQLite: what a person finds there after a run, a resumed run and an outage."""

from __future__ import annotations

import logging
import math
import os
import pickle
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from mlflow.artifacts import download_artifacts
from mlflow.tracking import MlflowClient

from pose_core.errors import StorageError
from pose_core.runtime.tracking import Tracker, register_model, start_child, start_parent, tracking_uri, view_command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tracking folder")


@pytest.fixture(scope="module")
def uri(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return MlflowClient(uri, uri)


@pytest.fixture
def parent(uri: str, request: pytest.FixtureRequest) -> Tracker:
    return start_parent(uri, request.node.name, "digits", {"pose.version": "1"})


def curve(client: MlflowClient, tracker: Tracker, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(tracker.run_id, name)]


def test_the_configured_store_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri("", tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example:5000")
    assert tracking_uri("", tmp_path) == "http://tracking.example:5000"
    assert tracking_uri("sqlite:////data/runs.db", tmp_path) == "sqlite:////data/runs.db"


def test_a_relative_database_is_the_same_file_for_jobs_in_other_folders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking_uri("sqlite:///runs.db", Path("unused")) == f"sqlite:///{tmp_path}/runs.db"


def test_the_view_command_shows_no_password() -> None:
    assert view_command("sqlite:////data/runs.db").endswith(
        'ui --workers 1 --backend-store-uri "sqlite:////data/runs.db"'
    )
    assert view_command("http://me:hunter2@server:5000") == "python -m webbrowser http://***@server:5000"
    assert "hunter2" not in view_command("postgresql://me:hunter2@db/runs")


def test_stages_are_nested_in_the_run(client: MlflowClient, parent: Tracker) -> None:
    stages = ["stability_priming", "adversarial_equilibrium"]
    for stage in stages:
        start_child(parent, stage).close("FINISHED")
    experiment = client.get_run(parent.run_id).info.experiment_id
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent.run_id}'")
    assert sorted(child.info.run_name for child in children) == sorted(stages)
    assert {child.info.status for child in children} == {"FINISHED"}
    assert client.get_run(parent.run_id).info.run_name == "digits"
    assert client.get_run(parent.run_id).data.tags["pose.version"] == "1"


def test_every_point_of_a_curve_arrives_in_order(client: MlflowClient, parent: Tracker) -> None:
    for step in range(700):
        parent.log_metrics(step, {"loss": 1 / (step + 1), "gradient_norm": float(step)})
    parent.flush()
    assert curve(client, parent, "loss") == [(step, 1 / (step + 1)) for step in range(700)]
    assert curve(client, parent, "gradient_norm") == [(step, float(step)) for step in range(700)]


def test_values_that_are_not_finite_are_counted_and_leave_the_curve_readable(
    client: MlflowClient, parent: Tracker
) -> None:
    parent.log_metrics(1, {"loss": 0.5, "r1": math.nan})
    parent.log_metrics(2, {"loss": math.inf, "r1": -math.inf})
    parent.log_metrics(3, {"loss": 0.25, "r1": 2.0})
    parent.flush()
    assert curve(client, parent, "loss") == [(1, 0.5), (3, 0.25)]
    assert curve(client, parent, "r1") == [(3, 2.0)]
    assert curve(client, parent, "nonfinite") == [(1, 1.0), (2, 3.0)]


def test_closing_sends_what_is_queued_and_ends_the_run(client: MlflowClient, parent: Tracker) -> None:
    parent.log_metrics(0, {"loss": 3.0})
    parent.close("FAILED")
    assert curve(client, parent, "loss") == [(0, 3.0)]
    run = client.get_run(parent.run_id).info
    assert run.status == "FAILED"
    assert run.end_time is not None


def test_a_resubmitted_run_goes_on_in_the_same_parent(client: MlflowClient, parent: Tracker) -> None:
    parent.close("FAILED")
    again = start_parent(parent.uri, parent.experiment, "digits", {})
    other = start_parent(parent.uri, parent.experiment, "digits-2", {})
    assert again.run_id == parent.run_id
    assert client.get_run(parent.run_id).info.status == "RUNNING"
    assert other.run_id != parent.run_id


def test_a_retried_stage_goes_on_in_the_child_it_did_not_finish(parent: Tracker) -> None:
    first = start_child(parent, "stability_priming")
    first.close("KILLED")
    assert start_child(parent, "evaluate").run_id != first.run_id
    second = start_child(parent, "stability_priming")
    assert second.run_id == first.run_id
    second.close("FINISHED")
    assert start_child(parent, "stability_priming").run_id != first.run_id


def test_a_worker_that_receives_the_tracker_logs_to_the_same_run(client: MlflowClient, parent: Tracker) -> None:
    parent.log_metrics(0, {"loss": 1.0})
    worker: Tracker = pickle.loads(pickle.dumps(parent))
    worker.log_metrics(1, {"loss": 2.0})
    worker.flush()
    parent.flush()
    assert curve(client, parent, "loss") == [(0, 1.0), (1, 2.0)]


def test_settings_are_dotted_and_may_be_logged_again(client: MlflowClient, parent: Tracker) -> None:
    settings: dict[str, Any] = {"priming": {"steps": 150, "blocks": (1, 3)}, "prompt": "p" * 10_000}
    settings |= {f"extra_{index}": index for index in range(120)}
    parent.log_settings(settings)
    parent.log_settings(settings)
    run = client.get_run(parent.run_id).data
    assert run.params["priming.steps"] == "150"
    assert run.params["priming.blocks"] == "(1, 3)"
    assert run.params["extra_119"] == "119"
    assert set(run.params["prompt"]) == {"p"}
    assert not [tag for tag in run.tags if tag.startswith("changed.")]


def test_a_setting_changed_on_resume_is_seen(client: MlflowClient, parent: Tracker) -> None:
    parent.log_settings({"priming": {"steps": 150}})
    parent.log_settings({"priming": {"steps": 300, "guidance": 2.0}})
    run = client.get_run(parent.run_id).data
    assert run.params == {"priming.steps": "150", "priming.guidance": "2.0"}
    assert run.tags["changed.priming.steps"] == "300"


def test_passwords_in_settings_are_masked(client: MlflowClient, parent: Tracker) -> None:
    parent.log_settings({"tracking": {"uri": "postgresql://me:hunter2@db/runs"}})
    assert client.get_run(parent.run_id).data.params["tracking.uri"] == "postgresql://***@db/runs"


def test_files_lie_beside_the_database(client: MlflowClient, parent: Tracker, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"video")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "summary.json").write_text("{}")
    parent.log_file(tmp_path / "clip.mp4", "samples")
    parent.log_folder(tmp_path / "report", "report")
    parent.log_text("all is well", "notes/log.txt")
    logged = folder / "mlartifacts" / parent.run_id / "artifacts"
    assert (logged / "samples" / "clip.mp4").read_bytes() == b"video"
    assert (logged / "report" / "summary.json").read_text() == "{}"
    assert (logged / "notes" / "log.txt").read_text() == "all is well"


def exported(parent: Tracker, tmp_path: Path, content: str) -> Tracker:
    (tmp_path / "model_index.json").write_text(content)
    child = start_child(parent, "export")
    child.log_folder(tmp_path, "model")
    child.close("FINISHED")
    return child


def test_the_alias_leads_to_the_newest_registered_folder(
    parent: Tracker, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = exported(parent, tmp_path, "first"), exported(parent, tmp_path, "second")
    assert register_model(uri, first.run_id, "model", "pose-digits", "one-step") == 1
    assert register_model(uri, first.run_id, "model", "pose-digits", "one-step") == 1
    assert register_model(uri, second.run_id, "model", "pose-digits", "one-step") == 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # aliases are looked up there, whatever the arguments say
    location = download_artifacts("models:/pose-digits@one-step")
    assert (Path(location) / "model_index.json").read_text() == "second"


def test_a_run_without_the_folder_cannot_be_registered(parent: Tracker, uri: str, client: MlflowClient) -> None:
    with pytest.raises(StorageError, match=r"holds no artifact 'model'"):
        register_model(uri, parent.run_id, "model", "pose-empty", "one-step")
    assert not client.search_registered_models("name = 'pose-empty'")


@pytest.mark.parametrize(("name", "alias"), [("a/b", "one-step"), ("pose-alias", "latest")])
def test_a_name_mlflow_does_not_allow_can_be_corrected_in_the_call(
    parent: Tracker, uri: str, tmp_path: Path, name: str, alias: str
) -> None:
    child = exported(parent, tmp_path, "model")
    with pytest.raises(StorageError, match=f"export.registered_model={name}.*export.alias={alias}") as caught:
        register_model(uri, child.run_id, "model", name, alias)
    assert caught.value.exit_code == 2


def test_an_outage_is_one_warning_and_no_lost_point(
    folder: Path, client: MlflowClient, parent: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    worker: Tracker = pickle.loads(pickle.dumps(parent))
    (folder / "mlflow.db").rename(folder / "away.db")
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            worker.log_metrics(step, {"loss": float(step)})
            worker.flush()
    (folder / "away.db").rename(folder / "mlflow.db")
    worker.log_metrics(3, {"loss": 3.0})
    worker.flush()
    assert curve(client, parent, "loss") == [(step, float(step)) for step in range(4)]
    assert len(caplog.records) == 1
    assert "mlflow.db" in caplog.text


def test_metrics_of_a_run_deleted_in_the_browser_do_not_pile_up(
    client: MlflowClient, parent: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    client.delete_run(parent.run_id)
    parent.log_metrics(0, {"loss": 1.0})
    parent.close("FINISHED")
    assert "points of MLflow run" not in caplog.text
    assert "active" in caplog.text


@pytest.mark.integration
def test_mlflow_says_nothing_and_leaves_nothing_in_the_working_folder(tmp_path: Path) -> None:
    script = (
        "from pose_core.runtime.tracking import *\n"
        f"parent = start_parent('sqlite:///{tmp_path}/store/mlflow.db', 'pose', 'digits', {{}})\n"
        "child = start_child(parent, 'export')\n"
        "child.log_metrics(0, {'loss': 1.0})\n"
        "child.log_text('x', 'model/x.txt')\n"
        "child.close('FINISHED')\n"
        "register_model(child.uri, child.run_id, 'model', 'pose-digits', 'one-step')\n"
        "parent.close('FINISHED')\n"
    )
    (tmp_path / "work").mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "work", env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize(
    ("raised", "status"),
    [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")],
)
def test_a_run_ends_as_its_block_ends(
    raised: type[BaseException] | None, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, closed = object.__new__(Tracker), []
    monkeypatch.setattr(tracker, "close", closed.append)
    with pytest.raises(raised) if raised else nullcontext(), tracker:
        if raised:
            raise raised
    assert closed == [status]
