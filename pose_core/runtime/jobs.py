"""The chain of Ray jobs: one job a stage, in order, its log passed on as it comes, its exit code kept.

A stage whose artifact already stands for the settings is skipped; the first that fails ends the chain.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Self

import aiohttp
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from pose_core.errors import ClusterError
from pose_core.runtime.cluster import locate_code
from pose_core.runtime.manifests import STAGES, is_done
from pose_core.runtime.storage import Store
from pose_core.settings import Settings

_STOP_SECONDS = 30.0
_LOST_SECONDS = 30.0
_POLL_SECONDS = 1.0
_UNREACHABLE = (RuntimeError, OSError, RayError, aiohttp.ClientError)
# Begins the line with which a script says why it failed; see cli.run.
_REASON_PREFIX = "error: "


@dataclass(frozen=True)
class Result:
    """How a stage ended."""

    stage: str
    seconds: float
    outcome: Literal["skipped", "done", "failed"]
    exit_code: int = 0


class Chain:
    """Runs the stages of one run as Ray jobs and keeps their results, for the table at the end.

    Args:
        client: of the cluster, from ``cluster.connect()``.
        run: the store at ``runs/<run>``.
        settings: the run's settings as its stages will load them from ``config_url``.
        environment: variables of every job. They can be read on the dashboard: paths and addresses, no secrets.
        log_folder: receives a copy of each job's log, ``<stage>.log``; None leaves it to the cluster.
        on_line: called with each line of a job's log as it comes, without its end.
    """

    def __init__(
        self,
        client: JobSubmissionClient,
        run: Store,
        settings: Settings,
        config_url: str,
        environment: Mapping[str, str],
        *,
        log_folder: Path | None = None,
        on_line: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        self.results: list[Result] = []
        self._client, self._run, self._settings = client, run, settings
        self._config_url, self._environment = config_url, environment
        self._log_folder, self._on_line = log_folder, on_line
        self._code = locate_code(client)

    def run(self, stage: str) -> Result:
        """Run the stage as a job and wait for its end, or skip it.

        On Ctrl-C and SIGTERM the job is stopped first.

        Raises:
            ClusterError: it failed, with its exit code, the reason it gave and the log to read; or the cluster is lost,
                or another job works on this stage of this run.
        """
        if is_done(self._run, STAGES[stage], self._settings):
            return self._keep(Result(stage, 0.0, "skipped"))
        started = time.monotonic()
        try:
            self._run_job(stage)
        except ClusterError as error:
            self._keep(Result(stage, time.monotonic() - started, "failed", error.exit_code))
            raise
        return self._keep(Result(stage, time.monotonic() - started, "done"))

    def _run_job(self, stage: str) -> None:
        run_job(
            self._client,
            f"{self._settings.run.name}-{stage}",
            self._code.command(STAGES[stage].script, "--config", self._config_url),
            self._runtime_env(),
            log_file=None if self._log_folder is None else self._log_folder / f"{stage}.log",
            on_line=self._on_line,
        )
        if not is_done(self._run, STAGES[stage], self._settings):
            raise ClusterError(f"{stage} ended well and left no manifest for these settings in {self._run.url(stage)}")

    def _keep(self, result: Result) -> Result:
        self.results.append(result)
        return result

    def _runtime_env(self) -> dict[str, Any]:
        variables = {**self._code.runtime_env.get("env_vars", {}), **self._environment}
        # Ray's 3 s are short for a driver that must end its workers.
        return {**self._code.runtime_env, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "10", **variables}}


class _Log:
    """Cuts what a job writes into lines for ``on_line``, copies them to a file and remembers why it failed."""

    def __init__(self, path: Path | None, on_line: Callable[[str], None]) -> None:
        self.path, self._on_line = path, on_line
        self.reason, self._rest, self._taken = "", "", 0
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w", buffering=1)
        return self

    def __exit__(self, *_: object) -> None:
        if self._rest:
            self._line(self._rest)
        if self._file is not None:
            self._file.close()

    def write(self, text: str, at: int) -> None:
        """Take ``text``, which begins ``at`` characters into the job's log, as far as it is new."""
        fresh = text[max(0, self._taken - at) :]
        self._taken = max(self._taken, at + len(text))
        *lines, self._rest = (self._rest + fresh).split("\n")
        for line in lines:
            self._line(line)

    def _line(self, line: str) -> None:
        if line.startswith(_REASON_PREFIX):
            self.reason = line.removeprefix(_REASON_PREFIX)
        if self._file is not None:
            self._file.write(f"{line}\n")
        self._on_line(line)


