"""What Ray Train, data, tracking and checkpoints cost a training step, and how soon a killed worker is made good.

Two sides train the demo's first phase on as many ranks, and run by turns on the same machine, the other one stopped by
SIGSTOP meanwhile:

    bare         processes in a plain loop over batches in memory; Ray and the store are stopped, too
    whole        Ray Train with data, MLflow and an asynchronous checkpoint to object storage every 50 steps

A turn is a few seconds long, so that a machine which grows slower does so for both sides, and not always as long, so
that a checkpoint may fall anywhere in it; its first seconds, in which what was stopped catches up with what it has
missed, are not counted. A turn of ``whole`` counts as the time of its steps over that of the bare turns around it.
``step_ratio`` is the mean of a round of such turns, with whatever checkpoints fell into it, and of all rounds the
median. ``checkpoint_overhead`` is what the six steps from a checkpoint on, in which it is written, take longer than as
many of the other steps of the same turn, over the time of 50 of those; the mean of all checkpoints that are whole in a
turn.
Two processes that do the same differ by up to 2 % for as long as they live, so both sides are started anew every few
rounds. ``recovery_seconds`` is from the SIGKILL of one of two workers to the next step that is finished.

Two ranks leave none of two cores to Ray, the data and MLflow; ``--ranks 1`` leaves them one, as a node with GPUs does.
Where no core is left, ranks of ``whole`` keep to one each and those of ``bare`` to none: see docs/recovery.md for what
that hides.
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
from collections import defaultdict
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
from pose_core.runtime.cli import positive_int
from pose_core.runtime.datasets import TRAINED_ON, Prepared
from pose_core.runtime.object_store import EmbeddedStore
from pose_core.runtime.storage import Store
from pose_core.runtime.teachers import teacher_folder
from pose_core.training import build, loop, parallel
from pose_core.training.optimizers import build_optimizers
from pose_core.training.state import Batch

PROJECT = Path(__file__).resolve().parents[1]
MARK = "STARTED_BY_BENCHMARK_IN"
CHECKPOINT_STEPS, RECOVERED_RANKS = 50, 2
TURN_SECONDS, UNCOUNTED_SECONDS = (16.0, 26.0), 4.0
TURNS_A_ROUND, ROUNDS_A_START = 8, 2
LOG_STEPS = 2
"""As the demo: the time of every second step is known, from MLflow."""
CHECKPOINT_TAKES_STEPS = 6
"""Steps from a checkpoint's to one by which it is stored, and by which nothing that it set off goes on."""
STAGE, ENDLESS = "stability_priming", 1_000_000
SETTINGS = [
    *(f"priming.steps={ENDLESS}", f"training.sample_every_steps={ENDLESS}", "training.sample_clips=1"),
    *("alarms.every_steps=0", f"tracking.log_every_steps={LOG_STEPS}"),
    *("data.digits_clips=256", "data.digits_heldout_clips=16"),
]
Times = dict[int, float]
"""When a step was finished, in Unix seconds."""


@dataclass(frozen=True)
class Turn:
    """What was finished in the counted seconds of a turn."""

    times: Times

    @property
    def step_seconds(self) -> float:
        first, last = min(self.times), max(self.times)
        return (self.times[last] - self.times[first]) / (last - first)

    def checkpoint_shares(self) -> list[float]:
        """What each checkpoint that is whole in it costs, over the time from one to the next without them."""
        seconds: dict[int | None, float] = defaultdict(float)
        steps: dict[int | None, int] = defaultdict(int)
        for before, behind in itertools.pairwise(sorted(self.times)):
            last = before - before % CHECKPOINT_STEPS
            at = last if last and before < last + CHECKPOINT_TAKES_STEPS else None
            seconds[at] += self.times[behind] - self.times[before]
            steps[at] += behind - before
        if not steps[None]:
            return []
        plain = seconds[None] / steps[None]
        whole = [at for at in steps if at is not None and steps[at] >= CHECKPOINT_TAKES_STEPS]
        return [(seconds[at] - steps[at] * plain) / (plain * CHECKPOINT_STEPS) for at in whole]


