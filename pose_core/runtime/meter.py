"""What a rank's steps cost: their time by part, clips and tokens a second, utilisation, memory, and a trace."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from pose_core.data.buckets import Bucket
from pose_core.models.parts import clip_shapes
from pose_core.runtime.phase_job import PhaseJob
from pose_core.runtime.planned_flops import start_counting
from pose_core.runtime.teachers import teacher_folder
from pose_core.training import collectives, parallel
from pose_core.training.devices import peak_teraflops
from pose_core.training.loop import updated_by
from pose_core.training.state import Networks
from pose_core.training.telemetry import MEMORY_ROLES, NOT_TRAINING, PARTS, Memory, StepTimes, clock_of
from pose_core.training.turns import Turn

GIBIBYTE = 2**30
SECONDS, MEMORY = "step_seconds", "memory_gibibytes"
VIDEOS, TOKENS, UTILISATION = "videos_per_second", "tokens_per_second", "model_flops_utilisation"


class Meter:
    """Follows the steps of one rank; ``measured`` and ``rates`` are what is worth a curve since they were last asked.

    Enter it around the training: collectives are recorded inside, and what was begun is ended.
    """

    def __init__(
        self,
        job: PhaseJob,
        networks: Networks,
        optimizers: dict[str, torch.optim.Optimizer],
        turns: list[Turn],
        device: torch.device,
    ):
        self.job, self.device = job, device
        self.times = StepTimes(clock_of(device))
        groups = networks.groups()
        self.memory = Memory(networks, optimizers, [updated_by(turn, groups) for turn in turns], device)
        self.data_ranks = networks.mesh.data_ranks if networks.mesh else parallel.ranks()
        self.first_profiled, self.last_profiled = job.settings.tracking.profile_steps or (0, 0)
        self.profile: torch.profiler.profile | None = None
        self.buckets: Counter[str] = Counter()
        self.tokens: dict[str, int] = {}
        self.flops: dict[str, Any] = {}
        self.taken = 0, dict.fromkeys(PARTS, 0.0)
        self.peak = self._peak()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Inside, waiting for other ranks is told apart, and what was begun is ended with it."""
        with ExitStack() as stack:
            stack.enter_context(collectives.recorded(self.record, self.device))
            stack.callback(self._stop_profile)
            yield

    @contextmanager
    def record(self, part: str) -> Iterator[None]:
        """A ``Record`` for the loop; a trace bears its names."""
        with ExitStack() as stack:
            stack.enter_context(self.times.part(part))
            if self.profile is not None:
                stack.enter_context(torch.profiler.record_function(f"pose::{part}"))
            yield

    def begin_step(self, step: int, bucket: str) -> None:
        """Step number ``step``, of those that begin with 1, takes clips of this bucket."""
        self.buckets[bucket] += 1
        self.memory.begin_step()
        if bucket not in self.tokens:
            self.tokens[bucket] = self._tokens(bucket)
            if self.peak and parallel.rank() == 0:
                self.flops[bucket] = start_counting(self.job.phase, self.job.settings, self._bucket(bucket))
        if step == self.first_profiled and parallel.rank() == 0:
            self._start_profile()

    def end_step(self, step: int) -> bool:
        """The step has ended; what follows on it, checkpoints and validation, counts towards the next.

        Whether rank 0 has a trace to write, for which the others wait.
        """
        self.memory.end_step()
        if self.profile is not None and step == self.last_profiled:
            with self.times.part("trace"):
                self._store_profile()
        self.times.end_step()
        return step == self.last_profiled

    def measured(self) -> dict[str, Tensor]:
        """Seconds of a step by part and gibibytes by role, of this rank, as scalars; the same names on every rank."""
        self.taken = self.times.take()
        steps, seconds = max(self.taken[0], 1), self.taken[1]
        held = self.memory.roles()
        values = {f"{SECONDS}/{part}": seconds[part] / steps for part in PARTS}
        values |= {f"{MEMORY}/{role}": held[role] / GIBIBYTE for role in MEMORY_ROLES}
        return {name: torch.tensor(value, dtype=torch.float32, device=self.device) for name, value in values.items()}

    def rates(self) -> dict[str, float]:
        """All ranks' clips and tokens a second, and utilisation where it is known, as far as ``measured`` has looked.

        Checkpoints, validation and storing traces are not in the seconds.
        """
        buckets, self.buckets = self.buckets, Counter()
        seconds = sum(value for part, value in self.taken[1].items() if part not in NOT_TRAINING)
        steps, seen = self.taken[0], buckets.total()
        if not steps or not seen or not seconds:
            return {}
        # A GPU's times are known a step later than its batches.
        clips = self.data_ranks * self.job.settings.training.batch_per_worker * steps / seen / seconds
        found = {
            VIDEOS: clips * seen,
            TOKENS: clips * sum(count * self.tokens[bucket] for bucket, count in buckets.items()),
        }
        flops = [self._flops(bucket) for bucket in buckets]
        if self.peak and all(flops):
            computed = sum(count * each for count, each in zip(buckets.values(), flops, strict=True)) * steps / seen
            found[UTILISATION] = computed / seconds / (self.peak * 1e12)
        return found

    def beside_the_bar(self, rates: dict[str, float]) -> dict[str, float]:
        """What a person sees of it: rates, and of which parts a step's time is made, in percent."""
        names = {VIDEOS: "videos/s", TOKENS: "tokens/s", UTILISATION: "mfu"}
        shown = {names[name]: value for name, value in rates.items()}
        whole = sum(self.taken[1].values())
        return shown | {f"{part}%": round(100 * value / whole, 1) for part, value in self.taken[1].items() if whole}

    def _peak(self) -> float | None:
        settings = self.job.settings
        if settings.tracking.device_teraflops or self.device.type != "cuda":
            return settings.tracking.device_teraflops or None
        return peak_teraflops(torch.cuda.get_device_name(self.device), settings.training.precision)

    def _bucket(self, name: str) -> Bucket:
        data = self.job.settings.data
        if not name:  # there is only one
            return Bucket(data.frames, data.height, data.width, data.frames_per_second)
        return Bucket.named(name, data.frames_per_second)

    def _tokens(self, name: str) -> int:
        bucket, settings = self._bucket(name), self.job.settings
        size = {"frames": bucket.frames, "height": bucket.height, "width": bucket.width}
        folder, task = teacher_folder(settings.model), settings.model.task
        return clip_shapes(folder, text_tokens=settings.data.text_tokens, task=task, **size).tokens

    def _flops(self, bucket: str) -> Any:
        """What the planner has counted by now; it may still be at it."""
        found = self.flops.get(bucket)
        if isinstance(found, ray.ObjectRef) and ray.wait([found], timeout=0)[0]:
            try:
                self.flops[bucket] = ray.get(found)
            except ray.exceptions.RayError:
                self.flops[bucket] = None
        return None if isinstance(self.flops.get(bucket), ray.ObjectRef) else self.flops.get(bucket)

    def _start_profile(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profile = torch.profiler.profile(activities=activities, profile_memory=True, record_shapes=True)
        self.profile.start()

    def _store_profile(self) -> None:
        assert self.profile is not None
        self.profile.stop()
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / f"steps-{self.first_profiled:07d}-{self.last_profiled:07d}.json.gz"
            self.profile.export_chrome_trace(str(file))
            self.job.artifact.write_bytes(f"traces/{file.name}", file.read_bytes())
            self.job.tracker.log_file(file, "traces")
        self.job.board.note(f"traced {file.name}: open {self.job.artifact.url('traces')} in Perfetto")
        self.profile = None

    def _stop_profile(self) -> None:
        """After an error; a trace of half the steps is nothing to keep."""
        if self.profile is not None:
            self.profile.stop()
            self.profile = None
