"""Stages that run in processes of their own, on one store and one Ray: what they print and what they leave."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil

from pose_core.runtime.local_ray import LocalRay
from pose_core.runtime.object_store import EmbeddedStore
from pose_core.runtime.storage import Store

MARK = "STARTED_BY_TEST_IN"
Settings = tuple[str, ...]
"""As typed on the command line."""


@dataclass
class Ground:
    """One store and one Ray for all runs of this file, and what marks the processes that belong to it."""

    folder: Path
    environment: dict[str, str]
    store: Store
    script: Callable[..., list[str]]
    steps: int
    settings: Settings

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls, folder: Path, environment: dict[str, str], script: Callable[..., list[str]], steps: int, settings: Settings
    ) -> Iterator[Self]:
        """Inside, the store and the Ray are there, their processes marked; both end with the block."""
        marked = {MARK: str(folder)}
        with EmbeddedStore(folder / "store") as store, LocalRay(folder / "ray", store.environment | marked) as cluster:
            own = environment | store.environment | cluster.environment | marked
            yield cls(folder, own, Store.open(store.uri), script, steps, settings)

    def run(self, name: str, stage: str, *settings: str) -> Attempt:
        """Start a stage of the run ``name``."""
        command = self.script(stage, *self.settings, f"run.name={name}", f"storage.uri={self.store.uri}", *settings)
        pipe = subprocess.PIPE
        return Attempt(
            self,
            stage,
            subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
            ),
        )

    def copy(self, name: str, stages: tuple[str, ...]) -> None:
        """Give the run ``name`` the artifacts of the undisturbed run's ``stages``."""
        runs = self.store.child("runs")
        for stage in stages:
            for key in runs.list(f"undisturbed/{stage}"):
                runs.write_bytes(f"{name}{key.removeprefix('undisturbed')}", runs.read_bytes(key))

    def workers(self) -> list[psutil.Process]:
        """The train workers, by age; those of other programs are none of ours."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = process.environ().get(MARK, "").startswith(str(self.folder))
                if ours and "ray::RayTrainWorker" in "".join(process.cmdline()[:1]):
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def state(self, name: str, phase: str) -> dict[str, bytes]:
        """Every byte of a finished phase: its generator, and both networks and optimisers in its last checkpoint."""
        artifact = self.store.child(f"runs/{name}/{phase}")
        last = max(key for key in artifact.list("checkpoints") if key.endswith("/manifest.json")).rpartition("/")[0]
        assert last.split("-")[1] == f"{self.steps:07d}"
        keys = [*artifact.list("generator"), *(key for key in artifact.list(last) if not key.endswith("manifest.json"))]
        assert len(keys) >= 4
        return {key.removeprefix(last): artifact.read_bytes(key) for key in keys}


@dataclass
class Attempt:
    """A stage that runs: what it has printed, and how it ends."""

    ground: Ground
    stage: str
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def until(self, step: int) -> int:
        """Read on until a step of at least ``step`` has been said; that step, or 0 if it ended before."""
        for line in self._read():
            words = line.split()
            if words[:1] == [self.stage] and "/" in words[1] and int(words[1].split("/")[0]) >= step:
                return int(words[1].split("/")[0])
        return 0

    def until_told(self, text: str) -> str:
        """Read on until a line with ``text`` in it; that line, or an empty one if it ended before."""
        return next((line for line in self._read() if text in line), "")

    def end(self) -> list[str]:
        """Read on to the end, which must be a good one; all lines."""
        for _ in self._read():
            pass
        assert self.process.wait(120) == 0, "\n".join(self.lines)
        return self.lines

    def _read(self) -> Iterator[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            yield self.lines[-1]

    def resumed_at(self) -> list[int]:
        """The steps that it said it went on from."""
        return [int(line.split()[-1]) for line in self.lines if "goes on from step" in line]
