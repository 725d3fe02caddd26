"""Ray on this machine: who can reach it, what it gives away, and that it ends with us."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from pose_core.errors import ClusterError
from pose_core.runtime.cluster import capacity, connect, on_this_machine
from pose_core.runtime.cores import share
from pose_core.runtime.jobs import run_job
from pose_core.runtime.local_ray import LocalRay

ROOT = Path(__file__).parents[2]
SECRET = "b5d0c7e1-never-shown"

OWNER = """
import sys
from pathlib import Path
from pose_core.runtime.cluster import connect
from pose_core.runtime.jobs import run_job
from pose_core.runtime.local_ray import LocalRay

with LocalRay(Path(sys.argv[1])):
    run_job(connect(), "sleeper", "echo ready; sleep 600", {}, on_line=lambda line: print(line, flush=True))
"""

STRANGER = """
import ray
from pose_core.errors import ClusterError
from pose_core.runtime.cluster import connect

try:
    connect()
except ClusterError as error:
    print(error)
ray.init()
"""


def test_a_ray_that_cannot_start_names_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ClusterError, match=f"ended with code 1 .* {tmp_path}/ray_start.log"), LocalRay(tmp_path):
        pass
    assert "RAY_ADDRESS" not in os.environ


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match=f"{tmp_path}/file"), LocalRay(tmp_path / "file" / "ray"):
        pass


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRay]:
    folder = tmp_path_factory.mktemp("ray")
    (folder / "ray_token").write_text("readable by all")
    # Other tests of this process leave its resource tracker behind.
    others = set(psutil.Process().children(recursive=True))
    with LocalRay(folder, {"AWS_SECRET_ACCESS_KEY": SECRET}) as head:
        yield head
        family = set(psutil.Process().children(recursive=True)) - others
    assert [process for process in family if process.is_running()] == []
    assert "RAY_ADDRESS" not in os.environ


def token_file(head: LocalRay) -> Path:
    return Path(head.environment["RAY_AUTH_TOKEN_PATH"])


def command_line(process: psutil.Process) -> list[str]:
    """The words of its command; none for a process that has ended meanwhile."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def printed(name: str, program: str) -> list[str]:
    """The lines that a Python program prints as a job."""
    lines: list[str] = []
    run_job(connect(), name, shlex.join([sys.executable, "-c", program]), {}, on_line=lines.append)
    return lines


def temporary_folder(family: list[psutil.Process]) -> Path:
    words = [word for process in family for word in command_line(process)]
    return next(Path(word.removeprefix("--temp-dir=")) for word in words if word.startswith("--temp-dir="))


@pytest.mark.integration
def test_the_token_is_new_and_for_its_owners_eyes_only(head: LocalRay) -> None:
    assert stat.S_IMODE(token_file(head).stat().st_mode) == 0o600
    assert len(token_file(head).read_text()) == 64
    assert token_file(head).read_text() not in str(head.environment)


@pytest.mark.integration
def test_nobody_without_the_token_gets_in(head: LocalRay, tmp_path: Path) -> None:
    url = f"{head.dashboard_url}/api/jobs/"
    assert requests.get(url, timeout=10).status_code == 401
    assert requests.get(url, headers={"Authorization": "Bearer guess"}, timeout=10).status_code == 403
    (tmp_path / "token").write_text("0" * 64)
    ours = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STRANGER]
    answer = subprocess.run(command, env=os.environ | head.environment | ours, capture_output=True, text=True)
    assert "refuses the token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in answer.stdout
    assert "InvalidAuthToken" in answer.stderr


@pytest.mark.integration
def test_it_listens_on_loopback_only(head: LocalRay) -> None:
    family = psutil.Process().children(recursive=True)
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in family
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


@pytest.mark.integration
def test_nothing_waits_for_clients_that_never_come(head: LocalRay) -> None:
    commands = [" ".join(command_line(process)) for process in psutil.Process().children(recursive=True)]
    assert any("gcs_server" in command for command in commands)
    assert not any("ray.util.client.server" in command for command in commands)
    heads = {command.split("-")[2] for command in commands if command.startswith("ray-dashboard-")}
    assert heads == {"JobHead", "NodeHead", "StateHead"}


