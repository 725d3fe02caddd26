"""The codec prepares exactly what the stock image-to-video pipeline prepares, and decodes what it encoded."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from torch import Tensor

from pose_core.errors import CheckpointError
from pose_core.models.codec import WanCodec
from pose_core.models.sizes import latent_shape

FRAMES, SIDE, TOKENS = 9, 32, 16
PROMPTS = ["a seven moving up and left", "an eight"]


@pytest.fixture(scope="module")
def codec(tiny_folder: Path) -> WanCodec:
    return WanCodec.load(tiny_folder, TOKENS)


@pytest.fixture(scope="module")
def stock(tiny_folder: Path) -> WanImageToVideoPipeline:
    return WanImageToVideoPipeline.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def video() -> np.ndarray:
    """Two clips ``[2, 9, 32, 32, 3]`` uint8 of smooth colours."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (2, FRAMES, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(SIDE // 4, axis=2).repeat(SIDE // 4, axis=3)


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5


def stock_text(stock: WanImageToVideoPipeline, prompts: list[str]) -> Tensor:
    """Embeddings ``[B, 512, D]`` as the stock pipeline asks for them when it is called."""
    return stock.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)[0]


@torch.no_grad()
def test_the_condition_is_what_the_stock_pipeline_prepares(codec: WanCodec, stock, video: np.ndarray) -> None:
    first = video[:1, 0]
    condition = codec.encode_condition(PROMPTS[:1], first, FRAMES)
    picture = Image.fromarray(first[0])
    pixels = stock.video_processor.preprocess(picture, height=SIDE, width=SIDE)
    channels = codec.vae.config.z_dim
    _, first_frame = stock.prepare_latents(pixels, 1, channels, SIDE, SIDE, FRAMES, torch.float32, pixels.device)
    close(condition.image, stock.encode_image(picture))
    close(condition.first_frame, first_frame)
    close(condition.text, stock_text(stock, PROMPTS[:1])[:, :TOKENS])


@torch.no_grad()
def test_what_it_leaves_out_of_a_prompt_is_zeros(codec: WanCodec, stock) -> None:
    assert stock_text(stock, PROMPTS)[:, TOKENS:].abs().max() == 0
    text = codec.encode_text(PROMPTS)
    # Six words and the end token; two words and the end token.
    assert [int(row.abs().amax(dim=-1).gt(0).sum()) for row in text] == [7, 3]


def test_a_longer_prompt_is_cut(tiny_folder: Path, codec: WanCodec) -> None:
    short = WanCodec(codec.pipeline, 3).encode_text(PROMPTS[:1])
    assert short.shape == (1, 3, 32)
    close(short, WanCodec(codec.pipeline, 3).encode_text(["a seven"]))


def test_each_clip_of_a_batch_is_encoded_as_if_alone(codec: WanCodec, video: np.ndarray) -> None:
    together = codec.encode_condition(PROMPTS, video[:, 0], FRAMES)
    for clip in range(2):
        rows = slice(clip, clip + 1)
        alone = codec.encode_condition(PROMPTS[rows], video[rows, 0], FRAMES)
        for name in ("text", "image", "first_frame"):
            close(getattr(together, name)[rows], getattr(alone, name))


def test_without_first_frames_there_is_only_text(codec: WanCodec) -> None:
    condition = codec.encode_condition(PROMPTS, None, FRAMES)
    assert condition.image is None and condition.first_frame is None
    assert condition.text.shape == (2, TOKENS, 32)


def test_the_mask_marks_the_first_frame_alone(codec: WanCodec, video: np.ndarray) -> None:
    mask = codec.encode_condition(PROMPTS, video[:, 0], FRAMES).first_frame[:, :2]
    assert mask[:, :, 0].eq(1).all()
    assert mask[:, :, 1:].eq(0).all()


@torch.no_grad()
def test_latents_are_normalised_by_the_vaes_mean_and_spread(codec: WanCodec, video: np.ndarray) -> None:
    latents = codec.encode_video(video)
    pixels = torch.from_numpy(video).permute(0, 4, 1, 2, 3) / 127.5 - 1
    raw = codec.vae.encode(pixels).latent_dist.mode()
    for channel in range(8):
        mean, std = 0.1 * channel - 0.3, 0.5 + 0.1 * channel
        close(latents[:, channel] * std + mean, raw[:, channel])


@torch.no_grad()
def test_decoding_takes_the_normalisation_back(codec: WanCodec, video: np.ndarray) -> None:
    latents = codec.encode_video(video)
    pixels = torch.from_numpy(video).permute(0, 4, 1, 2, 3) / 127.5 - 1
    raw = codec.vae.decode(codec.vae.encode(pixels).latent_dist.mode()).sample
    decoded = codec.decode(latents)
    assert decoded.shape == video.shape and decoded.dtype == np.float32
    assert 0 <= decoded.min() < decoded.max() <= 1
    close(torch.from_numpy(decoded), (raw / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1))


def test_the_latent_shape_is_that_of_encoded_clips(tiny_folder: Path, codec: WanCodec, video: np.ndarray) -> None:
    assert latent_shape(tiny_folder, FRAMES, SIDE, SIDE) == (8, 5, 8, 8)
    assert tuple(codec.encode_video(video).shape[1:]) == (8, 5, 8, 8)
    assert latent_shape(tiny_folder, 1, 16, 64) == (8, 1, 4, 16)


@pytest.mark.parametrize(
    ("size", "setting", "remedy"),
    [
        ((8, 32, 32), "data.frames=8", "2k+1"),
        ((9, 30, 32), "data.height=30", "multiple of 8"),
        ((9, 32, 36), "data.width=36", "multiple of 8"),
    ],
)
def test_a_size_that_does_not_fit_is_refused_by_its_settings_name(
    tiny_folder: Path, size: tuple[int, int, int], setting: str, remedy: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        latent_shape(tiny_folder, *size)
    assert setting in str(caught.value) and remedy in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("part", ["vae", "text_encoder", "image_encoder", "tokenizer"])
def test_a_folder_with_a_missing_part_is_refused_by_its_name(tiny_folder: Path, tmp_path: Path, part: str) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    shutil.rmtree(folder / part)
    refused(folder, part)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "image_encoder"])
def test_a_folder_without_the_weights_of_a_part_is_refused(tiny_folder: Path, tmp_path: Path, part: str) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    for weights in (folder / part).glob("*.safetensors"):
        weights.unlink()
    refused(folder, str(folder))


def refused(folder: Path, text: str) -> None:
    """Loading fails in one line that holds ``text``, as something the person can correct in the call."""
    with pytest.raises(CheckpointError) as caught:
        WanCodec.load(folder, TOKENS)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
