"""Compares methods: which rows a comparison has, how they are trained, and what is written of them.

Clips are prepared once on Ray; then every row is trained in a process of its own with one thread, without Ray: a
laptop's table must not pay for sixty cluster starts, and a CPU second must mean the same in every row. Finished rows
stay under ``.pose/compare/`` and are not made again while their settings hold.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pose_core import config
from pose_core.errors import ConfigError, PoseError
from pose_core.models.folders import find_folder, local_teacher
from pose_core.runtime import manifests, preparing
from pose_core.runtime.compare_clips import has_clips, write_clips
from pose_core.runtime.compare_report import SECTIONS, read_curves, write_results
from pose_core.runtime.compare_row import POSE, REAL, TEACHER, RowJob, run_row
from pose_core.runtime.preflight import check_models
from pose_core.runtime.progress import Display, display
from pose_core.runtime.row_processes import run_in_processes
from pose_core.runtime.session import STATE_FOLDER, open_session
from pose_core.runtime.stage import stage_run
from pose_core.runtime.tracking import Tracker, start_child, start_parent, tracking_uri
from pose_core.settings import Settings
from pose_core.training.local import share_seconds, steps_by_phase

REFERENCES = (REAL, TEACHER)
I2V_ONLY = "pose_no_consistency"
ABLATIONS = ("pose_no_priming", "pose_priming_only", "pose_frozen", I2V_ONLY)
RIVALS = ("dmd2", "apt", "ladd", "lcm")
METHODS = (*REFERENCES, POSE, *ABLATIONS, *RIVALS)
TABLES = {"updates": "equal_updates", "time": "equal_time"}


@dataclass(frozen=True)
class Wanted:
    """What of a comparison is to be made, as typed on the command line."""

    stem: str
    """Name of the config file without its ending; names the results."""
    seeds: int
    only: tuple[str, ...]
    """Rows to train; empty for all. Finished ones of the others are reported too."""
    tables: tuple[str, ...]
    split: str
    parallel: int
    out: Path
    """Folder that receives the results."""


def method_settings(settings: Settings, method: str, seed: int) -> Settings:
    """The comparison's settings with what makes the row ``method``, and ``seed``.

    Every row gets as many generator updates as POSE does in both phases. Rivals with one phase do them all in it.
    """
    total = settings.priming.steps + settings.equilibrium.steps
    rivals = settings.rivals
    distilled = round(total * rivals.consistency_share)
    only_first = [f"priming.steps={total}", "equilibrium.steps=0"]
    only_second = ["priming.steps=0", f"equilibrium.steps={total}"]

    def rival(name: str, conditioning_time: float) -> list[str]:
        return [f"method.name={name}", f"method.conditioning_time={conditioning_time}"]

    changes = {
        "pose_no_priming": only_second,
        "pose_priming_only": only_first,
        "pose_frozen": ["equilibrium.backbone=frozen"],
        I2V_ONLY: ["equilibrium.semantic_head=false", "equilibrium.conditional_sds_weight=0"],
        "dmd2": [*rival("dmd2", rivals.matching_conditioning_time), *only_first],
        "lcm": [*rival("lcm", rivals.consistency_conditioning_time), *only_first],
        "ladd": [*rival("ladd", rivals.adversarial_conditioning_time), *only_second],
        "apt": [
            *rival("apt", rivals.consistency_conditioning_time),
            *(f"priming.steps={distilled}", f"equilibrium.steps={total - distilled}"),
        ],
    }
    return config.load(config.dump(settings), [f"run.seed={seed}", *changes.get(method, [])])


def paced(settings: Settings, seconds: Mapping[str, float], spent: Mapping[str, float]) -> Settings:
    """``settings`` with as many steps as ``seconds`` allow where their own took ``spent``, by phase.

    Seconds end the training; what changes with the share of a phase's steps that are done is to have changed by then.
    """
    steps = {phase: max(1, round(n * seconds[phase] / spent[phase])) for phase, n in steps_by_phase(settings).items()}
    return config.load(config.dump(settings), [f"{phase}.steps={count}" for phase, count in steps.items()])


def choose_methods(task: str, only: tuple[str, ...]) -> tuple[str, ...]:
    """The rows of a comparison in their order, or those of them that ``only`` names.

    Raises:
        ConfigError: a name is not one of them.
    """
    known = tuple(name for name in METHODS if task == "i2v" or name != I2V_ONLY)
    for name in only:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise ConfigError(f"--only {name} is no row of this comparison: {remedy}")
    return tuple(name for name in known if not only or name in only)


@dataclass
class Comparison:
    """A comparison at work; its three calls are to be made in order."""

    settings: Settings
    wanted: Wanted
    data_key: str
    tracker: Tracker
    display: Display
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path(STATE_FOLDER).resolve() / "compare" / self.wanted.stem

    @property
    def seeds(self) -> range:
        return range(self.settings.run.seed, self.settings.run.seed + self.wanted.seeds)

    def prepare_clips(self) -> None:
        """Copy the clips that the real ``prepare_data`` makes to this machine; Ray and the store end with it."""
        if has_clips(self.folder, self.data_key):
            return
        with open_session(self.settings) as session, stage_run("prepare_data", session.settings) as run:
            preparing.prepare_shards(run, preparing.raw_videos(run), _teacher(run.settings))
            write_clips(self.folder, preparing.open_prepared(run), self.data_key)

    def make_rows(self, table: str) -> None:
        """Train, sample and score the rows of ``updates`` or ``time`` that are wanted and not yet there.

        A row that fails does not stop the others. The time table measures by POSE's rows of the other table and makes
        those first where they are missing.
        """
        chosen = choose_methods(self.settings.model.task, self.wanted.only)
        if table == "time":
            self._run([self._job(POSE, "updates", seed) for seed in self.seeds])
        self._run([job for method, seed, job in self._jobs(table) if method in chosen])

    def report(self) -> None:
        """Write and log tables, contact sheet and curves of every finished row, and print the tables.

        Raises:
            PoseError: rows failed; what the others are was written all the same.
        """
        found = {table: self._finished(table) for table in self.wanted.tables}
        rows = [row | {"table": TABLES[table]} for table, results in found.items() for _, row in results]
        if rows:
            first = list({job.name: job for job, _ in found[self.wanted.tables[0]]}.values())
            name = self.wanted.stem + ("" if self.wanted.split == "test" else f"-{self.wanted.split}")
            files = write_results(self.wanted.out, name, self.settings, rows, first)
            for file in files:
                self.tracker.log_file(file, "comparison")
            self.display.note("\n" + files[1].read_text())
            self.display.note(f"wrote {', '.join(str(file) for file in files)}")
        if self.failed:
            names = "; ".join(f"{name}: {reason}" for name, reason in self.failed.items())
            raise PoseError(f"{len(self.failed)} rows failed and the same command tries them again: {names}")

    def _job(self, method: str, table: str, seed: int, seconds: dict[str, float] | None = None) -> RowJob:
        table = "reference" if method in REFERENCES else table
        row = method_settings(self.settings, method, seed)
        if seconds is not None and (spent := self._spent(method, seed)):
            row = paced(row, seconds, spent)
        return RowJob(method, table, row, self.folder, self.wanted.split, self.data_key, seconds)

    def _jobs(self, table: str) -> Iterator[tuple[str, int, RowJob]]:
        """Every row of a table, by method and seed. Real clips know no seed, and POSE's own time is its time."""
        for method in choose_methods(self.settings.model.task, ()):
            for seed in self.seeds[:1] if method == REAL else self.seeds:
                if table == "updates" or method in (*REFERENCES, POSE):
                    yield method, seed, self._job(method, "updates", seed)
                elif spent := self._spent(POSE, seed):
                    row = method_settings(self.settings, method, seed)
                    shares = share_seconds(row, spent, steps_by_phase(self.settings))
                    yield method, seed, self._job(method, "time", seed, shares)

    def _spent(self, method: str, seed: int) -> dict[str, float] | None:
        """CPU seconds by phase of a row with equal updates, once it is there."""
        job = self._job(method, "updates", seed)
        if job.read() is None:
            return None
        return json.loads((job.trained / "training.json").read_text())["cpu_seconds"]

    def _finished(self, table: str) -> list[tuple[RowJob, dict[str, Any]]]:
        jobs = [job for _, _, job in self._jobs(table)]
        return [(job, row) for job in jobs for row in (job.read() or {"rows": []})["rows"]]

    def _run(self, jobs: list[RowJob]) -> None:
        wanted = {job.name: job for job in jobs if job.read() is None and job.name not in self.failed}
        ended: list[str] = []

        def on_progress(shares: dict[str, float]) -> None:
            self.display.update("rows", len(ended), len(wanted), **shares)

        def on_end(name: str, failure: str | None) -> None:
            ended.append(name)
            if failure is None:
                self._tell(wanted[name])
            else:
                self.failed[name] = failure
                self.display.note(f"{name}: failed: {failure}")
            on_progress({})

        run_in_processes(run_row, wanted, parallel=self.wanted.parallel, on_progress=on_progress, on_end=on_end)

    def _tell(self, job: RowJob) -> None:
        """A line for the person, and a child run in MLflow with settings, curves, figures and videos."""
        rows = (job.read() or {"rows": []})["rows"]
        for row in rows:
            shown = {name: value for name, value in row.items() if isinstance(value, float)}
            figures = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            self.display.note(f"{job.name:<30} NFE {row['nfe'] or '-':>3}  {figures}")
        child = start_child(self.tracker, job.name)
        child.log_settings(job.settings.model_dump(mode="json", include=SECTIONS | {"run"}))
        for updates, values in read_curves(job):
            child.log_metrics(updates, values)
        for row in rows:
            numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "nfe"}
            child.log_metrics(0, {f"nfe_{row['nfe'] or 0}/{name}": value for name, value in numbers.items()})
        child.log_file(job.videos, "samples")
        child.close("FINISHED")


