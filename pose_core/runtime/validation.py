"""Fixed held-out clips and noise: what the teacher makes of them, once, and the generator, again and again."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pose_core.data.clips import encode_mp4
from pose_core.evaluation.monitors import monitor
from pose_core.evaluation.pictures import contact_sheet, side_by_side
from pose_core.inference.sampler import GeneratorTimes, sample_generator
from pose_core.method.flow import euler
from pose_core.models import families
from pose_core.models.video_model import Codec, Condition
from pose_core.runtime.datasets import TRAINED_ON
from pose_core.runtime.phase_job import PhaseJob
from pose_core.runtime.teachers import teacher_folder
from pose_core.training import parallel
from pose_core.training.state import Draws, Networks


class Validation:
    """Samples for a person to look at and figures for the alarms; every rank samples, rank 0 decodes.

    The first noise makes the pictures' ``training.sample_clips`` and the figures' ``alarms.clips``, a second one the
    other samples that diversity needs. The teacher's samples are made here, with the settings of the report.
    """

    def __init__(self, job: PhaseJob, networks: Networks, device: torch.device):
        self.job, self.networks = job, networks
        settings = job.settings
        self.times = GeneratorTimes.of(settings)
        self.pictured, self.monitored = settings.training.sample_clips, settings.alarms.clips
        if not settings.alarms.every_steps:
            self.monitored = 0
        self.rows = job.data.prepared.heldout("validation", max(self.pictured, self.monitored))
        columns = {name: torch.tensor(self.rows[name], device=device) for name in TRAINED_ON if name in self.rows}
        self.condition = Condition.of(columns)
        draws = Draws(settings.run.seed, 0, "validation", 0, device)
        self.noises = [draws.normal(columns["latents"][:clips]) for clips in (None, self.monitored) if clips != 0]
        self.codec: Codec | None = None
        if parallel.rank() == 0:
            folder = teacher_folder(settings.model)
            family = families.get(settings.model.family)
            self.codec = family.load_codec(folder, settings.data.text_tokens, only_video=True)
        self.teacher = [self._decode(self._teacher(noise)) for noise in self.noises]

    @property
    def teacher_figures(self) -> dict[str, float]:
        """What ``figures`` measures, of the teacher."""
        return self._figures(self.teacher)

    def figures(self) -> dict[str, float]:
        """Figures of the averaged generator, see ``evaluation/monitors.py``; none on ranks but 0. All must call it."""
        return self._figures([self._decode(self._generator(noise[: self.monitored])) for noise in self.noises])

    def log_pictures(self, step: int) -> None:
        """Log a contact sheet and a video: real, teacher and averaged generator; every rank must call it."""
        generated, shown = self._decode(self._generator(self.noises[0][: self.pictured])), self.pictured
        if generated is None or self.teacher[0] is None:
            return
        real, teacher, prompts = self.rows["video"][:shown], self.teacher[0][:shown], self.rows["prompt"][:shown]
        steps = self.job.settings.evaluation.teacher_steps
        rows = {"real": real, f"teacher, {steps} steps": teacher, "one step": generated}
        with tempfile.TemporaryDirectory() as scratch:
            picture, video = Path(scratch) / f"step-{step:05d}.png", Path(scratch) / f"step-{step:05d}.mp4"
            contact_sheet([(label, list(videos)) for label, videos in rows.items()], prompts).save(picture)
            triples = zip(real, teacher, generated, strict=True)
            frames = np.concatenate([side_by_side(list(triple)) for triple in triples])
            video.write_bytes(encode_mp4(frames, self.job.settings.data.frames_per_second))
            self.job.tracker.log_file(picture, "samples")
            self.job.tracker.log_file(video, "samples")

    def _generator(self, noise: Tensor) -> Tensor:
        return sample_generator(self.networks.average, self.condition.rows(slice(len(noise))), [noise], self.times)

    @torch.no_grad()
    def _teacher(self, noise: Tensor) -> Tensor:
        settings = self.job.settings
        velocity = self.networks.v_real(self.condition.rows(slice(len(noise))), settings.evaluation.guidance)
        return euler(velocity, noise, settings.evaluation.teacher_steps, settings.model.timestep_shift)

    def _decode(self, latents: Tensor) -> np.ndarray | None:
        """Videos ``[N, T, H, W, 3]`` uint8, on rank 0 only."""
        return None if self.codec is None else self.codec.decode_uint8(latents)

    def _figures(self, samples: list[np.ndarray | None]) -> dict[str, float]:
        videos = [video[: self.monitored] for video in samples if video is not None]
        if not self.monitored or not videos:
            return {}
        first, second = videos
        has_image = self.condition.first_frame is not None
        return monitor(first, second, self.rows["video"][: self.monitored, 0] if has_image else None)
