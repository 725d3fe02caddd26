"""An evaluation samples in the precision of training and holds what it samples with, not what it does not need."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pose_core import config
from pose_core.runtime.evaluating import Sampler
from pose_core.runtime.storage import Store

ROWS = {
    "latents": np.zeros((2, 8, 3, 4, 4), dtype=np.float32),
    "text": np.random.default_rng(0).standard_normal((2, 6, 32), dtype=np.float32),
    "image": np.random.default_rng(1).standard_normal((2, 5, 32), dtype=np.float32),
    "first_frame": np.random.default_rng(2).standard_normal((2, 10, 3, 4, 4), dtype=np.float32),
}
WAYS = ["teacher_2_steps", "teacher_1_step", "primed_1_step", "one_step", "4_steps"]


@pytest.fixture(scope="module")
def stored(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A generator as a phase leaves it: here, the teacher's transformer."""
    store = Store.open(str(tmp_path_factory.mktemp("phase")))
    store.upload_folder(tiny_folder / "transformer", "generator/transformer")
    return store


def sampler(folder: Path, stored: Store, *overrides: str) -> Sampler:
    settings = config.load("", [f"model.teacher={folder}", "evaluation.teacher_steps=2", *overrides])
    return Sampler(settings, {"primed_1_step": stored, "one_step": stored}, np.zeros((1, 6, 32), dtype=np.float32))


def test_every_way_to_sample_gives_whole_videos(tiny_folder: Path, stored: Store) -> None:
    index, videos = sampler(tiny_folder, stored).sample(3, ROWS)
    assert index == 3 and list(videos) == WAYS
    assert {(video.shape, video.dtype.name) for video in videos.values()} == {((2, 5, 16, 16, 3), "uint8")}
    assert np.array_equal(videos["primed_1_step"], videos["one_step"])
    assert np.array_equal(videos["teacher_1_step"], videos["one_step"])
    assert not np.array_equal(videos["teacher_2_steps"], videos["one_step"])


def test_few_steps_noise_again_where_the_settings_say_and_one_step_does_not(tiny_folder: Path, stored: Store) -> None:
    usual = sampler(tiny_folder, stored).sample(0, ROWS)[1]
    late = sampler(tiny_folder, stored, "evaluation.few_steps_time_min=0.8").sample(0, ROWS)[1]
    assert [way for way in WAYS if not np.array_equal(usual[way], late[way])] == ["4_steps"]


def test_what_the_generator_is_told_of_its_noise_changes_its_videos_alone(tiny_folder: Path, stored: Store) -> None:
    usual = sampler(tiny_folder, stored).sample(0, ROWS)[1]
    told = sampler(tiny_folder, stored, "method.conditioning_time=0.9").sample(0, ROWS)[1]
    changed = [way for way in WAYS if not np.array_equal(usual[way], told[way])]
    assert changed == ["primed_1_step", "one_step", "4_steps"]


def test_networks_are_held_in_the_precision_of_training_and_text_encoders_not_at_all(
    tiny_folder: Path, stored: Store
) -> None:
    exact, half = (sampler(tiny_folder, stored, f"training.precision={name}") for name in ("float32", "bfloat16"))
    for held, dtype in ((exact, torch.float32), (half, torch.bfloat16)):
        for model in (held.teacher, *held.generators.values()):
            assert {parameter.dtype for parameter in model.module.parameters()} == {dtype}
        assert held.codec.pipeline.text_encoder is None and held.codec.pipeline.image_encoder is None
    for way, video in exact.sample(0, ROWS)[1].items():
        difference = np.abs(video.astype(int) - half.sample(0, ROWS)[1][way])
        assert difference.mean() < 2, way
