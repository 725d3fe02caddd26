"""The exported folder belongs to stock diffusers: it loads without this project and gives the same video."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file

from pose_core.errors import CheckpointError
from pose_core.inference.export import export_folder, exported_conditioning_time, one_step_scheduler
from pose_core.inference.sampler import OneStepSampler, sample_teacher, teacher_evaluations
from pose_core.models import wan
from pose_core.models.video_model import Condition

PROMPT = "a seven moving up and left"
FRAMES, SIDE = 9, 32

STOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pose_core":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
try:
    import pose_core
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("pose_core can be imported: this proves nothing")

import numpy as np
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file

folder, given, result, prompt = sys.argv[1:]
inputs = load_file(given)
video = WanImageToVideoPipeline.from_pretrained(folder)(
    image=Image.fromarray(inputs["first_frame"].numpy()),
    prompt=prompt,
    height=32,
    width=32,
    num_frames=9,
    num_inference_steps=1,
    guidance_scale=1.0,
    latents=inputs["noise"],
    output_type="np",
).frames[0]
np.save(result, video)
"""


@pytest.fixture(scope="module")
def exported(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator of weights other than the teacher's, exported."""
    folder = tmp_path_factory.mktemp("export")
    teacher = wan.load(tiny_folder)
    noise = torch.Generator().manual_seed(4)
    weights = {
        name: value + 0.05 * torch.randn(value.shape, generator=noise)
        for name, value in teacher.module.state_dict().items()
    }
    teacher.save(folder / "generator", weights)
    export_folder(tiny_folder, folder / "generator", folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def first_frame() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def test_stock_diffusers_gives_the_same_video_where_this_project_is_absent(
    exported: Path, first_frame: np.ndarray, tmp_path: Path
) -> None:
    sampler = OneStepSampler.load(exported, text_tokens=16)
    noise = sampler.noise(1, FRAMES, SIDE, SIDE, seed=7)
    ours = sampler([PROMPT], first_frame[None], [noise])[0]
    save_file({"first_frame": torch.from_numpy(first_frame), "noise": noise}, tmp_path / "in.safetensors")
    arguments = [str(exported), str(tmp_path / "in.safetensors"), str(tmp_path / "video.npy"), PROMPT]
    done = subprocess.run(
        [sys.executable, "-I", "-c", STOCK, *arguments], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    theirs = np.load(tmp_path / "video.npy")
    assert theirs.shape == ours.shape == (FRAMES, SIDE, SIDE, 3)
    assert theirs.dtype == ours.dtype == np.float32
    assert np.abs(theirs - ours).max() <= 1e-4
    assert ours.std() > 0.01


def test_it_holds_the_generators_weights_and_a_one_step_scheduler(exported: Path) -> None:
    scheduler = json.loads((exported / "scheduler" / "scheduler_config.json").read_text())
    index = json.loads((exported / "model_index.json").read_text())
    assert scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    assert scheduler["shift"] == 1.0
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    generator = (exported.parent / "generator" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert (exported / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == generator


def test_the_scheduler_says_what_the_generator_is_told_of_its_noise(exported: Path, tmp_path: Path) -> None:
    for time, timesteps in ((1.0, 1000), (0.967, 967)):
        FlowMatchEulerDiscreteScheduler(**one_step_scheduler(time)).save_pretrained(tmp_path / "scheduler")
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler")
        scheduler.set_timesteps(1)
        assert scheduler.timesteps.tolist() == [timesteps] and scheduler.sigmas.tolist() == [1, 0]
        assert exported_conditioning_time(tmp_path) == time
    assert exported_conditioning_time(exported) == 1
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(CheckpointError, match="scheduler/scheduler_config.json"):
        exported_conditioning_time(tmp_path)


def test_the_teachers_folder_is_left_as_it_was(exported: Path, tiny_folder: Path) -> None:
    index = json.loads((tiny_folder / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "UniPCMultistepScheduler"]


def test_the_same_noise_gives_the_same_video_and_another_seed_another(exported: Path, first_frame: np.ndarray) -> None:
    sampler = OneStepSampler.load(exported, text_tokens=16)
    noise, again, other = (sampler.noise(1, FRAMES, SIDE, SIDE, seed) for seed in (1, 1, 2))
    assert torch.equal(noise, again)
    video = sampler([PROMPT], first_frame[None], [noise])
    assert np.array_equal(video, sampler([PROMPT], first_frame[None], [again]))
    assert not np.array_equal(video, sampler([PROMPT], first_frame[None], [other]))


def test_a_teachers_sample_costs_two_evaluations_a_step_and_one_without_guidance(tiny_folder: Path) -> None:
    teacher = wan.load(tiny_folder)
    calls: list[int] = []
    teacher.module.register_forward_hook(lambda *_: calls.append(1))
    noise = torch.zeros(1, 8, 1, 4, 4)
    condition = Condition(torch.ones(1, 4, 32), torch.ones(1, 5, 32), torch.zeros(1, 10, 1, 4, 4))
    sample_teacher(teacher, condition, torch.zeros(1, 4, 32), noise, steps=3, guidance=2.0, shift=1.0)
    assert len(calls) == teacher_evaluations(3, 2.0) == 6
    sample_teacher(teacher, condition, torch.zeros(1, 4, 32), noise, steps=3, guidance=1.0, shift=1.0)
    assert len(calls) - 6 == teacher_evaluations(3, 1.0) == 3
