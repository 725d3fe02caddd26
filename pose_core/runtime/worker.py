"""The function every Ray Train worker runs: one rank of one phase, from its data to its last checkpoint."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
from torch import Tensor

from pose_core.data.order import Position
from pose_core.errors import CheckpointError, PoseError
from pose_core.models.video_model import Condition
from pose_core.runtime.batches import Batches
from pose_core.runtime.datasets import TRAINED_ON
from pose_core.runtime.meter import Meter
from pose_core.runtime.out_of_memory import kernel_kills, told
from pose_core.runtime.phase_job import PhaseJob
from pose_core.runtime.teachers import teacher_folder
from pose_core.runtime.validation import Validation
from pose_core.runtime.watchdog import BoardBell, Limits, Watchdog
from pose_core.settings import TrainingSettings
from pose_core.training import build, checkpoint, loop, parallel
from pose_core.training.alarms import Alarms, Collapse
from pose_core.training.state import Batch, Networks

POSITION = "position.json"
"""A checkpoint's file that says where its data go on."""
GOOD_STEP, ARMED = "good_step", "armed"
"""Reported with a checkpoint: its step, or 0 where an alarm rang; the figures that alarms watch from then on."""
WAIT = "data_wait_share"


def run_phase(config: dict[str, PhaseJob]) -> None:
    """One rank of a phase: build, restore, train, and on rank 0 write the averaged generator."""
    job = config["job"]
    settings = job.settings
    # FSDP warns that a view it returned must not be changed in place; nothing here does.
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
    if settings.training.threads_per_worker:
        torch.set_num_threads(settings.training.threads_per_worker)
    device = ray.train.torch.get_device()
    job.progress.at_work.remote(ray.get_runtime_context().get_node_id(), kernel_kills())
    with told(device), contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        turns = build.phase_turns(job.phase, settings)
        with _checkpoint_folder() as restored:
            # First of all, so that data are read while networks are built.
            batches = stack.enter_context(job.data.batches(_position(restored), *_reader(settings.training)))
            networks = _networks(job, Path(scratch), device)
            optimizers = loop.build_optimizers(networks, turns, settings.training.weight_decay)
            done = checkpoint.load(restored, networks, optimizers) if restored else 0
        meter = Meter(job, networks, optimizers, turns, device)
        watchdog = Watchdog(Limits.of(settings), BoardBell(job.progress), parallel.rank(), parallel.ranks())
        stack.enter_context(watchdog)
        with meter.record("validation"):
            watch = _Watch(job, networks, optimizers, device, done, batches, meter, watchdog)
        stack.enter_context(meter.measuring())
        loop.train(
            networks,
            optimizers,
            turns,
            watch.batches(device),
            first_step=done,
            steps=job.steps,
            seed=settings.run.seed,
            gradient_clip=settings.training.gradient_clip,
            ema_decay=job.ema_decay,
            after_step=watch.after_step,
            non_finite_steps=settings.alarms.non_finite_steps,
            accumulation=settings.training.accumulation,
            record=meter.record,
        )
        watch.finish()
        _write_result(job, networks, Path(scratch))


def _networks(job: PhaseJob, scratch: Path, device: torch.device) -> Networks:
    teacher = teacher_folder(job.settings.model)
    generator = teacher
    if job.generator is not None:
        generator = scratch / "generator"
        job.generator.download_folder("generator", generator)
    null_text = torch.tensor(job.data.prepared.null_text()).to(device)
    networks = build.build_networks(job.phase, job.settings, teacher, generator, null_text, device=device, meta=True)
    build.shard_networks(networks, job.settings, parallel.build_mesh(job.settings.training, device))
    return networks


@contextlib.contextmanager
def _checkpoint_folder() -> Iterator[Path | None]:
    """Ray Train's last checkpoint, to go on from, if there is one."""
    found = ray.train.get_checkpoint()
    if found is None:
        yield None
    else:
        with found.as_directory() as folder:
            yield Path(folder)


def _reader(training: TrainingSettings) -> tuple[int, int]:
    """Which reader of the training data this rank is, and of how many: ranks that share a clip's tokens are one."""
    return parallel.rank() // training.context_workers, parallel.ranks() // training.context_workers


