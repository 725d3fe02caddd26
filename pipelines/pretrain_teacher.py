"""Make the embedded domain's weights: the small video VAE and the image-to-video teacher that the demo distils.

    python pipelines/pretrain_teacher.py --out pipelines/configs/teachers/digits_i2v

takes about an hour on two cores, continues where it stopped, and writes a diffusers folder that stock
``WanImageToVideoPipeline.from_pretrained`` loads.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pose_core.data import moving_digits
from pose_core.models import small
from pose_core.models.codec import WanCodec
from pose_core.models.video_model import Condition
from pose_core.models.wan import Wan
from pose_core.training import pretraining

IMAGE_TOKENS = 5
TEXT_TOKENS = 16


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    prompts = [
        f"{'an' if name == 'eight' else 'a'} {name} moving {direction}"
        for name in moving_digits.DIGIT_NAMES
        for direction in moving_digits.DIRECTIONS
    ]
    pipeline = small.build_pipeline(prompts, arguments.seed)
    videos, texts = render_clips(arguments.clips, arguments.seed)
    with bars() as progress:
        train_vae(pipeline, videos, arguments, progress)
        train_teacher(pipeline, videos, texts, arguments, progress)
    save(pipeline, arguments.out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("pipelines/configs/teachers/digits_i2v"))
    parser.add_argument("--work", type=Path, default=Path(".pose/pretrain"), help="checkpoints and encoded clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="torch threads; results repeat for the same number")
    parser.add_argument("--clips", type=int, default=12288, help="training clips")
    parser.add_argument("--vae-steps", type=int, default=1200)
    parser.add_argument("--teacher-steps", type=int, default=7500)
    parser.add_argument("--batch", type=int, default=32)
    return parser.parse_args()


def render_clips(clips: int, seed: int) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    drawn = [moving_digits.draw_clip(rng) for _ in range(clips)]
    return np.stack([moving_digits.render(clip) for clip in drawn]), [clip.prompt for clip in drawn]


def train_vae(pipeline, videos: np.ndarray, arguments: argparse.Namespace, progress: Progress) -> None:
    """Train the VAE, then measure the mean and spread of its latents, which the transformer sees normalised."""
    vae = pipeline.vae
    codec = WanCodec(pipeline, TEXT_TOKENS)

    def loss(generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(videos), (8,), generator=generator)
        return pretraining.vae_loss(vae, codec._pixels(videos[rows.numpy()]))

    pretraining.fit(
        vae,
        loss,
        steps=arguments.vae_steps,
        learning_rate=2e-3,
        ema_decay=0.99,
        seed=arguments.seed,
        checkpoint=arguments.work / "vae.pt",
        progress=bar(progress, "VAE", arguments.vae_steps),
    )
    latents = codec.encode_video(videos[:256])
    vae.register_to_config(
        latents_mean=latents.mean(dim=(0, 2, 3, 4)).tolist(), latents_std=latents.std(dim=(0, 2, 3, 4)).tolist()
    )


def train_teacher(pipeline, videos, texts, arguments: argparse.Namespace, progress: Progress) -> None:
    codec = WanCodec(pipeline, TEXT_TOKENS)
    x_0, condition = encode_clips(codec, videos, texts, arguments.work / "encoded.pt", progress)
    null_text = codec.encode_text([""])
    model = Wan(pipeline.transformer, IMAGE_TOKENS)
    for block in model.blocks:
        block.compile()  # halves the time of a step on a CPU

    def loss(generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(x_0), (arguments.batch,), generator=generator)
        return pretraining.teacher_loss(model, x_0[rows], condition.rows(rows), null_text, generator)

    pretraining.fit(
        pipeline.transformer,
        loss,
        steps=arguments.teacher_steps,
        learning_rate=1e-3,
        ema_decay=0.999,
        seed=arguments.seed,
        checkpoint=arguments.work / "teacher.pt",
        progress=bar(progress, "teacher", arguments.teacher_steps),
    )


def encode_clips(codec: WanCodec, videos, texts, cache: Path, progress: Progress) -> tuple[torch.Tensor, Condition]:
    if not cache.is_file():
        report = bar(progress, "encoding", len(videos))
        latents, conditions = [], []
        for start in range(0, len(videos), 64):
            rows = slice(start, start + 64)
            latents.append(codec.encode_video(videos[rows]))
            conditions.append(codec.encode_condition(texts[rows], videos[rows, 0], videos.shape[1]))
            report(min(start + 64, len(videos)), 0.0)
        parts = [torch.cat([getattr(c, name) for c in conditions]) for name in ("text", "image", "first_frame")]
        torch.save([torch.cat(latents), *parts], cache)
    latents, *parts = torch.load(cache, weights_only=True)
    return latents, Condition(*parts)


def save(pipeline, out: Path) -> None:
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    print(f"wrote {out}")


def bars() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[loss]}"))


def bar(progress: Progress, name: str, total: int) -> pretraining.Progress:
    task = progress.add_task(name, total=total, loss="")
    return lambda done, loss: progress.update(task, completed=done, loss=f"loss {loss:.4f}")


if __name__ == "__main__":
    main()
