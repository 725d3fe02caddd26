"""A Ray cluster of one machine, started for as long as a command runs.

Inside ``with LocalRay(…):`` a process is in the same position as one whose user had set ``RAY_ADDRESS``.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import psutil
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from pose_core.errors import ClusterError
from pose_core.runtime.cluster import FIXED_SIZE_LABEL, connect

_TOKEN = "RAY_AUTH_TOKEN"
# Meant for other systems, and the only switch that makes Ray take 127.0.0.1 for its own address and listen only there.
_LOOPBACK = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}
_CLIENT_SETTINGS = {
    # Ray Train asks every two seconds, in an actor of its own, whether somebody drains the only node there is.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Ray Data would ask Prometheus every ten seconds until its process ends, and start an actor, for what it tells.
    "RAY_USAGE_STATS_ENABLED": "0",
}
_HEAD_SETTINGS = {
    "RAY_enable_metrics_collection": "0",
    # Otherwise a fixed port, over which two clusters would quarrel.
    "DASHBOARD_METRIC_PORT": "0",
    # Tasks without a GPU keep the CUDA_VISIBLE_DEVICES they find; Ray warns in every process until one chooses.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Else Ray waits up to 30 s for work that we want to end.
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    # Ray looks ten times a second after what a dashboard of many nodes needs; here training shares its cores.
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",  # from so many files on the next holds
    "LOG_NAME_UPDATE_INTERVAL_S": "2",
    "EVENT_AGENT_REPORT_INTERVAL_SECONDS": "1",
    "SCAN_EVENT_DIR_INTERVAL_SECONDS": "30",
    "REPORTER_UPDATE_INTERVAL_MS": "30000",
    "NODE_STATS_UPDATE_INTERVAL_SECONDS": "60",
    "METRICS_RECORD_INTERVAL_S": "3600",
    # The raylet looks as often at the disk and for memory to free, and five times a second for workers to end.
    "RAY_local_fs_monitor_interval_ms": "5000",
    "RAY_raylet_check_gc_period_milliseconds": "1000",
    "RAY_kill_idle_workers_interval_ms": "1000",
    # Every process tells once a second what its tasks do, for lists of tasks that nobody asks for here.
    "RAY_task_events_report_interval_ms": "0",
    # Ray Train trains in a thread, and glibc gives each a heap; with one heap for all a step took 0.90 to 1.02 of that.
    "MALLOC_ARENA_MAX": "1",
    # Ray keeps a worker a core that has nothing to do; these end soon after their last task.
    "RAY_num_workers_soft_limit": "0",
    "RAY_idle_worker_killing_time_threshold_ms": "10000",
    # Ray's own choice, 15, lets in ahead of training whatever else wakes up; `nice` before a command is for all of it.
    "RAY_worker_niceness": "0",
}
_STOP_SECONDS = 20.0

# ``ray start`` with some things before it. The kernel sends it SIGTERM when the process that started it dies, however.
# And all that Ray starts is batch work, which no wake-up lets in ahead of others: each of its processes wakes a hundred
# times a second, and ten of them interrupt training a thousand times. Workers that train take themselves out of it.
# And no server for ``ray://``: only where gRPC is missing does Ray leave it out. Of the nine processes behind the
# dashboard, each of which wakes up as well, only the one for jobs, the one that tells it which node is the head, and
# the one that ``list_nodes`` asks.
_LAUNCHER = """
import contextlib, ctypes, os, signal, sys
parent = int(sys.argv.pop(1))
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit("the starting process is gone")
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
from ray._private import ray_constants, services
from ray.scripts import scripts
start_ray_process = services.start_ray_process
def start(command, process_type, **how):
    if process_type == ray_constants.PROCESS_TYPE_DASHBOARD:
        command = [*command, "--modules-to-load=JobHead,NodeHead,StateHead"]
    return start_ray_process(command, process_type, **how)
