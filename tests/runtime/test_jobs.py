"""The chain of jobs: logs, exit codes, skipping and stopping."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from pose_core.errors import ClusterError
from pose_core.runtime import cluster, jobs
from pose_core.runtime.cluster import connect
from pose_core.runtime.jobs import Chain, run_job
from pose_core.runtime.local_ray import LocalRay
from pose_core.runtime.manifests import STAGES, is_done, run_prefix
from pose_core.runtime.storage import Store
from pose_core.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0.1)


class FakeClient:
    """A job server that plays the given connections to a job's log: each gives some chunks, then breaks or ends."""

    def __init__(self, connections: list[list[str]], exit_code: int | None = 0, message: str = "") -> None:
        self._connections, self._exit_code, self._message = connections, exit_code, message
        self._whole = "".join(connections[-1])
        self.jobs: list[Any] = []
        self.environment: dict[str, str] = {}

    def get_address(self) -> str:
        return "http://head:8265"

    def list_jobs(self) -> list[Any]:
        return self.jobs

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any]) -> str:
        self.environment = runtime_env.get("env_vars", {})
        self.jobs.append(SimpleNamespace(submission_id=submission_id, status=JobStatus.RUNNING))
        return submission_id

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        if not self._connections:
            await asyncio.sleep(60)
        for chunk in self._connections.pop(0):
            yield chunk
        if self._connections:
            raise RuntimeError("the connection broke")

    def get_job_logs(self, job: str) -> str:
        return self._whole

    def get_job_info(self, job: str) -> SimpleNamespace:
        status = JobStatus.SUCCEEDED if self._exit_code == 0 else JobStatus.FAILED
        status = JobStatus.RUNNING if self._connections else status
        return SimpleNamespace(status=status, driver_exit_code=self._exit_code, message=self._message)


def lines_of(client: Any, command: str = "true", log_file: Path | None = None, **env_vars: str) -> list[str]:
    lines: list[str] = []
    run_job(client, "digits-i2v-export", command, {"env_vars": env_vars}, log_file=log_file, on_line=lines.append)
    return lines


def test_a_log_is_cut_into_lines_and_copied(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "export.log"
    assert lines_of(FakeClient([["one\ntw", "o\n\nthr", "ee"]]), log_file=log) == ["one", "two", "", "three"]
    assert log.read_text() == "one\ntwo\n\nthree\n"


def test_a_broken_connection_neither_loses_nor_repeats_a_line() -> None:
    client = FakeClient([["one\ntw"], ["on"], ["one\n", "two\nthree\n"]])
    assert lines_of(client) == ["one", "two", "three"]


def test_an_error_of_the_display_ends_the_job_and_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[str] = []
    monkeypatch.setattr(jobs, "_stop", lambda client, job: stopped.append(job))

    def closed(line: str) -> None:
        raise BrokenPipeError(line)

    with pytest.raises(BrokenPipeError, match="one"):
        run_job(FakeClient([["one\n"], [""]]), "digits", "true", {}, on_line=closed)  # type: ignore[arg-type]
    assert stopped == ["digits-1"]


def test_a_lost_cluster_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_LOST_SECONDS", 0.05)
    client = FakeClient([[]])
    client.get_job_info = _refuse  # type: ignore[method-assign]
    with pytest.raises(
        ClusterError, match="lost the Ray cluster at http://head:8265 while job digits-i2v-export-1 ran"
    ):
        lines_of(client)


def _refuse(job: str) -> SimpleNamespace:
    raise ConnectionError(job)


@pytest.mark.parametrize(("code", "passed_on"), [(1, 1), (2, 2), (3, 3), (-9, 137)])
def test_a_failure_keeps_its_exit_code_its_reason_and_names_the_log(code: int, passed_on: int) -> None:
    client = FakeClient([["starting\nerror: bucket 'a' does not exist; create it\nbye\n"]], exit_code=code)
    with pytest.raises(ClusterError) as caught:
        lines_of(client)
    assert caught.value.exit_code == passed_on
    assert f"digits-i2v-export-1 failed with exit code {passed_on}: bucket 'a' does not exist; create it" in str(
        caught.value
    )
    assert "`ray job logs digits-i2v-export-1 --address http://head:8265`" in str(caught.value)


def test_a_job_that_could_not_start_says_why() -> None:
    client = FakeClient([[]], exit_code=None, message="Failed to set up runtime environment\nTraceback …")
    with pytest.raises(ClusterError, match="did not run: Failed to set up runtime environment; its log") as caught:
        lines_of(client)
    assert caught.value.exit_code == 1


def test_submission_ids_count_on_from_what_ended() -> None:
    client = FakeClient([["ok\n"]])
    for name in ("digits-i2v-export-4", "digits-i2v-evaluate-9", "digits-i2v-export-old", None):
        client.jobs.append(SimpleNamespace(submission_id=name, status=JobStatus.FAILED))
    lines_of(client)
    assert client.jobs[-1].submission_id == "digits-i2v-export-5"


def test_a_stage_that_is_at_work_is_not_started_twice() -> None:
    client = FakeClient([["ok\n"]])
    client.jobs.append(SimpleNamespace(submission_id="digits-i2v-export-4", status=JobStatus.RUNNING))
    with pytest.raises(ClusterError, match="`ray job stop digits-i2v-export-4 --address http://head:8265`") as caught:
        lines_of(client)
    assert caught.value.exit_code == 2
    assert len(client.jobs) == 1


def test_a_stage_without_manifest_did_not_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "list_nodes", lambda **_: [])
    client = FakeClient([["ok\n"]])
    chain = Chain(client, Store.open(str(tmp_path)), Settings(), "config.yaml", {"POSE_EVENTS": "1"})  # type: ignore[arg-type]
    with pytest.raises(ClusterError, match="prepare_data ended well and left no manifest"):
        chain.run("prepare_data")
    assert client.environment["POSE_EVENTS"] == "1"
    assert [(result.stage, result.outcome) for result in chain.results] == [("prepare_data", "failed")]


