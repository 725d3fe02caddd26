"""Make the embedded domain's weights: the small video VAE and the teacher, image or text to video, to be distilled.

    python pipelines/pretrain_teacher.py --task i2v --out pipelines/configs/teachers/digits_i2v

takes hours on one core, continues where it stopped, and writes a diffusers folder that the stock Wan pipelines load.
Text to video is learnt sooner by a transformer that knows the domain, and takes its VAE with it:
``--task t2v --start-from pipelines/configs/teachers/digits_i2v``. One of the same task is trained on likewise, and
``--decoder-steps`` trains on what makes frames of its latents; with ``--only-vae`` nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pose_core.data import moving_digits
from pose_core.errors import ConfigError
from pose_core.models import small
from pose_core.models.codec import WanCodec
from pose_core.models.video_model import Condition
from pose_core.models.wan import Wan
from pose_core.runtime import cli
from pose_core.training import pretraining

IMAGE_TOKENS = 5
TEXT_TOKENS = 16
ONE_DIGIT_EVERY = 6
"""Every so many-th clip is of the level ``one``."""


def main() -> None:
    arguments = parse_arguments()
    with cli.errors_for_people(debug=arguments.debug):
        make(arguments)


def make(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    pipeline = small.build_pipeline(moving_digits.every_prompt(), arguments.seed, arguments.task)
    if arguments.start_from is not None:
        if arguments.only_vae and arguments.decoder_steps is None:
            raise ConfigError("--only-vae trains nothing with --start-from, which keeps a VAE: add --decoder-steps")
        if not (arguments.start_from / "model_index.json").is_file():
            raise ConfigError(f"--start-from {arguments.start_from} has no model_index.json: name a teacher's folder")
        small.copy_weights(arguments.start_from, pipeline)
    elif arguments.decoder_steps is not None:
        raise ConfigError("--decoder-steps trains on the VAE of --start-from: name its folder")
    if arguments.decoder_noise and arguments.decoder_steps is None:
        raise ConfigError(f"--decoder-noise {arguments.decoder_noise:g} trains no decoder: add --decoder-steps")
    videos, texts = render_clips(arguments.clips, arguments.seed)
    pipeline.to(arguments.device)
    with bars() as progress:
        if arguments.start_from is None:
            train_vae(pipeline, videos, arguments, progress)
        elif arguments.decoder_steps is not None:
            train_decoder(pipeline, videos, arguments, progress)
        if not arguments.only_vae:
            train_teacher(pipeline, videos, texts, arguments, progress)
        elif arguments.start_from is None:
            return
    save(pipeline.to("cpu"), arguments.out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("i2v", "t2v"), default="i2v")
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the diffusers folder")
    parser.add_argument("--start-from", type=Path, help="teacher to take the VAE from and to begin with")
    parser.add_argument("--work", type=Path, default=Path(".pose/pretrain"), help="checkpoints and encoded clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=cli.positive_int, default=1, help="results repeat for the same number")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--clips", type=cli.positive_int, default=16384, help="training clips")
    parser.add_argument("--vae-steps", type=cli.positive_int, default=2000)
    parser.add_argument(
        "--decoder-steps",
        type=cli.positive_int,
        help="train the decoder of --start-from's VAE on, by so many steps; its latents stay as they are",
    )
    parser.add_argument(
        "--decoder-noise",
        type=cli.positive,
        default=0.0,
        help="it learns from latents with noise of up to so much of their spread (default: none)",
    )
    parser.add_argument("--only-vae", action="store_true", help="stop when the VAE, or its decoder, is trained")
    parser.add_argument("--teacher-steps", type=cli.positive_int, default=5400)
    parser.add_argument("--batch", type=cli.positive_int, default=32)
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="what the teacher computes in; bfloat16 takes 0.6 of the time on a CPU that has it (lscpu: avx512_bf16)",
    )
    parser.add_argument(
        "--timestep-shift", type=cli.positive, default=1.0, help="above 1: more of the times near noise"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks and every log line")
    return parser.parse_args()


def render_clips(clips: int, seed: int) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    levels = ["one" if index % ONE_DIGIT_EVERY == 0 else "two" for index in range(clips)]
    drawn = [moving_digits.draw_clip(rng, level=level) for level in levels]
    return np.stack([moving_digits.render(clip) for clip in drawn]), [clip.prompt for clip in drawn]


def train_vae(pipeline, videos: np.ndarray, arguments: argparse.Namespace, progress: Progress) -> None:
    """Train the VAE, then measure the mean and spread of its latents, which the transformer sees normalised."""
    vae = pipeline.vae
    codec = WanCodec(pipeline, TEXT_TOKENS)
    pretraining.fit(
        vae,
        on_few(pretraining.vae_loss, pipeline, videos),
        steps=arguments.vae_steps,
        learning_rate=2e-3,
        ema_decay=0.99,
        seed=arguments.seed,
        checkpoint=arguments.work / f"vae-{arguments.seed}.pt",
        progress=bar(progress, "VAE", arguments.vae_steps),
    )
    latents = codec.encode_video(videos[:256])
    vae.register_to_config(
        latents_mean=latents.mean(dim=(0, 2, 3, 4)).tolist(), latents_std=latents.std(dim=(0, 2, 3, 4)).tolist()
    )


def train_decoder(pipeline, videos: np.ndarray, arguments: argparse.Namespace, progress: Progress) -> None:
    """Train what makes frames of latents, and leave the latents alone: transformers that know them stay good."""
    vae = pipeline.vae
    pretraining.fit(
        torch.nn.ModuleList([vae.post_quant_conv, vae.decoder]),
        on_few(functools.partial(pretraining.decoder_loss, noise=arguments.decoder_noise), pipeline, videos),
        steps=arguments.decoder_steps,
        learning_rate=1e-3,
        ema_decay=0.999,
        seed=arguments.seed,
        checkpoint=arguments.work / f"decoder-from-{arguments.start_from.name}-{arguments.seed}.pt",
        progress=bar(progress, "decoder", arguments.decoder_steps),
    )


def on_few(
    loss: Callable[..., torch.Tensor], pipeline, videos: np.ndarray
) -> Callable[[torch.Generator], torch.Tensor]:
    """A loss of the VAE on a few clips of ``videos [N, T, H, W, 3]``, all that is random drawn from a generator."""
    codec = WanCodec(pipeline, TEXT_TOKENS)

    def drawn(generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(videos), (8,), generator=generator)
        return loss(pipeline.vae, codec._pixels(videos[rows.numpy()]), generator)

    return drawn


def train_teacher(pipeline, videos, texts, arguments: argparse.Namespace, progress: Progress) -> None:
    """Train the transformer and, with it, the text encoder."""
    codec = WanCodec(pipeline, TEXT_TOKENS)
    x_0, *of_image = (part.to(arguments.device) for part in encode_clips(codec, videos, arguments, progress))
    words = pipeline.tokenizer([*texts, ""], max_length=TEXT_TOKENS, padding="max_length", return_tensors="pt")
    transformer, text_encoder = pipeline.transformer, pipeline.text_encoder
    model = Wan(transformer, IMAGE_TOKENS if arguments.task == "i2v" else 0)
    for block in model.blocks:
        block.compile()  # halves the time of a step on a CPU
    half = arguments.precision == "bfloat16"
    precision = functools.partial(torch.autocast, x_0.device.type, torch.bfloat16, enabled=half)
    # On a CPU the fused attention takes four times as long backward in bfloat16 as in float32; the plain one does not.
    plain = half and x_0.device.type == "cpu"
    attention = functools.partial(sdpa_kernel, SDPBackend.MATH) if plain else contextlib.nullcontext

    def loss(generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(x_0), (arguments.batch,), generator=generator)
        of_each = torch.cat([rows, torch.tensor([len(texts)])])
        ids, mask = (part[of_each].to(arguments.device) for part in (words.input_ids, words.attention_mask))
        rows = rows.to(arguments.device)
        text = text_encoder(ids, mask).last_hidden_state * mask[..., None]
        condition = Condition(text[:-1], *(part[rows] for part in of_image))
        with precision(), attention():
            return pretraining.teacher_loss(model, x_0[rows], condition, text[-1:], generator, arguments.timestep_shift)

    origin = "" if arguments.start_from is None else f"-from-{arguments.start_from.name}"
    pretraining.fit(
        torch.nn.ModuleList([transformer, text_encoder]),
        loss,
        steps=arguments.teacher_steps,
        learning_rate=1e-3,
        ema_decay=0.999,
        seed=arguments.seed,
        checkpoint=arguments.work / f"teacher-{arguments.task}{origin}-{arguments.seed}.pt",
        matrices=[transformer.blocks],
        progress=bar(progress, "teacher", arguments.teacher_steps),
    )


def encode_clips(
    codec: WanCodec, videos: np.ndarray, arguments: argparse.Namespace, progress: Progress
) -> list[torch.Tensor]:
    """Latents and, for image to video, embeddings of the first frames and their latents with mask; kept in ``work``."""

    def latents(batch: np.ndarray) -> list[torch.Tensor]:
        return [codec.encode_video(batch)]

    def images(batch: np.ndarray) -> list[torch.Tensor]:
        condition = codec.encode_condition([""] * len(batch), batch[:, 0], videos.shape[1])
        assert condition.image is not None and condition.first_frame is not None
        return [condition.image, condition.first_frame]

    wanted = {"latents": latents} | ({"images": images} if codec.has_image else {})
    encoded = []
    for name, encode in wanted.items():
        cache = arguments.work / f"{name}-{arguments.clips}-{arguments.seed}.pt"
        if not cache.is_file():
            report = bar(progress, f"encoding {name}", len(videos))
            parts = []
            for start in range(0, len(videos), 64):
                parts.append([part.cpu() for part in encode(videos[start : start + 64])])
                report(min(start + 64, len(videos)), 0.0)
            cache.parent.mkdir(parents=True, exist_ok=True)
            torch.save([torch.cat(part) for part in zip(*parts, strict=True)], cache)
        encoded += torch.load(cache, weights_only=True)
    return encoded


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
