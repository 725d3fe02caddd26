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
from pose_core.errors import PoseError
from pose_core.models.video_model import Condition
from pose_core.runtime import preemption
from pose_core.runtime.batches import Batches
from pose_core.runtime.checkpoints import PhaseCheckpoints, Saved
from pose_core.runtime.cores import take_cores
from pose_core.runtime.datasets import TRAINED_ON
from pose_core.runtime.feeding import Workers
from pose_core.runtime.garbage import Garbage
from pose_core.runtime.meter import Meter
from pose_core.runtime.out_of_memory import kernel_kills, told
from pose_core.runtime.phase_job import PhaseJob
from pose_core.runtime.shared_copies import shared_copy
from pose_core.runtime.teachers import teacher_folder
from pose_core.runtime.validation import Validation
from pose_core.runtime.watchdog import Limits, Watchdog
from pose_core.settings import TrainingSettings
from pose_core.training import build, loop, parallel
from pose_core.training.alarms import Alarms, Collapse
from pose_core.training.optimizers import build_optimizers
from pose_core.training.state import Batch, Networks

WAIT = "data_wait_share"


def run_phase(config: dict[str, PhaseJob]) -> dict[str, float]:
    """One rank of a phase: build, restore, train, and on rank 0 write the averaged generator; figures of the rank."""
    job = config["job"]
    settings = job.settings
    # FSDP warns that a view it returned must not be changed in place; nothing here does.
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
    if settings.training.threads_per_worker:
        torch.set_num_threads(settings.training.threads_per_worker)
    place = ray.train.get_context()
    take_cores(place.get_local_rank(), place.get_local_world_size(), torch.get_num_threads())
    device = ray.train.torch.get_device()
    job.board.at_work(ray.get_runtime_context().get_node_id(), kernel_kills())
    with told(device), contextlib.ExitStack() as stack:
        turns = build.phase_turns(job.phase, settings)
        kept = PhaseCheckpoints(job.artifact, settings.training.keep_checkpoints, settings.storage.retry_seconds)
        found = kept.newest()
        position = Position.from_json(found.position) if found else Position()
        # First of all, so that data are read while networks are built.
        workers = Workers(parallel.rank(), parallel.ranks(), parallel.from_first_rank)
        batches = stack.enter_context(job.data.batches(position, *_reader(settings.training), workers))
        networks = _networks(job, device)
        optimizers = build_optimizers(networks, turns, settings.training.weight_decay)
        done = kept.load(found, networks, optimizers) if found else 0
        meter = Meter(job, networks, optimizers, turns, device)
        watchdog = Watchdog(Limits.of(settings), job.board, parallel.rank(), parallel.ranks())
        stack.enter_context(watchdog)
        with meter.record("validation"):
            watch = _Watch(job, networks, optimizers, device, kept, found, batches, meter, watchdog)
        stack.enter_context(meter.measuring())
        stack.enter_context(watch.garbage)
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
        _write_result(job, networks)
        return watch.figures


def _networks(job: PhaseJob, device: torch.device) -> Networks:
    teacher = teacher_folder(job.settings.model)
    null_text = torch.tensor(job.data.prepared.null_text()).to(device)
    start = contextlib.nullcontext(teacher) if job.generator is None else shared_copy(job.generator.child("generator"))
    with start as folder:
        networks = build.build_networks(job.phase, job.settings, teacher, folder, null_text, device=device, meta=True)
        build.shard_networks(networks, job.settings, parallel.build_mesh(job.settings.training, device))
        parallel.meet(device)  # else a rank that comes late would have to copy it again
    return networks


