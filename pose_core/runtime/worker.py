"""The function every Ray Train worker runs: one rank of one phase, from its data to its last checkpoint."""

from __future__ import annotations

import itertools
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

from pose_core.data.clips import encode_mp4
from pose_core.evaluation.pictures import contact_sheet, side_by_side
from pose_core.inference.sampler import sample_generator
from pose_core.method.flow import euler
from pose_core.models.codec import WanCodec
from pose_core.models.folders import local_teacher
from pose_core.models.video_model import Condition
from pose_core.runtime.datasets import TRAINED_ON
from pose_core.runtime.phase_job import PhaseJob
from pose_core.settings import Settings
from pose_core.training import build, checkpoint, loop, parallel
from pose_core.training.state import Batch, Draws, Networks


def run_phase(config: dict[str, PhaseJob]) -> None:
    """One rank of a phase: build, restore, train, and on rank 0 write the averaged generator."""
    job = config["job"]
    settings = job.settings
    # FSDP warns that a view it returned must not be changed in place; nothing here does.
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
    if settings.training.threads_per_worker:
        torch.set_num_threads(settings.training.threads_per_worker)
    device = ray.train.torch.get_device()
    with tempfile.TemporaryDirectory() as scratch:
        networks = _networks(job, Path(scratch), device)
        turns = build.phase_turns(job.phase, settings)
        optimizers = loop.build_optimizers(networks, turns, settings.training.weight_decay)
        done = _restore(networks, optimizers)
        watch = _Watch(job, networks, optimizers, device, done)
        loop.train(
            networks,
            optimizers,
            turns,
            itertools.islice(_batches(settings, device), done, None),
            first_step=done,
            steps=job.steps,
            seed=settings.run.seed,
            gradient_clip=settings.training.gradient_clip,
            ema_decay=job.ema_decay,
            after_step=watch.after_step,
        )
        watch.finish()
        _write_result(job, networks, Path(scratch))


def _networks(job: PhaseJob, scratch: Path, device: torch.device) -> Networks:
    teacher = local_teacher(job.settings.model.teacher, job.settings.model.revision)
    generator = teacher
    if job.generator is not None:
        generator = scratch / "generator"
        job.generator.download_folder("generator", generator)
    null_text = torch.tensor(job.prepared.null_text()).to(device)
    networks = build.build_networks(job.phase, job.settings, teacher, generator, null_text, device=device)
    build.shard_networks(networks, job.settings)
    return networks


def _restore(networks: Networks, optimizers: dict[str, torch.optim.Optimizer]) -> int:
    """Go on from Ray Train's last checkpoint, if there is one; the number of finished steps."""
    found = ray.train.get_checkpoint()
    if found is None:
        return 0
    with found.as_directory() as folder:
        return checkpoint.load(Path(folder), networks, optimizers)


def _batches(settings: Settings, device: torch.device) -> Iterator[Batch]:
    """This rank's batches from the start of the run; a resumed phase skips those it has seen."""
    shard = ray.train.get_dataset_shard("train")
    batches = shard.iter_batches(
        batch_size=settings.training.batch_per_worker, batch_format="numpy", drop_last=True, prefetch_batches=2
    )
    for rows in batches:
        yield _to_batch(rows, device)


def _to_batch(rows: dict[str, Any], device: torch.device) -> Batch:
    columns = {name: torch.tensor(np.asarray(rows[name]), device=device) for name in TRAINED_ON if name in rows}
    return Batch(columns["latents"], Condition(columns["text"], columns.get("image"), columns.get("first_frame")))