@dataclass
class Side:
    """One of those that take turns: its processes, and where it tells of its steps."""

    name: str
    folder: Path
    process: subprocess.Popen[Any]
    turns: list[Turn] = field(default_factory=list)

    def steps(self) -> Times:
        """All that it has finished so far."""
        file = self.folder / "steps"
        if file.exists():
            return {number: float(line) for number, line in enumerate(file.read_text().splitlines(), start=1)}
        return mlflow_steps(self.folder)

    def between(self, since: float, until: float) -> Turn:
        """The steps that it finished between two times."""
        return Turn({step: at for step, at in self.steps().items() if since <= at <= until})


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
    """Processes that carry the mark of ``folder``, and what they have started.

    A dozen of Ray's write their title over the environment they were given, and can be found by their parents alone.
    """
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid not in found and process.environ().get(MARK) == str(folder):
                found |= {each.pid: each for each in (process, *process.children(recursive=True))}
    return list(found.values())


def send(processes: Sequence[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def bare_rank(rank: int, ranks: int, port: int, uri: str, overrides: list[str], file: Path) -> None:
    """One of the ranks in a plain loop over batches in memory; the first writes when each step was finished."""
    settings = config.load("", overrides)
    torch.set_num_threads(settings.training.threads_per_worker)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    store = Store.open(uri)
    prepared = Prepared(store, store.read_json("shards.json"))
    device, teacher = torch.device("cpu"), teacher_folder(settings.model)
    networks = build.build_networks(
        "priming", settings, teacher, teacher, torch.tensor(prepared.null_text()), device=device, meta=True
    )
    build.shard_networks(networks, settings, parallel.build_mesh(settings.training, device))
    turns = build.phase_turns("priming", settings)
    optimizers = build_optimizers(networks, turns, settings.training.weight_decay)
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


def start_bare(folder: Path, store: Store, ranks: int) -> Side:
    """Start the bare ranks, by this file in a process of its own."""
    own = ("--bare", str(folder / "steps"), "--store", store.url("runs/data/prepare_data"), "--ranks", str(ranks))
    return start("bare", folder, [sys.executable, __file__, *own])


def start_phase(name: str, folder: Path, store: Store, ranks: int, *own: str) -> Side:
    """Start the demo's first phase as a run of its own, with a Ray of its own and the clips that are prepared."""
    runs = store.child("runs")
    for key in runs.list("data/prepare_data"):
        runs.write_bytes(f"{name}{key.removeprefix('data')}", runs.read_bytes(key))
    return start(name, folder, stage(STAGE, name, store, f"training.workers={ranks}", *own))


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


def take_turn(side: Side, server: psutil.Process, seconds: float) -> None:
    """Let a side alone run for so long."""
    if side.name != "bare":
        send([server], signal.SIGCONT)
    send(marked(side.folder), signal.SIGCONT)
    began = time.time()
    time.sleep(seconds)
    if side.process.poll() is not None:
        raise PoseError(f"{side.name} has ended: {(side.folder / 'log').read_text()[-500:]}")
    ended = time.time()
    # What it tells of its last steps may be under way.
    wait_for("telling its steps", side, lambda: any(at > ended - 1 for at in side.steps().values()))
    send(marked(side.folder), signal.SIGSTOP)
    send([server], signal.SIGSTOP)
    turn = side.between(began + UNCOUNTED_SECONDS, ended)
    if len(turn.times) < 2:
        raise PoseError(f"{side.name} finished no two steps in {seconds:.0f} s: this machine is too slow, or too busy")
    side.turns.append(turn)


def overheads(folder: Path, store: Store, server: psutil.Process, ranks: int, rounds: int) -> list[Figure]:
    """Both ratios, of ``rounds`` rounds on ``ranks`` ranks."""
    rng = random.Random(0)
    ratios: list[float] = []
    shares: list[float] = []
    bare: list[float] = []
    while len(ratios) < rounds * TURNS_A_ROUND:
        own = folder / f"from-turn-{len(ratios)}"
        own.mkdir()
        left = rounds - len(ratios) // TURNS_A_ROUND
        lengths = [rng.uniform(*TURN_SECONDS) for _ in range(TURNS_A_ROUND * min(ROUNDS_A_START, left))]
        plain, whole = take_turns(own, store, server, ranks, lengths)
        ratios += over_those_around(plain.turns, whole.turns)
        shares += [share for turn in whole.turns for share in turn.checkpoint_shares()]
        bare += [turn.step_seconds for turn in plain.turns]
    if not shares:
        raise PoseError("no turn held a whole checkpoint: --rounds must be larger")
    means = [statistics.mean(ratios[first : first + TURNS_A_ROUND]) for first in range(0, len(ratios), TURNS_A_ROUND)]
    told = {"rounds": means, "turns": ratios, "checkpoints": shares}
    print({name: [round(value, 4) for value in values] for name, values in told.items()}, file=sys.stderr)
    return [
        Figure("step_ratio", statistics.median(means), "x", 1.03, rounds),
        Figure("checkpoint_overhead", statistics.mean(shares), "x", 0.02, len(shares)),
        Figure("bare_step_seconds", statistics.median(bare), "s", None, len(bare)),
    ]


def over_those_around(bare: Sequence[Turn], whole: Sequence[Turn]) -> list[float]:
    """Time of a step of each turn of ``whole`` over that of ``bare``'s before it and behind it."""
    around = [(before.step_seconds + behind.step_seconds) / 2 for before, behind in itertools.pairwise(bare)]
    return [turn.step_seconds / plain for turn, plain in zip(whole, around, strict=True)]


def take_turns(
    folder: Path, store: Store, server: psutil.Process, ranks: int, lengths: Sequence[float]
) -> tuple[Side, Side]:
    """Start both sides and let them take turns of so many seconds: bare, whole, bare and so on."""
    checkpoints = f"training.checkpoint_every_steps={CHECKPOINT_STEPS}"
    sides: list[Side] = []
    try:
        for begin in (
            partial(start_bare, folder / "bare", store, ranks),
            partial(start_phase, f"whole-{folder.name}", folder / "whole", store, ranks, checkpoints),
        ):
            sides.append(side := begin())
            wait_for("its first steps", side, partial(reached, side, 2 * LOG_STEPS))
            send(marked(side.folder), signal.SIGSTOP)
        bare, whole = sides
        for seconds in lengths:
            take_turn(bare, server, seconds)
            take_turn(whole, server, seconds)
        take_turn(bare, server, lengths[-1])
    finally:
        send([server], signal.SIGCONT)
        for side in sides:
            end(side)
    return bare, whole


def recovery(folder: Path, store: Store, kills: int, rng: random.Random) -> Figure:
    """Seconds from a worker's kill to the next step that is finished."""
    own = ("tracking.log_every_steps=1", "training.max_failures=99")
    side = start_phase("recovery", folder / "recovery", store, RECOVERED_RANKS, *own)
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
            figures += overheads(folder, store, process, arguments.ranks, arguments.rounds)
        if arguments.kills:
            figures.append(recovery(folder, store, arguments.kills, random.Random(0)))
    show(figures)
    conditions = {
        "ranks": arguments.ranks,
        "counted_seconds_a_turn": [seconds - UNCOUNTED_SECONDS for seconds in TURN_SECONDS],
        "turns_a_round": TURNS_A_ROUND,
        "rounds": arguments.rounds,
        "load_average_at_the_end": round(os.getloadavg()[0], 2),
    }
    print(f"load average before: {load:.2f}, at the end: {conditions['load_average_at_the_end']}", file=sys.stderr)
    if arguments.record:
        print(f"recorded in {record('orchestration_overhead', figures, conditions, load)}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of eight turns (default: 5; 0 leaves ratios out)")
    parser.add_argument("--kills", type=int, default=5, help="workers killed, one after the other (default: 5)")
    parser.add_argument(
        "--ranks", type=positive_int, default=2, help="ranks of both sides, for the ratios (default: 2)"
    )
    parser.add_argument("--record", action="store_true", help="also append to results/orchestration_overhead.json")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        ranks, settings = arguments.ranks, [*SETTINGS, f"training.workers={arguments.ranks}"]
        mp.spawn(bare_rank, (ranks, free_port(), arguments.store, settings, arguments.bare), nprocs=ranks)
        return
    # As after Ctrl-C, nothing that was stopped may stay behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
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
