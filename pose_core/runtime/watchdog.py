"""Ends an attempt whose step takes far too long, or that waits for other ranks for ever, with the stacks of all ranks.

Every rank is watched by a thread of its own. The first to notice rings a bell; the others hear it, and each tells what
its threads do before it ends its process: a rank that waits within a collective cannot be woken. Ray Train then starts
the workers again from the last checkpoint.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import sys
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, Self

import ray

from pose_core.settings import Settings

EXIT_CODE = 75
"""Of a rank that was ended: sysexits.h's for what may work when it is tried again."""
KNOWN_STEPS, REMEMBERED_STEPS = 3, 25
"""Steps of a bucket before its median counts, and those that it is taken over."""
STDERR = 2
LOOK_SECONDS, LISTEN_SECONDS, GATHER_SECONDS = 1.0, 5.0, 20.0
"""Between two looks at the clock; between two at the bell, of a rank that is busy for so long; and how long the stacks
of the other ranks are waited for."""


@dataclass(frozen=True)
class Limits:
    """Seconds that a step and everything else may take.

    factor        of the median step of the same bucket
    least         that any step may take
    pause         that anything else may take, and steps in which ranks wait for that of others: the first of a bucket,
                  and one behind samples, alarms or a checkpoint
    """

    factor: float
    least: float
    pause: float

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """What the settings allow; ranks may wait within a step for one that still tries to read its data."""
        training, retry = settings.training, settings.storage.retry_seconds
        return cls(
            training.slow_step_factor, training.slow_step_seconds + retry, training.longest_pause_seconds + retry
        )

    def step(self, seconds: list[float]) -> float:
        """For the next step of a bucket whose last ones took so long."""
        if len(seconds) < KNOWN_STEPS:
            return self.pause
        return min(max(self.least, self.factor * statistics.median(seconds)), self.pause)


class Bell(Protocol):
    """What all ranks of a phase hear: the phase's board."""

    def ring(self, reason: str, stacks: str) -> None:
        """Say why this rank ends and what its threads do."""
        ...

    def rung(self) -> int:
        """How often it was rung in this phase, in all attempts."""
        ...


class Watchdog:
    """Watches the process it is made in until it is closed; use it as a context.

    Tell it when a step begins and ends, and with ``excuse`` that ranks do not do alike what follows on a step, such as
    writing samples: the next one, in which some wait for others, is given more time. A factor of 0 watches nothing.
    """

    def __init__(
        self,
        limits: Limits,
        bell: Bell,
        rank: int,
        ranks: int,
        *,
        listen_seconds: float = LISTEN_SECONDS,
        end: Callable[[int], None] = os._exit,
    ):
        self.limits, self.bell, self.rank, self.ranks = limits, bell, rank, ranks
        self._listen_seconds, self._end_process = listen_seconds, end
        self._seconds: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED_STEPS))
        self._bucket, self._excused = "", True
        self._doing = "what comes before the first step", time.monotonic(), limits.pause
        self._closed = threading.Event()
        self._before = 0
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self.limits.factor:
            self._before = self.bell.rung()
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        if self.limits.factor:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def begin_step(self, step: int, bucket: str) -> None:
        """Step number ``step`` has its batch, with clips of this bucket."""
        limit = self.limits.pause if self._excused else self.limits.step(list(self._seconds[bucket]))
        self._bucket, self._doing = bucket, (f"step {step}", time.monotonic(), limit)

    def end_step(self) -> None:
        """It has ended."""
        step, since, _ = self._doing
        if not self._excused:
            self._seconds[self._bucket].append(time.monotonic() - since)
        self._excused = False
        self._doing = f"what follows {step}", time.monotonic(), self.limits.pause

    def excuse(self) -> None:
        """The next step may take longer."""
        self._excused = True

    def _watch(self) -> None:
        heard = time.monotonic()
        while not self._closed.wait(LOOK_SECONDS):
            # Python's own timer needs no interpreter: it tells of a process whose threads cannot run at all.
            faulthandler.dump_traceback_later(self.limits.pause, exit=True, file=STDERR)
            doing, since, limit = self._doing
            now = time.monotonic()
            if now - since > limit:
                return self._end(f"{doing} has taken more than {limit:.0f} s")
            if now - since > self._listen_seconds < now - heard:
                heard = now
                with suppress(ray.exceptions.RayError):
                    if self.bell.rung() > self._before:
                        return self._end(f"it is at {doing} since {now - since:.0f} s")

    def _end(self, reason: str) -> None:
        stacks = f"rank {self.rank} of {self.ranks}, process {os.getpid()}: {reason}\n{stacks_of_all_threads()}"
        print(stacks, file=sys.stderr, flush=True)
        with suppress(ray.exceptions.RayError):
            self.bell.ring(f"rank {self.rank}: {reason}", stacks)
            give_up = time.monotonic() + GATHER_SECONDS
            while self.bell.rung() < self._before + self.ranks and time.monotonic() < give_up:
                time.sleep(0.2)
        self._end_process(EXIT_CODE)


def stacks_of_all_threads() -> str:
    """What every thread of this process but the calling one does, the main one first."""
    frames, own = sys._current_frames(), threading.get_ident()
    threads = sorted(threading.enumerate(), key=lambda each: each is not threading.main_thread())
    found = []
    for thread in threads:
        if thread.ident in frames and thread.ident != own:
            stack = "".join(traceback.format_stack(frames[thread.ident]))
            found.append(f"thread {thread.name}:\n{stack}")
    return "\n".join(found)
