"""How much faster is one step? The teacher's 50 guided Euler steps against one generator step, batch 1, on the CPU.

Both run through the sampling code the program uses, in one process, on one torch thread. The one-step calls are spread
through the teacher's run, one before each of its steps, and its clock stands still meanwhile: whatever slows the
machine down slows both. Without --model the teacher's own transformer stands in for the generator, which has the same
architecture: how long one evaluation takes does not depend on the weights.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median
from time import perf_counter
from typing import cast

import numpy as np
import torch
from figures import Figure, record, show
from PIL import Image
from torch import Tensor

from pose_core.errors import CheckpointError, PoseError
from pose_core.inference.sampler import OneStepSampler, sample_generator, sample_teacher
from pose_core.models.codec import WanCodec
from pose_core.models.folders import find_folder
from pose_core.models.video_model import Condition, VideoModel
from pose_core.runtime.cli import positive_int
from pose_core.settings import Settings

STEPS = 50
GUIDANCE = 2.0  # any scale but 1 costs two evaluations a step
TIMESTEP_SHIFT = 1.0  # moves the times of the steps, not their number
BAR = 95.0  # of the 2 * STEPS = 100 that the evaluations alone allow
END_TO_END_EVERY = 10
WARM_UP_STEPS = 5
PROMPT = "a red seven moving left fast in front of a green two"


@dataclass(frozen=True)
class Clip:
    """One clip for one model: what a person gives, and what the encoders make of it."""

    sampler: OneStepSampler
    first_frames: np.ndarray | None
    frames: int
    noise: Tensor
    condition: Condition

    @property
    def codec(self) -> WanCodec:
        return wan_codec(self.sampler)

    def encode(self) -> Condition:
        """Prompt and first frame to the condition."""
        return self.codec.encode_condition([PROMPT], self.first_frames, self.frames)

    def denoise(self) -> Tensor:
        """Noise to latents in one step."""
        return sample_generator(self.sampler.model, self.condition, [self.noise], self.sampler.times)

    def generate(self) -> np.ndarray:
        """Prompt, first frame and noise to a video, in one step."""
        return self.sampler([PROMPT], self.first_frames, [self.noise])

    def encode_text_and_image(self) -> None:
        """What conditions the cross-attention: the prompt's and the first frame's embeddings."""
        self.codec.encode_text([PROMPT])
        if self.first_frames is not None:
            with torch.no_grad():
                self.codec.pipeline.encode_image([Image.fromarray(frame) for frame in self.first_frames])

    def encode_first_frame(self) -> None:
        """What conditions the transformer's input: the first frame and grey ones behind it, through the VAE."""
        if self.first_frames is not None:
            grey = np.full_like(self.first_frames, 127)
            self.codec.encode_video(np.stack([self.first_frames, *[grey] * (self.frames - 1)], axis=1))


class Interrupted:
    """The teacher, which lets ``work(step)`` go first at each of its steps and counts the seconds that takes."""

    def __init__(self, model: VideoModel, work: Callable[[int], None]):
        self.model, self.work = model, work
        self.evaluations = 0
        self.seconds = 0.0

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition, told: Tensor | None = None) -> Tensor:
        """The teacher's velocity; a step is two of these, guided and not."""
        step, second = divmod(self.evaluations, 2)
        if not second:
            self.seconds += seconds(lambda: self.work(step))
        self.evaluations += 1
        return self.model.velocity(x_t, t, condition, told)