def run_job(
    client: JobSubmissionClient,
    name: str,
    command: str,
    runtime_env: Mapping[str, Any],
    *,
    log_file: Path | None = None,
    on_line: Callable[[str], None],
) -> None:
    """Submit ``command`` as the job ``<name>-<number>`` and pass its log on until it ends; stop it if interrupted.

    Raises:
        ClusterError: with the command's exit code (128 + n for signal n), or 1 if it never ran or was stopped.
    """
    with _sigterm_interrupts(), _Log(log_file, on_line) as log:
        job = _submit(client, name, command, runtime_env)
        try:
            details = asyncio.run(_follow(client, job, log))
        except ClusterError:
            raise
        except BaseException:
            _stop(client, job)
            raise
    if details.status != JobStatus.SUCCEEDED:
        raise _failure(client, job, details, log)


def _submit(client: JobSubmissionClient, name: str, command: str, runtime_env: Mapping[str, Any]) -> str:
    try:
        numbers = {0}
        for other in client.list_jobs():
            stem, _, number = (other.submission_id or "").rpartition("-")
            if stem == name and number.isdigit():
                numbers.add(int(number))
                if not other.status.is_terminal():
                    raise ClusterError(
                        f"job {other.submission_id} already works on this stage of this run; wait for it, end it with "
                        f"`ray job stop {other.submission_id} --address {client.get_address()}`, or set another "
                        "run.name",
                        in_call=True,
                    )
        job = f"{name}-{max(numbers) + 1}"
        return client.submit_job(entrypoint=command, submission_id=job, runtime_env=dict(runtime_env))
    except (*_UNREACHABLE, ValueError) as error:
        raise ClusterError(f"cannot submit {name} to Ray at {client.get_address()}: {_first_line(error)}") from error


async def _follow(client: JobSubmissionClient, job: str, log: _Log) -> JobDetails:
    """Pass the job's log on until it ends."""
    tail = asyncio.create_task(_tail(client, job, log))
    try:
        details = await _end(client, job, tail)
    finally:
        tail.cancel()
    try:
        whole = client.get_job_logs(job)
    except _UNREACHABLE:
        return details
    # Ray's tail would tell us of the end, and of the last lines, five seconds later.
    log.write(whole, 0)
    return details


async def _end(client: JobSubmissionClient, job: str, tail: asyncio.Task[None]) -> JobDetails:
    lost_since = math.inf
    while True:
        try:
            details = client.get_job_info(job)
            lost_since = math.inf
            if details.status.is_terminal():
                return details
        except _UNREACHABLE as error:
            lost_since = min(lost_since, time.monotonic())
            if time.monotonic() - lost_since > _LOST_SECONDS:
                address = client.get_address()
                raise ClusterError(f"lost the Ray cluster at {address} while job {job} ran; run again") from error
        await asyncio.wait([tail], timeout=_POLL_SECONDS)
        if tail.done():
            # Only by an error of whoever takes the lines.
            tail.result()


async def _tail(client: JobSubmissionClient, job: str, log: _Log) -> None:
    """Read the log for ever. A broken connection is made anew; the log then starts over."""
    while True:
        position = 0
        async for text in _chunks(client, job):
            log.write(text, position)
            position += len(text)
        await asyncio.sleep(_POLL_SECONDS)


async def _chunks(client: JobSubmissionClient, job: str) -> AsyncIterator[str]:
    with contextlib.suppress(*_UNREACHABLE):
        async for text in client.tail_job_logs(job):
            yield text


def _stop(client: JobSubmissionClient, job: str) -> None:
    deadline = time.monotonic() + _STOP_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(*_UNREACHABLE):
            if client.get_job_info(job).status.is_terminal():
                return
            client.stop_job(job)
        time.sleep(0.5)
    raise ClusterError(f"job {job} does not stop; try `ray job stop {job} --address {client.get_address()}`")


def _failure(client: JobSubmissionClient, job: str, details: JobDetails, log: _Log) -> ClusterError:
    code = details.driver_exit_code
    where = log.path or f"`ray job logs {job} --address {client.get_address()}`"
    if details.status == JobStatus.STOPPED:
        return ClusterError(f"job {job} was stopped from outside; run again to go on; its log: {where}")
    if code is None:
        return ClusterError(f"job {job} did not run: {_first_line(details.message)}; its log: {where}")
    code = code if code >= 0 else 128 - code
    why = log.reason or "it gave no reason"
    error = ClusterError(f"job {job} failed with exit code {code}: {why}; its log: {where}")
    error.exit_code = code
    return error


def _first_line(message: object) -> str:
    return next(iter(str(message).strip().splitlines()), "")


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """`ray job stop` and schedulers send SIGTERM; the job we started must end with us then, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
