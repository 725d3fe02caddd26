"""What Ray Train, data, tracking and checkpoints cost a training step, and how soon a killed worker is made good.

Two sides train the demo's first phase on two ranks each, and take turns on the same machine, the other one stopped by
SIGSTOP meanwhile:

    bare         two processes in a plain loop over batches in memory; Ray and the store are stopped, too
    whole        Ray Train with data, MLflow and an asynchronous checkpoint to object storage every 100 steps

A turn of ``bare`` counts as the time of 50 steps in a row; one of ``whole`` as that of 50 steps in which a checkpoint
is made, and of 50 beside them in which none is. ``step_ratio`` is ``whole``'s steps with a checkpoint over the mean of
the bare turns before and behind it, ``checkpoint_overhead`` over its own steps without: both the median. Two processes
that do the same differ by up to 2 % for as long as they live, so both sides are started anew every few turns.
``recovery_seconds`` is from the SIGKILL of one of two workers to the next step that is finished.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.multiprocessing as mp
from figures import Figure, record, show

from pose_core import config
from pose_core.errors import PoseError
from pose_core.models.video_model import Condition
from pose_core.runtime.datasets import TRAINED_ON, Prepared
from pose_core.runtime.object_store import EmbeddedStore
from pose_core.runtime.storage import Store
from pose_core.runtime.teachers import teacher_folder
from pose_core.training import build, loop, parallel
from pose_core.training.state import Batch

PROJECT = Path(__file__).resolve().parents[1]
MARK = "STARTED_BY_BENCHMARK_IN"
COUNTED_STEPS, CHECKPOINT_STEPS, RANKS = 50, 100, 2
ROUNDS_A_START = 2
LOG_STEPS = 2
"""As the demo: the time of every second step is known, from MLflow."""
CHECKPOINT_WITHIN = range(4, 31)
"""Steps that pass before a checkpoint begins, of the ``COUNTED_STEPS`` that hold it."""
STAGE, ENDLESS = "stability_priming", 1_000_000
SETTINGS = [
    *(f"priming.steps={ENDLESS}", f"training.sample_every_steps={ENDLESS}", "training.sample_clips=1"),
    *("alarms.every_steps=0", f"tracking.log_every_steps={LOG_STEPS}", f"training.workers={RANKS}"),
    *("data.digits_clips=256", "data.digits_heldout_clips=16"),
]
Times = dict[int, float]
"""When a step was finished, in Unix seconds."""


@dataclass
class Side:
    """One of those that take turns: its processes, and where it tells of its steps."""

    name: str
    folder: Path
    process: subprocess.Popen[Any]
    turns: list[float] = field(default_factory=list)
    """Seconds that ``COUNTED_STEPS`` took in each turn, with a checkpoint where there are any."""
    without: list[float] = field(default_factory=list)
    """The same without one."""

    def steps(self) -> Times:
        """All that it has finished so far."""
        file = self.folder / "steps"
        if file.exists():
            return {number: float(line) for number, line in enumerate(file.read_text().splitlines(), start=1)}
        return mlflow_steps(self.folder)

    def seconds(self, since: float) -> list[float]:
        """What ``COUNTED_STEPS`` have taken from ``since`` on; as long as there were not so many, nothing.

        With checkpoints: as many steps with one, then as many without.
        """
        times = {step: at for step, at in self.steps().items() if at > since}
        # The first two points may be of steps that were under way when it was stopped.
        for first in sorted(times)[2:]:
            ends = [first, first + COUNTED_STEPS, first + 2 * COUNTED_STEPS][: 2 if self.name == "bare" else 3]
            if ends[-1] not in times:
                return []
            parts = [times[end] - times[start] for start, end in itertools.pairwise(ends)]
            if self.name == "bare":
                return parts
            # The checkpoint begins and ends well within one part.
            ahead = -first % CHECKPOINT_STEPS
            if ahead % COUNTED_STEPS in CHECKPOINT_WITHIN:
                return parts if ahead < COUNTED_STEPS else parts[::-1]
        return []


def mlflow_steps(folder: Path) -> Times:
    """Last time of each step that is in the SQLite of a phase run in ``folder``."""
    database = folder / ".pose" / "mlflow.db"
    if not database.exists():
        return {}
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as open_database:
        try:
            rows = open_database.execute("select step, timestamp from metrics where key = 'generator/loss'").fetchall()
        except sqlite3.OperationalError:  # MLflow makes its tables, and changes them, some seconds after the file
            return {}
    return {step: milliseconds / 1000 for step, milliseconds in sorted(rows, key=lambda row: row[1])}


def marked(folder: Path) -> list[psutil.Process]:
    """Processes that carry the mark of ``folder``."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == str(folder):
                found.append(process)
    return found


