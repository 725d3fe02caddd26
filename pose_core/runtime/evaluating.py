"""Samples held-out prompts on Ray actors: the teacher with many steps and with one, the generator with one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.util import ActorPool

from pose_core.evaluation import motion
from pose_core.evaluation.report import summarise, write_report
from pose_core.evaluation.scoring import scorer, with_reference
from pose_core.inference.sampler import GeneratorTimes, sample_generator, sample_teacher
from pose_core.models import families
from pose_core.models.video_model import Condition, StockModel
from pose_core.runtime.datasets import TRAINED_ON
from pose_core.runtime.preparing import open_prepared
from pose_core.runtime.stage import StageRun
from pose_core.runtime.storage import Store
from pose_core.runtime.teachers import teacher_folder
from pose_core.settings import Settings
from pose_core.training.parallel import PRECISIONS
from pose_core.training.state import Draws

MOTION_CLIPS = 32
"""Clips of each way to sample that motion is measured on: seconds each, where they are large."""


class Sampler:
    """Holds the models of an evaluation; samples one batch of held-out rows at a time."""

    only_video = True
    """Prompts and first frames come encoded: text and image encoders, far larger than the VAE, are not held."""

    def __init__(self, settings: Settings, generators: dict[str, Store], null_text: np.ndarray):
        self.settings = settings
        if settings.training.threads_per_worker:
            torch.set_num_threads(settings.training.threads_per_worker)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        teacher = teacher_folder(settings.model)
        family = families.get(settings.model.family)
        self.codec = family.load_codec(teacher, settings.data.text_tokens, str(self.device), only_video=self.only_video)
        self.null_text = torch.tensor(null_text, device=self.device)
        self.dtype = PRECISIONS[settings.training.precision]
        self.teacher = self._ready(family.load_teacher(teacher, dtype=self.dtype))
        self.generators = {}
        for name, store in generators.items():
            with tempfile.TemporaryDirectory() as folder:
                store.download_folder("generator", Path(folder) / "generator")
                loaded = family.load_generator(Path(folder) / "generator", teacher, dtype=self.dtype)
                self.generators[name] = self._ready(loaded)

    def _ready(self, model: StockModel) -> StockModel:
        model.compute_dtype = self.dtype
        model.module.eval()
        return model

    @contextmanager
    def at_work(self, model: StockModel) -> Iterator[StockModel]:
        """Inside, the model is on this process's device; the others wait beside it: not every GPU holds all of them."""
        model.module.to(self.device)
        try:
            yield model
        finally:
            model.module.to("cpu")

    def sample(self, index: int, rows: dict[str, np.ndarray]) -> tuple[int, dict[str, np.ndarray]]:
        """Videos ``[B, T, H, W, 3]`` uint8 of batch ``index`` by how they were made, all from the same noise."""
        columns = {name: torch.tensor(rows[name], device=self.device) for name in TRAINED_ON if name in rows}
        condition = Condition.of(columns)
        draws = Draws(self.settings.run.seed, index, "evaluation", 0, self.device)
        noises = [draws.normal(columns["latents"]) for _ in range(max((1, *self.settings.evaluation.few_steps)))]
        noise = noises[0]
        evaluation, shift = self.settings.evaluation, self.settings.model.timestep_shift
        many, guidance = evaluation.teacher_steps, evaluation.guidance
        times = GeneratorTimes.of(self.settings)
        with self.at_work(self.teacher) as model:
            latents = {
                f"teacher_{many}_steps": sample_teacher(model, condition, self.null_text, noise, many, guidance, shift),
                # Without guidance: what one evaluation of the teacher gives.
                "teacher_1_step": sample_teacher(model, condition, self.null_text, noise, 1, 1.0, shift),
            }
        for name, generator in self.generators.items():
            with self.at_work(generator) as model:
                latents[name] = sample_generator(model, condition, [noise], times)
                for steps in evaluation.few_steps if name == "one_step" else ():
                    latents[f"{steps}_steps"] = sample_generator(model, condition, noises[:steps], times)
        return index, {name: self.codec.decode_uint8(value) for name, value in latents.items()}


SamplingActor = ray.remote(Sampler)


def sample_heldout(
    rows: dict[str, Any],
    settings: Settings,
    generators: dict[str, Store],
    null_text: np.ndarray,
    advance: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """Videos of every way to sample, in the rows' order; ``advance`` is told how many clips are done."""
    evaluation = settings.evaluation
    size, total = evaluation.batch_clips, len(rows["key"])
    starts = range(0, total, size)
    gpus = settings.training.gpus_per_worker
    actor = SamplingActor.options(num_cpus=settings.training.cpus_per_worker, num_gpus=gpus)  # type: ignore[attr-defined]
    actors = [actor.remote(settings, generators, null_text) for _ in range(min(evaluation.workers, len(starts)))]
    batches = [(index, _rows(rows, slice(start, start + size))) for index, start in enumerate(starts)]
    done: dict[int, dict[str, np.ndarray]] = {}
    for index, videos in ActorPool(actors).map_unordered(lambda a, batch: a.sample.remote(*batch), batches):
        done[index] = videos
        advance(min(len(done) * size, total))
    return {name: np.concatenate([done[index][name] for index in sorted(done)]) for name in done[0]}


def _rows(rows: dict[str, Any], chosen: slice) -> dict[str, np.ndarray]:
    return {name: rows[name][chosen] for name in TRAINED_ON if name in rows}


def evaluate_generators(run: StageRun) -> None:
    """Sample, score and report: ``<run>/evaluate/report/`` and the same files in MLflow.

    ``evaluation.clips`` held-out clips are generated; the real clips behind them are scored against as many others, so
    that "real" is measured and not assumed.
    """
    settings = run.settings
    prepared = open_prepared(run)
    rows = prepared.heldout("test", 2 * settings.evaluation.clips)
    count = min(settings.evaluation.clips, len(rows["key"]))
    generated = {name: cells[:count] for name, cells in rows.items()}
    real, reference = with_reference(rows["video"], count)
    generators = {"primed_1_step": "stability_priming", "one_step": "adversarial_equilibrium"}
    stores = {name: run.artifact_of(stage) for name, stage in generators.items()}
    videos = {"real": real} | sample_heldout(
        generated,
        settings,
        stores,
        prepared.null_text(),
        lambda done: run.display.update(run.name, done, count),
    )
    first_frames = real[:, 0] if settings.model.task == "i2v" else None
    score = scorer(settings.evaluation.judge, generated["prompt"], first_frames, reference)
    figures = {name: score(made) for name, made in videos.items()}
    summary = summarise(figures, {"name": settings.run.name, "seed": settings.run.seed, "clips": count})
    rate = settings.data.frames_per_second
    summary["motion"] = {}
    for done, (way, made) in enumerate(videos.items(), start=1):
        starts = [None] * len(made) if first_frames is None else first_frames
        clips = list(zip(made, starts, strict=True))[:MOTION_CLIPS]
        summary["motion"][way] = motion.summarise(motion.measure(video, rate, start) for video, start in clips)
        run.display.update("measuring motion", done, len(videos))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        write_report(report, summary, videos, generated["prompt"], settings.evaluation.sheet_clips, rate)
        run.artifact.upload_folder(report, "report")
        run.tracker.log_folder(report, "report")
    run.metrics |= {f"{way}/{name}": value for way, row in figures.items() for name, value in row.items()}
