"""The driver of a training phase: hands the data and the job to Ray Train and waits."""

from __future__ import annotations

import os

import ray.train

from pose_core.errors import ClusterError, PoseError
from pose_core.runtime import cluster
from pose_core.runtime.board import drawn
from pose_core.runtime.checkpoints import last_step
from pose_core.runtime.failures import EndAtOnce, final_error
from pose_core.runtime.feeding import TrainingData
from pose_core.runtime.lean_trainer import LeanTrainer
from pose_core.runtime.out_of_memory import MemoryExhausted, of_dead_worker, with_advice
from pose_core.runtime.phase_job import PhaseJob
from pose_core.runtime.preemption import ListeningTorchConfig
from pose_core.runtime.preparing import open_prepared, raw_files
from pose_core.runtime.progress import EVENTS_VARIABLE
from pose_core.runtime.raw_clips import RawClips
from pose_core.runtime.stage import StageRun
from pose_core.runtime.worker import run_phase
from pose_core.settings import Settings


def train_phase(run: StageRun, phase: str, start_from: str | None = None) -> None:
    """Run a phase on ``training.workers`` Ray Train workers and leave the averaged generator in the stage's artifact.

    ``start_from`` names the stage whose generator it goes on with; without one it starts from the teacher. The phase
    resumes from the last checkpoint that was made with the same fingerprint.

    Raises:
        PoseError: what a worker raised, if a restart would not help.
        ClusterError: the phase failed more often than ``training.max_failures`` allows.
    """
    generator = run.artifact_of(start_from) if start_from else None
    with drawn(run.display, run.name, _steps(phase, run.settings)) as board:
        job = PhaseJob(phase, run.settings, _data(run), run.artifact, generator, run.tracker, board)
        run.metrics |= _fit(job, run)


def _fit(job: PhaseJob, run: StageRun) -> dict[str, float]:
    """Train to the end; as long as checkpoints are made, failures that may pass are never too many."""
    reached = last_step(run.artifact, run.settings.storage.retry_seconds)
    while True:
        try:
            return _trainer(job, run.fingerprint).fit().return_value
        except ray.train.TrainingFailedError as error:
            before, reached = reached, last_step(run.artifact, run.settings.storage.retry_seconds)
            if _is_final(error) or reached <= before:
                raise _told(error, run, job) from error


def _told(error: Exception, run: StageRun, job: PhaseJob) -> PoseError:
    """The one line that says why the phase failed and what helps."""
    told = plain(error, run.name, [reason for reason, _ in job.board.rings().values()], job.board.kills())
    if isinstance(told, MemoryExhausted):
        run.display.note(f"{run.name:<24} {told}: looking for settings that need less")
        told = with_advice(told, job.phase, job.settings)
    return told


def _data(run: StageRun) -> TrainingData:
    settings, prepared = run.settings, open_prepared(run)
    if settings.data.train_from == "prepared":
        return TrainingData(settings, prepared)
    data = settings.data
    raw = RawClips(raw_files(run), prepared.store, data.clips_per_shard, data.heldout_fraction, data.frames_per_second)
    encoders = cluster.raw_encoders(cluster.capacity(cluster.connect()), settings)
    return TrainingData(settings, prepared, raw, len(raw.shards()), encoders)


def _steps(phase: str, settings: Settings) -> int:
    return settings.priming.steps if phase == "priming" else settings.equilibrium.steps


def _trainer(job: PhaseJob, fingerprint: str) -> LeanTrainer:
    training = job.settings.training
    # Ray Train keeps a note of its own here and wants a place that all nodes see; checkpoints are ours.
    filesystem, path = job.artifact.child("ray_train").arrow()
    resources = {"CPU": training.cpus_per_worker}
    if training.gpus_per_worker:
        resources["GPU"] = training.gpus_per_worker
    elastic = (training.min_workers, training.workers)
    if training.min_workers:
        # For up to 35 s Ray does not see that a node is dead, and waits for room on it: look again after 10 s, not 60.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    return LeanTrainer(
        run_phase,
        train_loop_config={"job": job},
        torch_config=ListeningTorchConfig(grace_seconds=training.preemption_grace_seconds),
        scaling_config=ray.train.ScalingConfig(
            num_workers=elastic if training.min_workers else training.workers,
            use_gpu=training.gpus_per_worker > 0,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=training.elastic_check_seconds,
        ),
        run_config=ray.train.RunConfig(
            name=fingerprint[:16],
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=training.max_failures),
            callbacks=[EndAtOnce()],
            # What a person at the terminal must know stands on the board; a job's log has it all.
            logging_config=ray.train.LoggingConfig("INFO" if EVENTS_VARIABLE in os.environ else "CRITICAL"),
        ),
    )


def _causes(error: Exception) -> list[Exception]:
    """What a failed phase came from: the controller's error, or the workers'."""
    while isinstance(error, ray.train.ControllerError):
        error = error.controller_failure
    return list(getattr(error, "worker_failures", {}).values()) or [error]


def _is_final(error: Exception) -> bool:
    return final_error(_causes(error)) is not None


def plain(error: Exception, stage: str, rings: list[str], kills: dict[str, int]) -> PoseError:
    """The error a worker meant, if it was one of ours; else one line about what ended the phase.

    ``rings`` are the watchdogs' reasons to end ranks, ``kills`` what the board says of the nodes' kernels.
    """
    causes = _causes(error)
    for cause in causes:
        inner = getattr(cause, "cause", cause)
        if isinstance(inner, PoseError):
            return inner
    if rings:
        return ClusterError(
            f"{stage} failed more often than training.max_failures allows; the watchdog ended {rings[-1]}: see the "
            "stacks in its log; if nothing hangs, raise training.slow_step_seconds or training.longest_pause_seconds"
        )
    if killed := of_dead_worker(causes, kills):
        return killed
    reason = " ".join(str(causes[0]).split())
    return ClusterError(f"{stage} failed more often than training.max_failures allows: {reason[-300:]}")
