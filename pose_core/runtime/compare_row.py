"""One row of a comparison, in a process of its own with one thread: train, sample, score, write.

A row's result is one JSON file, written last; beside it lie the trained generator and a few of its videos.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pose_core.evaluation.monitors import diversity
from pose_core.evaluation.scoring import scorer
from pose_core.inference.sampler import GeneratorTimes, sample_generator, sample_teacher, teacher_evaluations
from pose_core.models import wan
from pose_core.models.codec import WanCodec
from pose_core.models.folders import local_teacher
from pose_core.models.video_model import Condition
from pose_core.runtime.compare_clips import Heldout, read_heldout, read_training
from pose_core.runtime.local_files import partial_name, replace_folder, write_whole
from pose_core.settings import Settings
from pose_core.training.local import Advance, train_method
from pose_core.training.state import Draws

POSE, TEACHER, REAL = "pose", "teacher", "real"
FIGURES = ("SA", "TC", "FQ", "mean", "motion", "first_frame_psnr")
SHARE_OF_TRAINING = 0.9
"""Of a row's progress bar; the rest is sampling."""

Sample = Callable[[Condition, list[Tensor]], Tensor]
"""Latents ``[B, C, T, H, W]`` for a condition, from one noise of that shape or more."""


@dataclass(frozen=True)
class RowJob:
    """What a row's process is told."""

    method: str
    table: str
    """``updates`` or ``time``; ``reference`` for the teacher and the real clips."""
    settings: Settings
    """The comparison's settings with the row's own and its seed."""
    folder: Path
    """Where clips are and results go."""
    split: str
    data_key: str
    """Identity of the clips and of the weights that the row starts from."""
    seconds: dict[str, float] | None = None
    """CPU seconds by phase that end the training, in place of the settings' steps."""

    @property
    def name(self) -> str:
        return f"{self.method}-{self.table}-{self.settings.run.seed}"

    @property
    def result(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def videos(self) -> Path:
        """An npz of a few videos ``[N, T, H, W, 3]`` uint8 by ``nfe_<evaluations>``."""
        return self.folder / f"{self.name}.npz"

    @property
    def trained(self) -> Path:
        """Folder of the trained generator, ``transformer/``, and of ``training.json``, its costs and curves."""
        return self.folder / self.name

    def training_key(self) -> str:
        """Identity of the trained generator."""
        sections = {"model", "method", "training", "priming", "equilibrium", "rivals"}
        return _digest(self.data_key, self.settings.run.seed, self.seconds, _dump(self.settings, sections))

    def key(self) -> str:
        """Identity of the result: of what it was trained to, where it was trained, and of how it was scored."""
        trained = "" if self.table == "reference" else self.training_key()
        sections = _dump(self.settings, {"model", "evaluation"})
        return _digest(trained, self.data_key, self.settings.run.seed, self.split, sections)

    def read(self) -> dict[str, Any] | None:
        """The result, if it is there and was made by a job like this one."""
        return _read_marked(self.result, self.key())


def run_row(job: RowJob, advance: Advance) -> None:
    """Make the job's result; a generator that an earlier attempt has trained is not trained again."""
    torch.set_num_threads(1)
    # Each process would repeat what diffusers says of every move of a network, between the lines of the rows.
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    heldout = read_heldout(job.folder, job.split, job.settings.evaluation.clips)
    if job.method == REAL:
        rows, videos = [_real(job, heldout)], {"real": heldout.videos}
    elif job.method == TEACHER:
        rows, videos = _teacher(job, heldout, advance)
    else:
        rows, videos = _generator(job, heldout, _train(job, advance))
    shown = io.BytesIO()
    few: dict[str, Any] = {name: made[: job.settings.evaluation.sheet_clips] for name, made in videos.items()}
    np.savez_compressed(shown, **few)
    write_whole(job.videos, shown.getvalue())
    _write_json(job.result, {"key": job.key(), "rows": rows})


def _train(job: RowJob, advance: Advance) -> dict[str, Any]:
    """What the training took; the generator is in the job's folder when this returns."""
    done = _read_marked(job.trained / "training.json", job.training_key())
    if done is not None:
        return done
    clips, null_text = read_training(job.folder)
    out = partial_name(job.trained)
    try:
        trained = train_method(
            job.settings,
            _teacher_folder(job.settings),
            null_text,
            clips,
            out,
            seconds=job.seconds,
            advance=lambda share: advance(SHARE_OF_TRAINING * share),
        )
        done = {"key": job.training_key(), **vars(trained)}
        _write_json(out / "training.json", done)
        replace_folder(out, job.trained)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return done


def _generator(
    job: RowJob, heldout: Heldout, trained: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """A row for one step and, of POSE, for two and four."""
    model = wan.load(job.trained, image_tokens=wan.count_image_tokens(_teacher_folder(job.settings)))
    model.module.eval()
    costs = {"updates": trained["updates"], "cpu_seconds": round(sum(trained["cpu_seconds"].values()), 2)}
    times = GeneratorTimes.of(job.settings)
    rows, videos = [], {}
    for steps in (1, 2, 4) if job.method == POSE else (1,):
        row, made = _row(job, heldout, steps, steps, partial(sample_generator, model, times=times))
        rows.append(row | costs)
        videos[f"nfe_{steps}"] = made
    return rows, videos


def _teacher(job: RowJob, heldout: Heldout, advance: Advance) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """A row for the teacher's many steps, for four and for one; guidance takes two evaluations a step.

    The single step goes without: it is what one evaluation of the teacher gives.
    """
    settings = job.settings
    evaluation, shift = settings.evaluation, settings.model.timestep_shift
    model = wan.load(_teacher_folder(settings))
    model.module.eval()
    _, null_text = read_training(job.folder)
    rows, videos = [], {}
    for steps in dict.fromkeys((evaluation.teacher_steps, 4, 1)):
        guidance = 1.0 if steps == 1 else evaluation.guidance

        def sample(
            condition: Condition, noises: list[Tensor], steps: int = steps, guidance: float = guidance
        ) -> Tensor:
            return sample_teacher(model, condition, null_text, noises[0], steps, guidance, shift)

        nfe = teacher_evaluations(steps, guidance)
        row, videos[f"nfe_{nfe}"] = _row(job, heldout, nfe, 1, sample)
        rows.append(row)
        advance(len(rows) / 3)
    return rows, videos


def _real(job: RowJob, heldout: Heldout) -> dict[str, Any]:
    return _empty_row(REAL) | _figures(job.settings, heldout, heldout.videos)


def _row(job: RowJob, heldout: Heldout, nfe: int, noises: int, sample: Sample) -> tuple[dict[str, Any], np.ndarray]:
    """Figures and videos of one way to sample; every row of a seed gets the same noises."""
    videos, others = (_videos(job, heldout, noises, sample, label) for label in ("evaluation", "diversity"))
    row = _empty_row(job.method) | {"nfe": nfe, "seed": job.settings.run.seed, "diversity": diversity(videos, others)}
    return row | _figures(job.settings, heldout, videos), videos


def _empty_row(method: str) -> dict[str, Any]:
    names = ("nfe", "seed", "updates", "cpu_seconds", *FIGURES, "diversity")
    return {"method": method} | dict.fromkeys(names)


def _videos(job: RowJob, heldout: Heldout, noises: int, sample: Sample, label: str) -> np.ndarray:
    """Videos ``[N, T, H, W, 3]`` uint8 of all clips; the first noise is the one that ``evaluate`` draws."""
    settings, device = job.settings, torch.device("cpu")
    codec = WanCodec.load(_teacher_folder(settings), settings.data.text_tokens, only_video=True)
    made = []
    for index, start in enumerate(range(0, len(heldout.prompts), settings.evaluation.batch_clips)):
        clips = slice(start, start + settings.evaluation.batch_clips)
        latents = heldout.batch.x_0[clips]
        labels = [label, *(f"{label}/{step}" for step in range(1, noises))]
        drawn = [Draws(settings.run.seed, index, each, 0, device).normal(latents) for each in labels]
        made.append(codec.decode_uint8(sample(heldout.batch.condition.rows(clips), drawn)))
    return np.concatenate(made)


def _figures(settings: Settings, heldout: Heldout, videos: np.ndarray) -> dict[str, float]:
    first_frames = heldout.videos[:, 0] if settings.model.task == "i2v" else None
    return scorer(settings.evaluation.judge, heldout.prompts, first_frames, heldout.reference)(videos)


def _teacher_folder(settings: Settings) -> Path:
    return local_teacher(settings.model.teacher, settings.model.revision)


def _dump(settings: Settings, sections: set[str]) -> dict[str, Any]:
    return settings.model_dump(mode="json", include=sections)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_whole(file, (json.dumps(content, indent=1) + "\n").encode())


def _read_marked(file: Path, key: str) -> dict[str, Any] | None:
    """The JSON in ``file`` if it is there and carries ``key``."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return content if content.get("key") == key else None
