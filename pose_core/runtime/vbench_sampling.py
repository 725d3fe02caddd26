"""Samples a benchmark's prompts on Ray actors; every video is stored as it is made, so that a stopped run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
import torch
from PIL import Image
from ray.util import ActorPool

from pose_core.data.clips import encode_mp4, fit
from pose_core.errors import CheckpointError
from pose_core.evaluation.vbench import CROPS, Entry, seed_of, size_of
from pose_core.inference.sampler import GeneratorTimes, sample_generator, sample_teacher, teacher_evaluations
from pose_core.models.parts import clip_shapes
from pose_core.runtime import manifests
from pose_core.runtime.evaluating import Sampler
from pose_core.runtime.stage import StageRun
from pose_core.runtime.storage import Store
from pose_core.runtime.teachers import teacher_configs
from pose_core.settings import Settings

GENERATOR = "one_step"
SAMPLING = {"teacher_steps", "guidance", "few_steps", "few_steps_time_min", "few_steps_time_max"}
"""The evaluation's settings that decide what a video shows."""
MP4_QUALITY = 10
"""Constant rate factor, as VBench-I2V's sampling asks for."""


@dataclass(frozen=True)
class Job:
    """One video to make: which prompt and image, in which aspect ratio, with which of its seeds."""

    entry: Entry
    ratio: str
    index: int
    seed: int

    @property
    def key(self) -> str:
        """Where it lies below its way's folder; prompts can hold what keys cannot."""
        name = hashlib.sha256(json.dumps([self.entry.prompt, self.entry.image]).encode()).hexdigest()[:20]
        return f"{self.ratio}/{name}-{self.index}.mp4"

    @property
    def name(self) -> str:
        """What VBench looks for."""
        return f"{self.entry.prompt}-{self.index}.mp4"


def ways(settings: Settings) -> dict[str, int]:
    """Ways to sample, named with their network evaluations, and their steps: the teacher, then the generator."""
    evaluation = settings.evaluation
    steps = evaluation.teacher_steps
    nfe = teacher_evaluations(steps, evaluation.guidance)
    few = {f"generator_{count}_nfe": count for count in (1, *evaluation.few_steps)}
    return {f"teacher_{nfe}_nfe": steps} | few


def jobs(settings: Settings, entries: Iterable[Entry]) -> list[Job]:
    """Every video that is to be made each way."""
    vbench, seed = settings.vbench, settings.run.seed
    return [
        Job(entry, ratio, index, seed_of(seed, entry.prompt, ratio, index))
        for ratio in vbench.ratios
        for entry in entries
        for index in range(vbench.videos_per_prompt)
    ]


def videos_store(run: StageRun, images: Path, entries: Iterable[Entry]) -> Store:
    """Where the videos lie: named by all that decides them, so that whatever is there is right."""
    settings = run.settings
    digest = hashlib.sha256()
    for ratio in settings.vbench.ratios:
        for name in sorted({entry.image for entry in entries}):
            digest.update((images / CROPS / ratio / name).read_bytes())
    document = {
        "generator": manifests.fingerprint(manifests.STAGES["adversarial_equilibrium"], settings),
        "sampling": settings.evaluation.model_dump(mode="json", include=SAMPLING),
        "images": digest.hexdigest(),
    }
    identity = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]
    return run.root.child(manifests.run_prefix(settings)).child(f"{run.name}_videos/{identity}")


class SuiteSampler(Sampler):
    """An evaluation's models, put to a benchmark's prompts and images."""

    only_video = False

    def make(self, way: str, steps: int, size: tuple[int, int], batch: list[Job], images: list[np.ndarray], out: Store):
        """Sample one batch of one aspect ratio and store its videos; how many."""
        data, shift = self.settings.data, self.settings.model.timestep_shift
        frames = np.stack([fit(image, *size) for image in images])
        condition = self.codec.encode_condition([job.entry.prompt for job in batch], frames, data.frames)
        shape = latent_shape(self.settings, size)
        noises = [self._noises(job.seed, shape, 1 if way.startswith("teacher") else steps) for job in batch]
        stacked = [torch.stack(each).to(self.device) for each in zip(*noises, strict=True)]
        if way.startswith("teacher"):
            guidance = self.settings.evaluation.guidance
            with self.at_work(self.teacher) as model:
                latents = sample_teacher(model, condition, self.null_text, stacked[0], steps, guidance, shift)
        else:
            with self.at_work(self.generators[GENERATOR]) as model:
                latents = sample_generator(model, condition, stacked, GeneratorTimes.of(self.settings))
        for job, video in zip(batch, self.codec.decode_uint8(latents), strict=True):
            out.write_bytes(f"{way}/{job.key}", encode_mp4(video, data.frames_per_second, quality=MP4_QUALITY))
        return len(batch)

    @staticmethod
    def _noises(seed: int, shape: Sequence[int], count: int) -> list[torch.Tensor]:
        """On the CPU, so that they are the same on every machine; the first is the same for every way."""
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(*shape, generator=generator) for _ in range(count)]


def latent_shape(settings: Settings, size: tuple[int, int]) -> tuple[int, ...]:
    """Latents ``(C, T, h, w)`` of a video of ``size``, height and width."""
    data, task = settings.data, settings.model.task
    clip = {"frames": data.frames, "height": size[0], "width": size[1], "text_tokens": data.text_tokens}
    return clip_shapes(teacher_configs(settings.model), task=task, **clip).latents


def sizes(settings: Settings) -> dict[str, tuple[int, int]]:
    """Height and width of the videos of each aspect ratio."""
    data, step = settings.data, 4
    while True:
        try:
            latent_shape(settings, (step, step))
            break
        except CheckpointError:
            if step >= min(data.height, data.width):
                raise
            step *= 2
    return {ratio: size_of(ratio, data.height * data.width, step) for ratio in settings.vbench.ratios}


def sample_suite(
    run: StageRun,
    wanted: list[Job],
    images: Path,
    out: Store,
    null_text: np.ndarray,
    advance: Callable[[int, int], None],
) -> None:
    """Make every video of ``wanted`` each way that ``out`` does not hold yet."""
    settings = run.settings
    evaluation, size = settings.evaluation, sizes(settings)
    there, batches, done = set(out.list()), [], 0
    for way, steps in ways(settings).items():
        missing = [job for job in wanted if f"{way}/{job.key}" not in there]
        done += len(wanted) - len(missing)
        for ratio in settings.vbench.ratios:
            group = [job for job in missing if job.ratio == ratio]
            batches += [
                (way, steps, size[ratio], group[start : start + evaluation.batch_clips])
                for start in range(0, len(group), evaluation.batch_clips)
            ]
    total = len(wanted) * len(ways(settings))
    advance(done, total)
    if not batches:
        return
    actor = ray.remote(SuiteSampler).options(
        num_cpus=settings.training.cpus_per_worker, num_gpus=settings.training.gpus_per_worker
    )
    generators = {GENERATOR: run.artifact_of("adversarial_equilibrium")}
    actors = [actor.remote(settings, generators, null_text) for _ in range(min(evaluation.workers, len(batches)))]

    def send(actor, batch):
        way, steps, size, group = batch
        pictures = [_picture(images, job) for job in group]
        return actor.make.remote(way, steps, size, group, pictures, out)

    for count in ActorPool(actors).map_unordered(send, batches):
        done += count
        advance(done, total)
    for each in actors:
        ray.kill(each)


def _picture(images: Path, job: Job) -> np.ndarray:
    with Image.open(images / CROPS / job.ratio / job.entry.image) as image:
        return np.asarray(image.convert("RGB"))