def send(processes: Sequence[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def bare_rank(rank: int, port: int, uri: str, overrides: list[str], file: Path) -> None:
    """One of two ranks in a plain loop over batches in memory; the first writes when each step was finished."""
    settings = config.load("", overrides)
    torch.set_num_threads(settings.training.threads_per_worker)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    store = Store.open(uri)
    prepared = Prepared(store, store.read_json("shards.json"))
    device, teacher = torch.device("cpu"), teacher_folder(settings.model)
    networks = build.build_networks(
        "priming", settings, teacher, teacher, torch.tensor(prepared.null_text()), device=device, meta=True
    )
    build.shard_networks(networks, settings, parallel.build_mesh(settings.training, device))
    turns = build.phase_turns("priming", settings)
    optimizers = loop.build_optimizers(networks, turns, settings.training.weight_decay)
    with file.open("w", buffering=1) as out:

        def after_step(step: int, values: dict[str, torch.Tensor]) -> None:
            if rank == 0:
                out.write(f"{time.time()}\n")

        loop.train(
            networks,
            optimizers,
            turns,
            in_memory(prepared, settings.training.batch_per_worker),
            first_step=0,
            steps=ENDLESS,
            seed=0,
            gradient_clip=settings.training.gradient_clip,
            ema_decay=settings.priming.ema_decay,
            after_step=after_step,
            non_finite_steps=settings.alarms.non_finite_steps,
        )


def in_memory(prepared: Prepared, size: int) -> Iterator[Batch]:
    """Real clips in batches, again and again, with nothing to wait for."""
    rows = prepared.heldout("validation", 16)
    columns = {name: torch.tensor(rows[name]) for name in TRAINED_ON if name in rows}
    clips, condition = len(columns["latents"]), Condition.of(columns)
    batches = [
        Batch(columns["latents"][start : start + size], condition.rows(slice(start, start + size)))
        for start in range(0, clips - size + 1, size)
    ]
    while True:
        yield from batches


def start_bare(folder: Path, store: Store) -> Side:
    """Start the bare ranks, by this file in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--bare",
        str(folder / "steps"),
        "--store",
        store.url("runs/data/prepare_data"),
    ]
    return start("bare", folder, command)


def start_phase(name: str, folder: Path, store: Store, *own: str) -> Side:
    """Start the demo's first phase as a run of its own, with a Ray of its own and the clips that are prepared."""
    runs = store.child("runs")
    for key in runs.list("data/prepare_data"):
        runs.write_bytes(f"{name}{key.removeprefix('data')}", runs.read_bytes(key))
    return start(name, folder, stage(STAGE, name, store, *own))


def start(name: str, folder: Path, command: list[str]) -> Side:
    """Start a side; all its processes carry the folder's mark."""
    folder.mkdir()
    log = (folder / "log").open("w")
    process = subprocess.Popen(command, cwd=folder, env=os.environ | {MARK: str(folder)}, stdout=log, stderr=log)
    return Side(name, folder, process)


def stage(script: str, name: str, store: Store, *own: str) -> list[str]:
    """The command line of a stage of the run ``name``."""
    path = str(PROJECT / "pipelines" / f"{script}.py")
    return [sys.executable, path, *SETTINGS, *own, f"run.name={name}", f"storage.uri={store.uri}"]


def reached(side: Side, steps: int, since: float = 0.0) -> bool:
    """Whether so many steps were told of, later than ``since``."""
    return sum(at > since for at in side.steps().values()) >= steps


def wait_for(what: str, side: Side, ready: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if side.process.poll() is not None or time.monotonic() > deadline:
            raise PoseError(f"{side.name} did not come to {what}: {(side.folder / 'log').read_text()[-500:]}")
        time.sleep(0.1)


def end(side: Side) -> None:
    """Kill all its processes, by their ids."""
    while found := marked(side.folder):
        send(found, signal.SIGKILL)
        side.process.poll()
        time.sleep(0.2)
    side.process.wait()


def take_turn(side: Side, server: psutil.Process) -> None:
    """Let a side alone run until ``COUNTED_STEPS`` of its steps are timed."""
    if side.name != "bare":
        send([server], signal.SIGCONT)
    send(marked(side.folder), signal.SIGCONT)
    since = time.time()
    wait_for(f"{COUNTED_STEPS} steps", side, lambda: bool(side.seconds(since)))
    took, *without = side.seconds(since)
    side.turns.append(took)
    side.without += without
    send(marked(side.folder), signal.SIGSTOP)
    send([server], signal.SIGSTOP)


def overheads(folder: Path, store: Store, server: psutil.Process, rounds: int) -> list[Figure]:
    """Both ratios, of ``rounds`` turns of each side."""
    ratios: list[float] = []
    costs: list[float] = []
    bare: list[float] = []
    while len(ratios) < rounds:
        own = folder / f"from-round-{len(ratios)}"
        own.mkdir()
        plain, whole = take_turns(own, store, server, min(ROUNDS_A_START, rounds - len(ratios)))
        bare += plain.turns
        around = [(before + behind) / 2 for before, behind in itertools.pairwise(plain.turns)]
        ratios += [mine / theirs for mine, theirs in zip(whole.turns, around, strict=True)]
        costs += [mine / rest - 1 for mine, rest in zip(whole.turns, whole.without, strict=True)]
    print({"step_ratio": ratios, "checkpoint_overhead": costs, "bare": bare}, file=sys.stderr)
    return [
        Figure("step_ratio", statistics.median(ratios), "x", 1.03, rounds),
        Figure("checkpoint_overhead", statistics.median(costs), "x", 0.02, rounds),
        Figure("bare_step_seconds", statistics.median(bare) / COUNTED_STEPS, "s", None, len(bare)),
    ]


def take_turns(folder: Path, store: Store, server: psutil.Process, rounds: int) -> tuple[Side, Side]:
    """Start both sides and let them take turns: bare, whole, bare and so on."""
    checkpoints = f"training.checkpoint_every_steps={CHECKPOINT_STEPS}"
    sides: list[Side] = []
    try:
        for begin in (
            partial(start_bare, folder / "bare", store),
            partial(start_phase, f"whole-{folder.name}", folder / "whole", store, checkpoints),
        ):
            sides.append(side := begin())
            wait_for("its first steps", side, partial(reached, side, 2 * LOG_STEPS))
            send(marked(side.folder), signal.SIGSTOP)
        bare, whole = sides
        for _ in range(rounds):
            take_turn(bare, server)
            take_turn(whole, server)
        take_turn(bare, server)
    finally:
        send([server], signal.SIGCONT)
        for side in sides:
            end(side)
    return bare, whole


def recovery(folder: Path, store: Store, kills: int, rng: random.Random) -> Figure:
    """Seconds from a worker's kill to the next step that is finished."""
    side = start_phase("recovery", folder / "recovery", store, "tracking.log_every_steps=1", "training.max_failures=99")
    seconds = []
    try:
        for _ in range(kills):
            wait_for("some steps", side, partial(reached, side, 20, time.time()))
            found = [each for each in marked(side.folder) if "ray::RayTrainWorker" in "".join(each.cmdline()[:1])]
            rng.choice(found).kill()
            killed = time.time()
            # Both ranks are needed for a step: what the other one was about to tell is of the step under way.
            after = killed + 2
            wait_for("a step", side, partial(reached, side, 1, after))
            seconds.append(min(at for at in side.steps().values() if at > after) - killed)
    finally:
        end(side)
    print({"recovery": [round(each, 1) for each in seconds]}, file=sys.stderr)
    return Figure("recovery_seconds", statistics.median(seconds), "s", 30.0, kills)


def run(arguments: argparse.Namespace) -> None:
    load, figures = os.getloadavg()[0], []
    for name in [name for name in os.environ if name.startswith(("RAY_", "MLFLOW_", "AWS_"))]:
        del os.environ[name]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp")))
        server = stack.enter_context(EmbeddedStore(folder / "store"))
        store, process = Store.open(server.uri), psutil.Process(server.process_id)
        prepared = start("data", folder / "data", stage("prepare_data", "data", store))
        stack.callback(end, prepared)
        if prepared.process.wait():
            raise PoseError(f"prepare_data failed: {(prepared.folder / 'log').read_text()[-500:]}")
        if arguments.rounds:
            figures += overheads(folder, store, process, arguments.rounds)
        if arguments.kills:
            figures.append(recovery(folder, store, arguments.kills, random.Random(0)))
    show(figures)
    conditions = {
        "ranks": RANKS,
        "steps_a_turn": COUNTED_STEPS,
        "rounds": arguments.rounds,
        "load_average_at_the_end": round(os.getloadavg()[0], 2),
    }
    print(f"load average before: {load:.2f}, at the end: {conditions['load_average_at_the_end']}", file=sys.stderr)
    if arguments.record:
        print(f"recorded in {record('orchestration_overhead', figures, conditions, load)}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="turns of each side (default: 8; 0 leaves ratios out)")
    parser.add_argument("--kills", type=int, default=5, help="workers killed, one after the other (default: 5)")
    parser.add_argument("--record", action="store_true", help="also append to results/orchestration_overhead.json")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        mp.spawn(bare_rank, (free_port(), arguments.store, SETTINGS, arguments.bare), nprocs=RANKS)
        return
    try:
        run(arguments)
    except PoseError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