def _position(restored: Path | None) -> Position:
    """Where a checkpoint's data go on; the same whatever the number of workers."""
    if restored is None:
        return Position()
    if not (restored / POSITION).is_file():
        raise CheckpointError(f"the last checkpoint of this phase has no {POSITION}: choose another run.name")
    return Position.from_json((restored / POSITION).read_text())


def _to_batch(rows: dict[str, Any], device: torch.device) -> Batch:
    columns = {name: torch.tensor(np.asarray(rows[name]), device=device) for name in TRAINED_ON if name in rows}
    return Batch(columns["latents"], Condition.of(columns))


class _Watch:
    """What happens between steps: curves, alarms, checkpoints, sample videos and the progress bar."""

    def __init__(
        self,
        job: PhaseJob,
        networks: Networks,
        optimizers: dict[str, torch.optim.Optimizer],
        device: torch.device,
        done: int,
        data: Batches,
        meter: Meter,
        watchdog: Watchdog,
    ):
        self.job, self.networks, self.optimizers = job, networks, optimizers
        self.settings, self.rank, self.data = job.settings, parallel.rank(), data
        self.meter, self.watchdog = meter, watchdog
        self.seen: list[dict[str, Any]] = []
        self.validation = Validation(job, networks, device)
        self.good_step, armed = _kept_alarms(done)
        self.alarms = Alarms(self.validation.teacher_figures, self.settings.alarms.lowest_share, armed)
        self.stopped = False
        self._report(done, {})
        if self.settings.alarms.every_steps:
            self._log_figures(done, "teacher_", self.alarms.teacher)
            self._has_collapsed(done)
        self.started, self.started_at, self.step = time.monotonic(), done, done

    def batches(self, device: torch.device) -> Iterator[Batch]:
        """This rank's batches; what the steps since the last checkpoint have seen is kept in mind."""
        for batch in self.data:
            self.meter.begin_step(self.step + 1, batch.bucket)
            self.watchdog.begin_step(self.step + 1, batch.bucket)
            if self.settings.training.log_clips:
                self.seen.append({"bucket": batch.bucket, "clips": self.job.data.names(batch.places)})
            yield _to_batch(batch.columns, device)

    def after_step(self, step: int, values: dict[str, Tensor]) -> bool:
        """Whether the phase ends here, because of an alarm."""
        training, alarms, last = self.settings.training, self.settings.alarms, step == self.job.steps
        self.step = step
        self.watchdog.end_step()
        if self.meter.end_step(step):
            self.watchdog.excuse()
        if step % self.settings.tracking.log_every_steps == 0 or last:
            self._report(step, parallel.mean_over_ranks(values | self.meter.measured()))
        if step % training.sample_every_steps == 0 and not last:
            with self._apart("validation"):
                self.validation.log_pictures(step)
        checkpoint_due = step % training.checkpoint_every_steps == 0 or last
        # Before each checkpoint, too: whether it is a good one must be known when it is kept.
        if alarms.every_steps and (step % alarms.every_steps == 0 or checkpoint_due):
            with self._apart("validation"):
                self.stopped = self._has_collapsed(step) and alarms.stop_early
        if checkpoint_due and not self.stopped:
            with self._apart("checkpoint"):
                self._checkpoint(step)
        return self.stopped

    @contextlib.contextmanager
    def _apart(self, part: str) -> Iterator[None]:
        """What is done inside is no part of training, and may take longer on one rank than on the others."""
        self.watchdog.excuse()
        with self.meter.record(part):
            yield

    def finish(self) -> None:
        """Put back what an alarm asks for and log the last samples; every curve is in MLflow when this returns."""
        self.validation.log_pictures(self._go_back() if self.stopped else self.job.steps)
        if self.rank == 0:
            if refused := self.data.refused():
                self.job.artifact.write_bytes("quarantine.jsonl", "".join(line + "\n" for line in refused).encode())
            self.job.tracker.flush()

    def _report(self, step: int, values: dict[str, float]) -> None:
        if self.rank != 0:
            return
        shown = {name.split("/")[0]: value for name, value in values.items() if name.endswith("/loss")}
        if values:
            seconds = (time.monotonic() - self.started) / max(step - self.started_at, 1)
            rates = self.meter.rates()
            self.job.tracker.log_metrics(step, values | rates | {"seconds_per_step": seconds, WAIT: self._wait_share()})
            shown |= self.meter.beside_the_bar(rates)
        self.job.progress.update.remote(step, shown)

    def _has_collapsed(self, step: int) -> bool:
        """Measure, log and warn; whether any figure is collapsed now, the same on all ranks."""
        figures = self.validation.figures()
        if self.rank == 0:
            for collapse in self.alarms.look(figures):
                self._warn(step, collapse)
            self._log_figures(step, "", figures | {"collapsed": len(self.alarms.collapsed)})
        return parallel.any_rank(torch.tensor(bool(self.alarms.collapsed), device=self.networks.null_text.device))

    def _log_figures(self, step: int, prefix: str, figures: dict[str, float]) -> None:
        if self.rank == 0:
            self.job.tracker.log_metrics(step, {f"validation/{prefix}{name}": v for name, v in figures.items()})

    def _warn(self, step: int, collapse: Collapse) -> None:
        figure, value, teacher = collapse
        what = f"{figure} fell to {value:.3g} at step {step}, below {self.alarms.lowest_share:g} of the teacher's"
        kept = f"checkpoint {_name(self.good_step)} is kept" if self.good_step else "there is no checkpoint before it"
        self.job.progress.note.remote(f"warning: {what} {teacher:.3g} (alarms.lowest_share); {kept}")
        self.job.tracker.set_tags({f"alarm.{figure}": f"{what} {teacher:.3g}"})

    def _checkpoint(self, step: int) -> None:
        if not self.alarms.collapsed:
            self.good_step = step
        if self.rank == 0:
            # A worker that dies takes its queued points along; those before a checkpoint are not made again.
            self.job.tracker.flush()
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(Path(folder), step, self.networks, self.optimizers)
            (Path(folder) / POSITION).write_text(self.data.position.to_json())
            self._log_clips(step)
            # Ray Train keeps what rank 0 reports, which alone knows of alarms.
            good_step = 0 if self.alarms.collapsed else step
            ray.train.report(
                {"step": step, GOOD_STEP: good_step, ARMED: sorted(self.alarms.armed), WAIT: self._wait_share()},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=_name(step),
            )

    def _wait_share(self) -> float:
        """Share of the time since this worker began to train in which it waited for data."""
        return self.data.waited_seconds / max(time.monotonic() - self.started, 1e-9)

    def _log_clips(self, step: int) -> None:
        """Only what lies before a checkpoint: steps behind it are made again after a crash."""
        if self.rank == 0 and self.seen:
            first = step - len(self.seen) + 1
            lines = (json.dumps({"step": first + at} | seen) + "\n" for at, seen in enumerate(self.seen))
            self.job.artifact.write_bytes(f"clips/{_name(step)}.jsonl", "".join(lines).encode())
        self.seen = []

    def _go_back(self) -> int:
        """Restore the last checkpoint without an alarm; its step."""
        found = max(ray.train.get_all_reported_checkpoints(), key=_good_step, default=None)
        if found is None or not _good_step(found):
            raise PoseError(
                "the generator collapsed before its first checkpoint, see the warning above: lower the phase's "
                "learning rate or training.checkpoint_every_steps, or set alarms.stop_early=false"
            )
        if self.rank == 0:
            self.job.progress.note.remote(f"ends early with the weights of step {_good_step(found)}")
        with found.checkpoint.as_directory() as folder:
            return checkpoint.load(Path(folder), self.networks, self.optimizers)


def _kept_alarms(done: int) -> tuple[int, list[str]]:
    """Of the checkpoint that the phase goes on from: the last step without an alarm, and the armed figures."""
    if not done:
        return 0, []
    found = ray.train.get_all_reported_checkpoints()
    armed = [name for each in found if each.metrics["step"] == done for name in each.metrics.get(ARMED, [])]
    return max(map(_good_step, found), default=0), armed


def _good_step(reported: ray.train.ReportedCheckpoint) -> int:
    return reported.metrics.get(GOOD_STEP, 0)


def _name(step: int) -> str:
    return f"step-{step:07d}"


def _write_result(job: PhaseJob, networks: Networks, scratch: Path) -> None:
    """Rank 0 writes the averaged generator as a stock transformer folder; every rank takes part in the gather."""
    weights = parallel.gather_weights(networks.average.module)
    if parallel.rank() == 0:
        folder = scratch / "result" / "transformer"
        networks.average.save(folder, weights)
        job.artifact.upload_folder(folder.parent, "generator")
