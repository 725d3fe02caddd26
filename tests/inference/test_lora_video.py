"""LoRA files in the stock pipeline: both formats load, and the one-step video is the generator's."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
from PIL import Image

from pose_core.inference.sampler import OneStepSampler
from pose_core.models import wan
from pose_core.models.lora import ADAPTER_FILE, add_adapter
from pose_core.models.lora_file import (
    COMFYUI_FILE,
    DIFFUSERS_FILE,
    extract_lora,
    linear_layers,
    trained_lora,
    write_lora,
)
from pose_core.models.weights import Weights

PROMPT = "a seven moving up and left"
TEMPORAL, SPATIAL = 2, 4
FRAMES, HEIGHT, WIDTH = 4 * TEMPORAL + 1, 8 * SPATIAL, 16 * SPATIAL


def trained(tiny_folder: Path, folder: Path) -> None:
    """A generator that was trained as a LoRA, as a phase leaves it, and its files in ``folder / "lora"``."""
    role = add_adapter(wan.load(tiny_folder), "average", rank=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in role.weights().values():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    role.save(folder / "transformer", dict(role.module.state_dict()))
    write_lora(trained_lora(folder / ADAPTER_FILE), folder / "lora", "WanTransformer3DModel")


def extracted(tiny_folder: Path, folder: Path) -> None:
    """A generator all of whose linear layers were trained, and its change at full rank in ``folder / "lora"``."""
    model, noise = wan.load(tiny_folder), torch.Generator().manual_seed(0)
    weights, linear = dict(model.module.state_dict()), linear_layers(model.module)
    for layer in linear:
        for name in (f"{layer}.weight", f"{layer}.bias"):
            weights[name] = weights[name] + 0.05 * torch.randn(weights[name].shape, generator=noise)
    model.save(folder / "transformer", weights)
    base = Weights(tiny_folder)
    rank = max(min(base[f"{layer}.weight"].shape) for layer in linear)
    lora, report = extract_lora(base, Weights(folder), linear, rank)
    assert report.total_error < 1e-5
    write_lora(lora, folder / "lora", "WanTransformer3DModel", report)


@pytest.mark.parametrize("make", [trained, extracted])
def test_stock_diffusers_loads_both_formats_and_makes_the_generators_video(
    make, tiny_folder: Path, tmp_path: Path
) -> None:
    make(tiny_folder, tmp_path / "generator")
    whole = tmp_path / "whole"
    shutil.copytree(tiny_folder, whole, ignore=shutil.ignore_patterns("transformer"))
    shutil.copytree(tmp_path / "generator" / "transformer", whole / "transformer")
    sampler = OneStepSampler.load(whole, text_tokens=16)
    noise = sampler.noise(1, FRAMES, HEIGHT, WIDTH, seed=7)
    first_frame = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    expected = sampler([PROMPT], first_frame[None], [noise])[0]
    pipe = WanImageToVideoPipeline.from_pretrained(tiny_folder)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipe.set_progress_bar_config(disable=True)

    def video() -> np.ndarray:
        return pipe(
            image=Image.fromarray(first_frame),
            prompt=PROMPT,
            height=HEIGHT,
            width=WIDTH,
            num_frames=FRAMES,
            num_inference_steps=1,
            guidance_scale=1.0,
            latents=noise,
            output_type="np",
        ).frames[0]

    assert np.abs(video() - expected).max() > 0.01  # the teacher's own single step is another video
    for name in (DIFFUSERS_FILE, COMFYUI_FILE):
        pipe.load_lora_weights(tmp_path / "generator" / "lora", weight_name=name)
        assert np.abs(video() - expected).max() <= 1e-4
        pipe.unload_lora_weights()