def main() -> None:
    arguments = parse_arguments()
    try:
        run(arguments)
    except PoseError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename or ''}", file=sys.stderr)
        raise SystemExit(1) from None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings = Settings()
    parser.add_argument(
        "--teacher",
        metavar="FOLDER",
        default=settings.model.teacher,
        help="diffusers folder of the teacher (default: %(default)s, which comes with the project)",
    )
    parser.add_argument("--model", metavar="FOLDER", help="exported one-step folder (default: the teacher's weights)")
    for name in ("frames", "height", "width"):
        unit = "frames of the clip" if name == "frames" else f"{name} of the clip in pixels"
        default = getattr(settings.data, name)
        parser.add_argument(f"--{name}", type=positive_int, default=default, help=f"{unit} (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=positive_int, default=10, help="teacher runs; figures are medians (default: %(default)s)"
    )
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results/one_step_latency.json")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    """Measure, print and, where asked for, record.

    Raises:
        PoseError: a folder is missing or incomplete, or the clip's size does not fit the model.
    """
    load_average = os.getloadavg()[0]
    torch.set_num_threads(1)
    teacher = prepare(arguments, "teacher", load(arguments.teacher, "teacher"))
    generator = prepare(arguments, "model", load(arguments.model, "model")) if arguments.model else teacher
    conditions = {
        "teacher": arguments.teacher,
        "model": arguments.model or "the teacher's own transformer: the latency does not depend on the weights",
        "clip": f"{arguments.frames} frames of {arguments.height} x {arguments.width}, batch 1",
        "sampling": f"{STEPS} Euler steps with guidance against one step, interleaved",
        "torch_threads": torch.get_num_threads(),
    }
    print(*(f"{name}: {value}" for name, value in conditions.items()), sep="\n", file=sys.stderr, flush=True)
    measure(teacher, generator, WARM_UP_STEPS)
    figures = summarise([measure(teacher, generator) for _ in range(arguments.repeats)])
    show(figures)
    if arguments.record:
        path = record("one_step_latency", figures, conditions, load_average)
        print(f"recorded in {path}", file=sys.stderr)


def load(name: str, option: str) -> OneStepSampler:
    """The models of the folder that ``--option`` names."""
    folder = find_folder(name)
    if folder is None:
        raise CheckpointError(f"--{option} {name} is no folder: name a complete diffusers folder", in_call=True)
    return OneStepSampler.load(folder, Settings().data.text_tokens)


def prepare(arguments: argparse.Namespace, option: str, sampler: OneStepSampler) -> Clip:
    """A clip of the size asked for; what it shows costs the same as any other."""
    frames, height, width = arguments.frames, arguments.height, arguments.width
    try:
        noise = sampler.noise(1, frames, height, width, seed=0)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace("data.", "--"), in_call=True) from None
    picture = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    first_frames = picture if wan_codec(sampler).has_image else None
    condition = sampler.codec.encode_condition([PROMPT], first_frames, frames)
    return Clip(sampler, first_frames, frames, noise, condition)


def wan_codec(sampler: OneStepSampler) -> WanCodec:
    """The sampler's codec, whose parts are timed one by one.

    Raises:
        CheckpointError: the folder is of another family (correctable in the call).
    """
    if not isinstance(sampler.codec, WanCodec):
        raise CheckpointError(f"{sampler.folder} is of another family: the parts of Wan models are timed", in_call=True)
    return sampler.codec


def measure(teacher: Clip, generator: Clip, steps: int = STEPS) -> dict[str, float]:
    """Seconds of each part in one run of the teacher, and of the one-step calls within it (their means)."""
    one_step: list[float] = []
    end_to_end: list[float] = []

    def between_steps(step: int) -> None:
        # The whole video goes first: the caches it leaves cold then cost the one step, never the teacher.
        if step % END_TO_END_EVERY == 0:
            end_to_end.append(seconds(generator.generate))
        one_step.append(seconds(generator.denoise))

    model = Interrupted(teacher.sampler.model, between_steps)
    started = perf_counter()
    condition, null_text = teacher.encode(), teacher.codec.encode_text([""])
    encoded = perf_counter()
    latents = sample_teacher(
        cast(VideoModel, model), condition, null_text, teacher.noise, steps, GUIDANCE, TIMESTEP_SHIFT
    )
    denoised = perf_counter()
    teacher.codec.decode(latents)
    decoded = perf_counter()
    return {
        "text_and_image_encoding": seconds(generator.encode_text_and_image),
        "first_frame_latents": seconds(generator.encode_first_frame),
        "one_step_denoising": fmean(one_step),
        "teacher_denoising": denoised - encoded - model.seconds,
        "decode": decoded - denoised,
        "one_step_end_to_end": fmean(end_to_end),
        "teacher_end_to_end": decoded - started - model.seconds,
    }


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    started = perf_counter()
    work()
    return perf_counter() - started


def summarise(runs: list[dict[str, float]]) -> list[Figure]:
    """The figures, medians over the runs; a ratio is taken within each run first."""

    def ratio(part: str) -> float:
        return median(run[f"teacher_{part}"] / run[f"one_step_{part}"] for run in runs)

    return [
        Figure("denoise_ratio", ratio("denoising"), "x", BAR, len(runs)),
        Figure("end_to_end_ratio", ratio("end_to_end"), "x", None, len(runs)),
        *(Figure(f"{part}_seconds", median(run[part] for run in runs), "s", None, len(runs)) for part in runs[0]),
    ]


if __name__ == "__main__":
    main()