# From here on with a real Ray.

STAGE_SCRIPT = """
import os, sys
from pose_core.settings import Settings
from pose_core.runtime.manifests import STAGES, begin, write_manifest
from pose_core.runtime.storage import Store

run, stage = Store.open(os.environ["RUN"]), STAGES[os.path.basename(sys.argv[0]).removesuffix(".py")]
begin(run, stage, Settings())
print("working with", sys.argv[1:], flush=True)
if stage.name == "stability_priming":
    print("error: it is too unstable; lower priming.learning_rate", file=sys.stderr)
    sys.exit(2)
write_manifest(run, stage, Settings(), metrics={}, mlflow_run_id="", seconds=1)
"""

OUTER_SCRIPT = """
from pathlib import Path
from pose_core.runtime import cluster, jobs
cluster._ROOT = Path.cwd().resolve()
client = cluster.connect()
code = cluster.locate_code(client)
command = code.command("inner.py")
jobs.run_job(client, "inner", command, code.runtime_env, on_line=lambda line: print("outer saw:", line))
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobSubmissionClient]:
    with LocalRay(tmp_path_factory.mktemp("ray")):
        yield connect()


def python(program: str) -> str:
    return shlex.join([sys.executable, "-c", program])


@pytest.mark.integration
def test_a_job_runs_with_its_variables_and_its_log_comes_as_it_is_written(client: JobSubmissionClient) -> None:
    arrived: dict[str, float] = {}

    def note_time(line: str) -> None:
        arrived.setdefault(line, time.monotonic())

    program = "import os, time; print(os.environ['A'], flush=True); time.sleep(5); print('end')"
    run_job(client, "tailed", python(program), {"env_vars": {"A": "first"}}, on_line=note_time)
    assert arrived["end"] - arrived["first"] > 1


@pytest.mark.integration
def test_an_exit_code_passes_through_ray(client: JobSubmissionClient, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=f"no clip left; its log: {tmp_path}/a.log") as caught:
        lines_of(client, "echo 'error: no clip left'; exit 3", tmp_path / "a.log")
    assert caught.value.exit_code == 3
    assert "error: no clip left" in (tmp_path / "a.log").read_text().splitlines()


@pytest.mark.integration
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_chain_stops_its_job(client: JobSubmissionClient, sent: signal.Signals) -> None:
    pids: list[int] = []

    def interrupt(line: str) -> None:
        if line.startswith("pid "):
            pids.append(int(line.removeprefix("pid ")))
            os.kill(os.getpid(), sent)

    program = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(600)"
    with pytest.raises(KeyboardInterrupt):
        run_job(client, f"stopped-{sent.name}", python(program), {}, on_line=interrupt)
    assert client.get_job_info(f"stopped-{sent.name}-1").status == JobStatus.STOPPED
    assert not psutil.pid_exists(pids[0])


@pytest.mark.integration
def test_the_chain_goes_on_where_it_stopped(
    client: JobSubmissionClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pipelines").mkdir()
    for name in ("prepare_data", "stability_priming"):
        (tmp_path / STAGES[name].script).write_text(STAGE_SCRIPT)
    monkeypatch.setattr(cluster, "_ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run, lines = Store.open(str(tmp_path)).child(run_prefix(Settings())), list[str]()
    chain = Chain(client, run, Settings(), "s3://b/config.yaml", {"RUN": run.uri}, on_line=lines.append)
    chain.run("prepare_data")
    assert "working with ['--config', 's3://b/config.yaml']" in lines
    assert is_done(run, STAGES["prepare_data"], Settings())
    chain.run("prepare_data")
    with pytest.raises(ClusterError, match=r"it is too unstable; lower priming\.learning_rate") as caught:
        chain.run("stability_priming")
    assert caught.value.exit_code == 2
    outcomes = [(result.stage, result.outcome, result.exit_code) for result in chain.results]
    assert outcomes == [("prepare_data", "done", 0), ("prepare_data", "skipped", 0), ("stability_priming", "failed", 2)]
    assert len([job for job in client.list_jobs() if "prepare_data" in (job.submission_id or "")]) == 1


@pytest.mark.integration
def test_a_job_starts_jobs_that_share_its_uploaded_folder(client: JobSubmissionClient, tmp_path: Path) -> None:
    (tmp_path / "outer.py").write_text(OUTER_SCRIPT)
    (tmp_path / "inner.py").write_text("import os; print('inner in', os.getcwd(), os.environ['SHARED'])")
    environment = {"working_dir": str(tmp_path), "env_vars": {"SHARED": "yes", "PYTHONPATH": str(ROOT)}}
    lines: list[str] = []
    run_job(client, "outer", f"{sys.executable} outer.py", environment, on_line=lines.append)
    said = next(line for line in lines if line.startswith("outer saw: inner in "))
    assert "_ray_pkg_" in said
    assert said.endswith(" yes")
