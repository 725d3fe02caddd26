"""The parts of a diffusers folder: what is missing is named, and shapes agree with the real networks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pose_core.errors import CheckpointError
from pose_core.models.codec import WanCodec
from pose_core.models.parts import build_encoders, check_parts, clip_shapes


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A complete folder that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "wan"))


def test_shapes_are_those_of_an_encoded_clip(tiny_folder: Path) -> None:
    codec = WanCodec.load(tiny_folder, text_tokens=7)
    video = np.random.default_rng(0).integers(0, 255, (1, 9, 32, 32, 3), dtype=np.uint8)
    latents, condition = codec.encode_video(video), codec.encode_condition(["a seven"], video[:, 0], 9)
    shapes = clip_shapes(tiny_folder, frames=9, height=32, width=32, text_tokens=7)
    encoded = [latents, condition.text, condition.image, condition.first_frame]
    assert shapes.trained_on == [tuple(tensor.shape[1:]) for tensor in encoded if tensor is not None]


def test_encoders_are_the_stock_networks_without_memory(tiny_folder: Path) -> None:
    encoders, pipeline = build_encoders(tiny_folder), WanCodec.load(tiny_folder, text_tokens=7).pipeline
    assert list(encoders) == ["vae", "text_encoder", "image_encoder"]
    for part, module in encoders.items():
        real = getattr(pipeline, part)
        assert type(module) is type(real)
        assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in real.parameters())
        assert all(p.device == torch.device("meta") for p in module.parameters())


def test_a_complete_folder_passes(tiny_folder: Path) -> None:
    check_parts(tiny_folder, weights=True)


@pytest.mark.parametrize(
    "lost",
    [
        "model_index.json",
        "transformer/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "image_encoder/config.json",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
        "image_processor/preprocessor_config.json",
    ],
)
def test_a_missing_part_is_named(folder: Path, lost: str) -> None:
    (folder / lost).unlink()
    with pytest.raises(CheckpointError, match=lost) as caught:
        check_parts(folder, weights=True)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "image_encoder"])
def test_missing_weights_are_named_unless_only_configs_are_asked_for(folder: Path, part: str) -> None:
    for file in (folder / part).glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match=f"{part}/.*safetensors"):
        check_parts(folder, weights=True)
    check_parts(folder, weights=False)


def test_a_missing_shard_of_split_weights_is_named(folder: Path) -> None:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / names[0])
    index = {"weight_map": {"first": names[0], "second": names[1]}}
    (folder / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=names[1]):
        check_parts(folder, weights=True)


def test_a_damaged_index_is_named(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"vae": ')
    with pytest.raises(CheckpointError, match=r"model_index\.json is not a JSON object"):
        check_parts(folder, weights=True)


def test_a_class_that_no_library_has_is_named(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderOfTomorrow"]}))
    with pytest.raises(CheckpointError, match=r"diffusers\.AutoencoderOfTomorrow as vae"):
        build_encoders(folder)