services.start_ray_process = start
scripts.get_ray_client_dependency_error = lambda: "not wanted"
scripts.main()
"""


class LocalRay:
    """A Ray head on loopback, behind a token, that lives as long as its ``with`` block.

    Inside the block this process is its client: ``connect()`` finds it. ``environment`` makes another process one. At
    the end, after an exception or Ctrl-C too, its processes are ended by their ids. Should this process be killed, the
    kernel tells the head, which ends the rest (on Linux, and if the thread that entered the block lives as long as the
    process); then only a temporary folder stays behind.

    Args:
        folder: receives ``ray_token`` (for its owner's eyes only), ``ray_start.log`` and, after an error, ``ray_logs``.
        environment: variables that every Ray process, and so every worker, inherits. They may hold secrets: none is
            put on a command line or in a log.
        start_seconds: how long Ray may take to answer.

    Raises:
        ClusterError: Ray did not start; the message names the log.
    """

    dashboard_url: str
    """``http://127.0.0.1:PORT``, where jobs are submitted."""
    gcs_address: str
    """``127.0.0.1:PORT``, for ``ray.init`` in a process that has ``environment``."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None, *, start_seconds: float = 120):
        self._folder = folder.absolute()
        self._extra = dict(environment or {})
        self._deadline_seconds = start_seconds
        self._cleanup = contextlib.ExitStack()

    @property
    def environment(self) -> dict[str, str]:
        """What a client process of this cluster needs: its addresses and the path of the token, no secret."""
        return {"RAY_API_SERVER_ADDRESS": self.dashboard_url, "RAY_ADDRESS": self.gcs_address, **self._access}

    @property
    def _access(self) -> dict[str, str]:
        outer = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
        no_proxy = ",".join(dict.fromkeys(filter(None, (*outer.split(","), "127.0.0.1"))))
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self._folder / "ray_token")}
        return token | _LOOPBACK | _CLIENT_SETTINGS | {"no_proxy": no_proxy, "NO_PROXY": no_proxy}

    def __enter__(self) -> Self:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _write_token(self._folder / "ray_token")
            self._enter()
        except OSError as error:
            where = error.filename or self._folder
            raise ClusterError(f"Ray cannot start: {error.strerror or error} at {where}; free or permit it") from error
        return self

    def __exit__(self, *details: Any) -> None:
        self._cleanup.__exit__(*details)

    def _enter(self) -> None:
        with contextlib.ExitStack() as stack:
            # In /tmp, because the path of a Unix socket ends after 107 bytes; a folder in it, because Ray opens its own
            # folder to every user.
            temp = Path(tempfile.mkdtemp(prefix="pose-ray-", dir="/tmp")) / "ray"
            stack.callback(shutil.rmtree, temp.parent, ignore_errors=True)
            stack.enter_context(self._logs_kept_on_error(temp / "session_latest" / "logs"))
            process = self._start(temp)
            stack.callback(_stop, process)
            deadline = time.monotonic() + self._deadline_seconds
            self._wait(process, (temp / "ray_current_cluster").exists, deadline)
            self.gcs_address = (temp / "ray_current_cluster").read_text().strip()
            stack.enter_context(_client_environment(self.environment))
            self._wait(process, lambda: connect().list_jobs() is not None, deadline)
            # From here on it is __exit__ that undoes everything.
            self._cleanup = stack.pop_all()

    def _start(self, temp: Path) -> subprocess.Popen[bytes]:
        dashboard_port = _free_port()
        self.dashboard_url = f"http://127.0.0.1:{dashboard_port}"
        elsewhere = {"RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", _TOKEN}
        inherited = {name: value for name, value in os.environ.items() if name not in elsewhere}
        with (self._folder / "ray_start.log").open("wb") as log:
            return subprocess.Popen(
                [
                    *(sys.executable, "-Pc", _LAUNCHER, str(os.getpid()), "start", "--head", "--block", "--no-monitor"),
                    *("--node-ip-address=127.0.0.1", "--port=0"),
                    *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"),
                    *("--dashboard-agent-listen-port=0", f"--temp-dir={temp}", f"--labels={FIXED_SIZE_LABEL}=true"),
                ],
                env=inherited | self._extra | _HEAD_SETTINGS | self._access,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C at the terminal must reach us, and Ray only through us.
                start_new_session=True,
            )

    def _wait(self, process: subprocess.Popen[bytes], ready: Callable[[], bool], deadline: float) -> None:
        while True:
            with contextlib.suppress(ClusterError, RuntimeError, OSError):
                if ready():
                    return
            if process.poll() is not None or time.monotonic() > deadline:
                what = "does not answer" if process.returncode is None else f"ended with code {process.returncode}"
                raise ClusterError(f"Ray {what} on this machine; the reason is in {self._folder}/ray_start.log")
            time.sleep(0.2)

    @contextlib.contextmanager
    def _logs_kept_on_error(self, logs: Path) -> Iterator[None]:
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                shutil.rmtree(self._folder / "ray_logs", ignore_errors=True)
                shutil.copytree(logs, self._folder / "ray_logs")
            raise


def _write_token(path: Path) -> None:
    """Keep a token that nobody else could read, for another run that uses this folder now; else make a new one."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_IMODE(path.stat().st_mode) == 0o600 and path.stat().st_size:
            return
        path.unlink()
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _stop(process: subprocess.Popen[bytes]) -> None:
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        # Listed while the head lives: later nothing links them to it. Jobs have sessions of their own.
        family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=_STOP_SECONDS / 2)
    for survivor in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            survivor.kill()
    psutil.wait_procs(alive, timeout=_STOP_SECONDS / 2)


@contextlib.contextmanager
def _client_environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.pop(_TOKEN, None)
    os.environ.update(variables)
    _reread_environment()
    try:
        yield
    finally:
        for name in {*variables, _TOKEN}:
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]
        _reread_environment()


def _reread_environment() -> None:
    # Ray reads these variables once, when it is imported.
    loopback = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool(loopback, not ray_constants.IS_WINDOWS_OR_OSX)
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