@pytest.mark.integration
def test_it_is_this_machine_and_never_grows(head: LocalRay) -> None:
    client = connect()
    assert client.get_address() == head.dashboard_url
    assert on_this_machine(client)
    found = capacity(client)
    assert (found.cpus, found.autoscales) == (os.cpu_count(), False)


@pytest.mark.integration
def test_workers_get_the_secrets_and_nothing_shows_them(head: LocalRay) -> None:
    program = (
        "import os, ray; ray.init(); "
        "print('worker has', ray.get(ray.remote(lambda: len(os.environ['AWS_SECRET_ACCESS_KEY'])).remote()))"
    )
    lines = printed("secret", program)
    assert f"worker has {len(SECRET)}" in lines
    family = psutil.Process().children(recursive=True)
    commands = [" ".join(command_line(process)) for process in family]
    assert any("gcs_server" in command for command in commands)
    logs = [file for file in (temporary_folder(family) / "session_latest" / "logs").rglob("*") if file.is_file()]
    assert len(logs) > 5
    token = token_file(head).read_text()
    for text in [*commands, *(log.read_text(errors="replace") for log in logs)]:
        assert SECRET not in text
        assert token not in text


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has batch work")
@pytest.mark.parametrize("leaves_cores_free", [False, True])
def test_ray_interrupts_no_worker_that_trains(head: LocalRay, leaves_cores_free: bool) -> None:
    """Ray is batch work; a rank with all its threads is none, no less important, on own cores if it needs them."""
    cores = sorted(os.sched_getaffinity(0))
    own = cores if leaves_cores_free else share(cores, 1, 2)
    threads = 0 if leaves_cores_free else len(own)
    program = (
        "import os, threading, ray; from pose_core.runtime.cores import take_cores\n"
        "def policies():\n"
        "    threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "    before, own = os.sched_getscheduler(0), os.listdir('/proc/self/task')\n"
        f"    take_cores(1, 2, {threads})\n"
        "    after = {(os.sched_getscheduler(int(each)), *os.sched_getaffinity(int(each))) for each in own}\n"
        "    return before, after, os.getpriority(os.PRIO_PROCESS, 0)\n"
        "ray.init(); print('policies', *ray.get(ray.remote(policies).remote()))"
    )
    lines = printed("policies", program)
    after = {(os.SCHED_OTHER, *own)}
    assert f"policies {os.SCHED_BATCH} {after} {os.getpriority(os.PRIO_PROCESS, 0)}" in lines


def test_ranks_share_all_cores_and_none_twice() -> None:
    for count in range(1, 9):
        cores = list(range(10, 10 + count))
        for ranks in range(1, count + 1):
            parts = [share(cores, rank, ranks) for rank in range(ranks)]
            assert sorted(core for part in parts for core in part) == cores
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert share([3, 4], 2, 3) == [3, 4]


@pytest.mark.integration
def test_no_worker_is_kept_that_has_nothing_to_do(head: LocalRay) -> None:
    program = (
        "import os, psutil, time, ray; ray.init()\n"
        "raylet, until = psutil.Process(ray.get(ray.remote(lambda: os.getppid()).remote())), time.monotonic() + 60\n"
        "def idle(): return sum('ray::IDLE' in ''.join(each.cmdline()) for each in raylet.children())\n"
        "print('after a task', idle() > 0)\n"
        "while idle() and time.monotonic() < until: time.sleep(0.5)\n"
        "print('later', idle() > 0)"
    )
    lines = printed("idle", program)
    assert "after a task True" in lines and "later False" in lines


@pytest.mark.integration
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_one_that_started_it(tmp_path: Path, sent: signal.Signals) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert "ready\n" in iter(owner.stdout.readline, "")
        family = psutil.Process(owner.pid).children(recursive=True)
        assert any("sleep" in process.name() for process in family)
        temp = temporary_folder(family)
        owner.send_signal(sent)
        owner.wait(60)
        _, alive = psutil.wait_procs(family, timeout=30)
        assert alive == []
        # A killed process cannot remove it any more.
        assert temp.exists() == (sent == signal.SIGKILL)
        shutil.rmtree(temp.parent, ignore_errors=True)
