"""``--rehearse``: a run's settings, shrunken, from raw clips to the exported model on this machine's CPU.

Scripts, jobs, mesh, turns and checkpoints are those of the run; a worker is killed on the way. It works in a folder of
its own with a store, a cluster and an MLflow of its own, and needs no network.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pose_core import config
from pose_core.errors import CheckpointError, ClusterError
from pose_core.models.parts import check_parts
from pose_core.models.small_folders import save_small
from pose_core.runtime.manifests import STAGES
from pose_core.runtime.rehearsal_settings import CHECKPOINT_EVERY, MESH, mesh, rehearsed, size_of
from pose_core.settings import Settings

PIPELINES = Path(__file__).parents[2] / "pipelines"
OUTSIDE = ("RAY_", "AWS_", "MLFLOW_", "POSE_", "HF_", "CUDA_VISIBLE_DEVICES")
"""Variables that would lead a rehearsal to somebody's cluster, bucket, MLflow or GPU."""
PHASES = ("stability_priming", "adversarial_equilibrium")
KILL_AFTER = 2 * CHECKPOINT_EVERY
"""Steps behind which a checkpoint is stored for certain, even if it is written beside the training."""
STOP_SECONDS = 60

Parts = dict[str, tuple[bool, str]]
"""Whether a part was ok, and what else is to be said of it."""


@dataclass
class Seen:
    """What a rehearsal's scripts have printed and what became of them."""

    lines: list[str] = field(default_factory=list)
    exit_codes: dict[str, int] = field(default_factory=dict)
    killed: str = ""
    """The phase of which a worker was killed."""

    def resumed(self) -> int:
        """The step that the killed phase went on from; 0 if it did not."""
        found = [line for line in self.lines if line.startswith(self.killed) and "goes on from step" in line]
        return int(found[-1].split()[-1]) if self.killed and found else 0


def rehearse(settings: Settings, *scripts: str) -> None:
    """Rehearse the run up to the last of ``scripts`` of ``pipelines/``, run in that order, and say how it went.

    Raises:
        ClusterError: a part failed; the folder with its logs is named.
    """
    folder = Path(tempfile.mkdtemp(prefix="pose-rehearsal-"))
    started = time.monotonic()
    save_small(folder / "teacher", settings.model.family, settings.model.task, size_of(settings))
    small = rehearsed(settings, folder / "teacher")
    (folder / "rehearsal.yaml").write_text(config.dump(small))
    for line in _introduction(settings, small):
        print(line, flush=True)
    seen = Seen()
    for script in scripts:
        _run(script, folder, seen)
        if seen.exit_codes[script]:
            break
    failed = _report(scripts, folder, seen)
    print(f"{time.monotonic() - started:.0f} s in all", flush=True)
    if failed:
        raise ClusterError(f"the rehearsal failed at {', '.join(failed)}; everything it left is in {folder}")
    shutil.rmtree(folder)


def _introduction(settings: Settings, small: Settings) -> list[str]:
    real, here = mesh(settings.training), mesh(small.training)
    dimensions = ", ".join(f"{b} of {a} {name}" for a, b, name in zip(real, here, MESH, strict=True))
    training, data = small.training, small.data
    kept = (
        f"method.name={small.method.name} training.generator={training.generator} "
        f"activation_checkpointing={training.activation_checkpointing} precision={training.precision} "
        f"compile_blocks={str(training.compile_blocks).lower()} data.train_from={data.train_from}"
    )
    return [
        f"rehearsing {settings.run.name} on this machine's CPU; nothing of the run itself is read, written or started",
        f"  ranks     {training.workers} of {settings.training.workers}: {dimensions}",
        f"  model     {small.model.family} {small.model.task} of {size_of(settings).layers} blocks in place of "
        f"{settings.model.teacher}",
        f"  clips     moving digits of {data.frames} x {data.height} x {data.width}, {training.batch_per_worker} a "
        f"worker, in {training.accumulation} parts",
        f"  as in the run: {kept}",
        "  not rehearsed: the run's own videos, curation, buckets, teacher, memory, network, bucket and GPUs",
    ]


def _run(script: str, folder: Path, seen: Seen) -> None:
    """Run one script to its end; kill a worker of the first phase once there is a checkpoint to go on from."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OUTSIDE)}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(PIPELINES / f"{script}.py"), "--config", str(folder / "rehearsal.yaml")]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        with (folder / f"{script}.log").open("w", buffering=1) as log:
            for line in process.stdout:
                log.write(line)
                seen.lines.append(line.rstrip())
                if not seen.killed and _step(line) > KILL_AFTER and _kill_worker(process.pid):
                    seen.killed = line.split()[0]
        process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            process.kill()
            process.wait()
    seen.exit_codes[script] = process.returncode


def _step(line: str) -> int:
    """The step that a line says a phase is at, before its last; 0 for any other line."""
    words = line.split()
    if len(words) < 2 or words[0] not in PHASES or words[1].count("/") != 1:
        return 0
    done, of = words[1].split("/")
    return int(done) if done.isdecimal() and of.isdecimal() and int(done) < int(of) else 0


def _kill_worker(process_id: int) -> bool:
    for process in psutil.Process(process_id).children(recursive=True):
        with suppress(psutil.Error):
            if "ray::RayTrainWorker" in "".join(process.cmdline()[:1]):
                process.send_signal(signal.SIGKILL)
                return True
    return False


def _stages(folder: Path, seen: Seen) -> Parts:
    """How the stages of a chain ended: by the table that it prints at its end, else by the last log that it began."""
    rows = {words[0]: words for words in (line.split() for line in seen.lines) if len(words) == 3}
    begun = [stage for stage in STAGES if (folder / "outputs" / "rehearsal" / "logs" / f"{stage}.log").is_file()]
    ended = begun if rows.keys() >= STAGES.keys() else begun[:-1]
    said = {stage: f"{rows[stage][1]} s" if stage in rows else "" for stage in ended}
    return {stage: (stage in ended, said.get(stage, "did not end")) for stage in STAGES}


def _exported(folder: Path) -> tuple[bool, str]:
    try:
        check_parts(folder / "outputs" / "rehearsal" / "model", weights=True)
    except CheckpointError as error:
        return False, str(error)
    return True, "every part and file of weights of a diffusers folder is there"


def _report(scripts: Sequence[str], folder: Path, seen: Seen) -> list[str]:
    """Print what was rehearsed, part by part; names of what failed."""
    parts: Parts = {}
    for script in scripts:
        if script == "full_distill":
            parts |= _stages(folder, seen)
            parts["exported model"] = _exported(folder)
        else:
            parts[script] = seen.exit_codes.get(script) == 0, ""
    if trains := {"full_distill", *PHASES} & set(scripts):
        step = seen.resumed()
        said = f"a worker of {seen.killed} was killed, the phase went on from step {step}"
        parts["kill and resume"] = step > 0, said if seen.killed else f"{min(trains)} ended before a worker was killed"
    for name, (well, said) in parts.items():
        print(f"  {name:<24} {'ok' if well else 'FAILED':<7} {said}".rstrip(), flush=True)
    reasons = [line for line in seen.lines if line.startswith("error: ")]
    for line in reasons:
        print(f"  {line}", flush=True)
    return [name for name, (well, _) in parts.items() if not well]