@contextmanager
def open_comparison(settings: Settings, wanted: Wanted) -> Iterator[Comparison]:
    """A comparison with its MLflow run, ``compare-<stem>``; finished rows are kept however the block ends.

    Raises:
        ConfigError, CheckpointError: what is asked for does not exist, or teacher or judge do not fit.
    """
    choose_methods(settings.model.task, wanted.only)
    name = "compare-" + re.sub(r"[^a-z0-9._-]", "-", wanted.stem.lower())[:50]
    home = Path(STATE_FOLDER).resolve()
    tracking = tracking_uri(settings.tracking.uri, home)
    settings = config.load(config.dump(settings), [f"run.name={name}"])
    check_models(settings)
    tracker, shown = start_parent(tracking, settings.tracking.experiment, name, {"pose.run": name}), display()
    try:
        with tracker:
            yield Comparison(settings, wanted, data_key(settings), tracker, shown)
    finally:
        shown.close()


def data_key(settings: Settings) -> str:
    """Identity of the clips and of the weights that every row starts from and is judged by, by their content."""
    digest = hashlib.sha256(manifests.fingerprint(manifests.STAGES["prepare_data"], settings).encode())
    judge = settings.evaluation.judge
    for folder in (_teacher(settings), find_folder(judge) if judge else None):
        for file in sorted(folder.rglob("*.safetensors")) if folder else []:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _teacher(settings: Settings) -> Path:
    return local_teacher(settings.model.teacher, settings.model.revision)