def _reader(training: TrainingSettings) -> tuple[int, int]:
    """Which reader of the training data this rank is, and of how many: ranks that share a clip's tokens are one."""
    return parallel.rank() // training.context_workers, parallel.ranks() // training.context_workers


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
        kept: PhaseCheckpoints,
        found: Saved | None,
        data: Batches,
        meter: Meter,
        watchdog: Watchdog,
    ):
        self.job, self.networks, self.optimizers, self.kept = job, networks, optimizers, kept
        self.settings, self.rank, self.data = job.settings, parallel.rank(), data
        self.meter, self.watchdog, self.garbage = meter, watchdog, Garbage()
        self.seen: list[dict[str, Any]] = []
        self.validation = Validation(job, networks, device)
        done = found.step if found else 0
        good = kept.newest_good()
        self.good_step = good.step if good else 0
        self.alarms = Alarms(
            self.validation.teacher_figures, self.settings.alarms.lowest_share, found.armed if found else []
        )
        self.stopped, self.notice = False, preemption.NONE
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
        self.garbage.end_step()
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
        if not self.stopped and not last:
            self._heed_notice(step, saved=checkpoint_due)
        return self.stopped

    @contextlib.contextmanager
    def _apart(self, part: str) -> Iterator[None]:
        """What is done inside is no part of training, and may take longer on one rank than on the others."""
        self.watchdog.excuse()
        with self.meter.record(part):
            yield

    def _heed_notice(self, step: int, saved: bool) -> None:
        """Where any worker is about to be taken away: store what there is, and end if it was told to end."""
        notice = parallel.highest(torch.tensor(preemption.level(), device=self.networks.null_text.device))
        if notice <= self.notice:
            return
        self.notice = notice
        with self._apart("checkpoint"):
            if not saved:
                self._checkpoint(step)
            self.kept.wait()
        if self.rank == 0:
            self.job.board.note(f"a worker is about to be taken away: step {step} is stored")
        if notice == preemption.TERMINATED:
            raise preemption.PreemptedError(f"a worker was told to end (SIGTERM) at step {step}, which is stored")

    def finish(self) -> None:
        """Put back what an alarm asks for and log the last samples; every curve is in MLflow when this returns."""
        self.kept.wait()
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
        self.job.board.update(step, shown)

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
        kept = f"checkpoint step-{self.good_step:07d} is kept" if self.good_step else "there is no checkpoint before it"
        self.job.board.note(f"warning: {what} {teacher:.3g} (alarms.lowest_share); {kept}")
        self.job.tracker.set_tags({f"alarm.{figure}": f"{what} {teacher:.3g}"})

    def _checkpoint(self, step: int) -> None:
        if not self.alarms.collapsed:
            self.good_step = step
        seen, self.seen = self.seen, []
        self.garbage.before_checkpoint()

        def log() -> None:
            # A worker that dies takes its queued points along; those before a checkpoint are not made again.
            self.job.tracker.flush()
            self._log_clips(step, seen)

        self.kept.save(
            step,
            self.networks,
            self.optimizers,
            good_step=0 if self.alarms.collapsed else step,
            armed=sorted(self.alarms.armed),
            position=self.data.position.to_json(),
            before_commit=log,
        )

    @property
    def figures(self) -> dict[str, float]:
        """Of this rank's whole attempt."""
        return {"good_step": self.good_step, WAIT: self._wait_share()}

    def _wait_share(self) -> float:
        """Share of the time since this worker began to train in which it waited for data."""
        return self.data.waited_seconds / max(time.monotonic() - self.started, 1e-9)

    def _log_clips(self, step: int, seen: list[dict[str, Any]]) -> None:
        """Only what lies before a checkpoint: steps behind it are made again after a crash."""
        if seen:
            first = step - len(seen) + 1
            lines = (json.dumps({"step": first + at} | each) + "\n" for at, each in enumerate(seen))
            self.job.artifact.write_bytes(f"clips/step-{step:07d}.jsonl", "".join(lines).encode())

    def _go_back(self) -> int:
        """Restore the last checkpoint without an alarm; its step."""
        good = self.kept.newest_good()
        if good is None:
            raise PoseError(
                "the generator collapsed before its first checkpoint, see the warning above: lower the phase's "
                "learning rate or training.checkpoint_every_steps, or set alarms.stop_early=false"
            )
        if self.rank == 0:
            self.job.board.note(f"ends early with the weights of step {good.step}")
        return self.kept.load(good, self.networks, self.optimizers)


def _write_result(job: PhaseJob, networks: Networks) -> None:
    """Rank 0 writes the averaged generator as a stock transformer folder; every rank takes part in the gather."""
    weights = parallel.gather_weights(networks.average.module)
    if parallel.rank() == 0:
        with tempfile.TemporaryDirectory() as scratch:
            networks.average.save(Path(scratch) / "transformer", weights)
            job.artifact.upload_folder(Path(scratch), "generator")