class _Watch:
    """What happens between steps: curves, checkpoints, sample videos and the progress bar."""

    def __init__(
        self,
        job: PhaseJob,
        networks: Networks,
        optimizers: dict[str, torch.optim.Optimizer],
        device: torch.device,
        done: int,
    ):
        self.job, self.networks, self.optimizers, self.device = job, networks, optimizers, device
        self.settings = job.settings
        self.rank = parallel.rank()
        self.started, self.started_at = time.monotonic(), done
        self.pictures = _Pictures(job, networks, device)
        self.pictures.prepare()
        self._report(done, {})

    def after_step(self, step: int, values: dict[str, Tensor]) -> None:
        training = self.settings.training
        if step % self.settings.tracking.log_every_steps == 0 or step == self.job.steps:
            self._report(step, parallel.mean_over_ranks(values))
        if step % training.sample_every_steps == 0 and step < self.job.steps:
            self.pictures.log(step)
        if step % training.checkpoint_every_steps == 0 or step == self.job.steps:
            self._checkpoint(step)

    def finish(self) -> None:
        """The last samples; every curve is in MLflow when this returns."""
        self.pictures.log(self.job.steps)
        if self.rank == 0:
            self.job.tracker.flush()

    def _report(self, step: int, values: dict[str, float]) -> None:
        if self.rank != 0:
            return
        if values:
            seconds = (time.monotonic() - self.started) / max(step - self.started_at, 1)
            self.job.tracker.log_metrics(step, values | {"seconds_per_step": seconds})
        losses = {name.split("/")[0]: value for name, value in values.items() if name.endswith("/loss")}
        self.job.progress.update.remote(step, losses)

    def _checkpoint(self, step: int) -> None:
        if self.rank == 0:
            # A worker that dies takes its queued points along; those before a checkpoint are not made again.
            self.job.tracker.flush()
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(Path(folder), step, self.networks, self.optimizers)
            ray.train.report(
                {"step": step},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=f"step-{step:07d}",
            )


class _Pictures:
    """Sample videos on fixed held-out clips and noise: real, teacher and generator side by side."""

    def __init__(self, job: PhaseJob, networks: Networks, device: torch.device):
        self.job, self.networks = job, networks
        rows = job.prepared.heldout(job.settings.training.sample_clips)
        self.rows = rows
        columns = {name: torch.tensor(rows[name], device=device) for name in TRAINED_ON if name in rows}
        self.condition = Condition(columns["text"], columns.get("image"), columns.get("first_frame"))
        draws = Draws(job.settings.run.seed, 0, "validation", 0, 1, device)
        self.noise = draws.normal(columns["latents"])
        self.teacher: np.ndarray | None = None
        self.codec: WanCodec | None = None

    def prepare(self) -> None:
        """Sample the teacher once, to stand beside the generator in every picture; every rank takes part."""
        settings = self.job.settings
        with torch.no_grad():
            velocity = self.networks.v_real(self.condition, settings.evaluation.guidance)
            latents = euler(velocity, self.noise, settings.evaluation.teacher_steps, settings.model.timestep_shift)
        if parallel.rank() == 0:
            folder = local_teacher(settings.model.teacher, settings.model.revision)
            self.codec = WanCodec.load(folder, settings.data.text_tokens)
            self.teacher = _to_uint8(self.codec.decode(latents))

    def log(self, step: int) -> None:
        """Sample the averaged generator and log a contact sheet and a video; every rank takes part."""
        latents = sample_generator(self.networks.average, self.condition, [self.noise])
        if self.codec is None or self.teacher is None:
            return
        generated, real = _to_uint8(self.codec.decode(latents)), self.rows["video"]
        steps = self.job.settings.evaluation.teacher_steps
        rows = {"real": real, f"teacher, {steps} steps": self.teacher, "one step": generated}
        triples = zip(real, self.teacher, generated, strict=True)
        with tempfile.TemporaryDirectory() as scratch:
            picture, video = Path(scratch) / f"step-{step:05d}.png", Path(scratch) / f"step-{step:05d}.mp4"
            contact_sheet([(label, list(videos)) for label, videos in rows.items()], self.rows["prompt"]).save(picture)
            frames = np.concatenate([side_by_side(list(triple)) for triple in triples])
            video.write_bytes(encode_mp4(frames, self.job.settings.data.frames_per_second))
            self.job.tracker.log_file(picture, "samples")
            self.job.tracker.log_file(video, "samples")


def _to_uint8(video: np.ndarray) -> np.ndarray:
    return (video * 255).round().astype(np.uint8)


def _write_result(job: PhaseJob, networks: Networks, scratch: Path) -> None:
    """Rank 0 writes the averaged generator as a stock transformer folder; every rank takes part in the gather."""
    weights = parallel.gather_weights(networks.average.module)
    if parallel.rank() == 0:
        folder = scratch / "result" / "transformer"
        networks.average.save(folder, weights)
        job.artifact.upload_folder(folder.parent, "generator")
