"""Runs jobs in processes of their own, a few at a time, and tells how far they are."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from pose_core.errors import PoseError

Work = Callable[[Any, Callable[[float], None]], None]
"""Does a job in the process started for it; calls its second argument with the share that is done, in [0, 1]."""

SECONDS_BETWEEN_MESSAGES = 1.0


def run_in_processes(
    work: Work,
    jobs: Mapping[str, Any],
    *,
    parallel: int,
    on_progress: Callable[[dict[str, float]], None],
    on_end: Callable[[str, str | None], None],
) -> None:
    """Do all ``jobs`` (by name), at most ``parallel`` at a time, in new processes; when this returns none is left.

    ``work`` and the jobs must pickle. ``on_progress`` gets the share done of each running job; ``on_end`` a job's name
    and why it failed, or None. An interrupt ends the running jobs.
    """
    waiting, running = deque(jobs.items()), dict[Connection, tuple[str, BaseProcess]]()
    shares: dict[str, float] = {}
    failures: dict[str, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                name, job = waiting.popleft()
                connection, process = _start(work, job)
                running[connection], shares[name] = (name, process), 0.0
            ready = set(wait(list(running)))
            for connection in [each for each in running if each in ready]:
                name, process = running[connection]
                try:
                    message = connection.recv()
                except EOFError:
                    del running[connection], shares[name]
                    on_end(name, _ended(process, failures.get(name)))
                    continue
                if isinstance(message, str):
                    failures[name] = message
                else:
                    shares[name] = message
                    on_progress(dict(shares))
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()


def _start(work: Work, job: Any) -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, job, theirs), daemon=True)
    with _deaf_to_interrupts():
        process.start()
    theirs.close()  # or its end would never be seen here
    return mine, process


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """What is started inside ignores Ctrl-C for good: a terminal sends it to all, and only the parent shall act."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _child(work: Work, job: Any, parent: Connection) -> None:
    last = 0.0

    def advance(share: float) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_MESSAGES:
            last = time.monotonic()
            parent.send(share)

    try:
        work(job, advance)
    except BrokenPipeError:  # the parent is gone, and nobody waits for this
        raise SystemExit(1) from None
    except PoseError as error:
        parent.send(str(error))
    except Exception as error:  # a bug: its place is worth more than its message
        place = traceback.extract_tb(error.__traceback__)[-1]
        parent.send(f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})")


def _ended(process: BaseProcess, failure: str | None) -> str | None:
    process.join()
    if failure is None and process.exitcode:
        return f"its process ended with code {process.exitcode}; was memory short?"
    return failure
