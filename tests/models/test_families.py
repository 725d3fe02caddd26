"""Every family against the stock pipeline of a small folder of its published classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import PROMPT, TOKENS, FamilyContract
from diffusers import ClassifierFreeGuidance
from PIL import Image
from torch import Tensor

from pose_core.errors import CheckpointError
from pose_core.models import families
from pose_core.models.adapter import with_given_frame
from pose_core.models.ltx import pack, unpack
from pose_core.models.small_folders import save_hunyuan15, save_ltx, save_wan, save_wan22_a14b, save_wan22_ti2v
from pose_core.models.video_model import Condition


class TestWanTextToVideo(FamilyContract):
    family, task, pipeline = "wan", "t2v", "WanPipeline"
    make = staticmethod(lambda folder: save_wan(folder, "t2v"))


class TestWanImageToVideo(FamilyContract):
    family, task, pipeline = "wan", "i2v", "WanImageToVideoPipeline"
    make = staticmethod(lambda folder: save_wan(folder, "i2v"))


class TestWan22TI2VText(FamilyContract):
    family, task, pipeline = "wan22_ti2v", "t2v", "WanPipeline"
    make = staticmethod(save_wan22_ti2v)


class TestWan22TI2VImage(FamilyContract):
    family, task, pipeline = "wan22_ti2v", "i2v", "WanImageToVideoPipeline"
    make = staticmethod(save_wan22_ti2v)
    holds_first_frame = True


class TestWan22A14BText(FamilyContract):
    family, task, pipeline = "wan22_a14b", "t2v", "WanPipeline"
    make = staticmethod(lambda folder: save_wan22_a14b(folder, "t2v"))


class TestWan22A14BImage(FamilyContract):
    family, task, pipeline = "wan22_a14b", "i2v", "WanImageToVideoPipeline"
    make = staticmethod(lambda folder: save_wan22_a14b(folder, "i2v"))

    def test_each_clip_is_scored_by_the_expert_that_owns_its_time(
        self, folder: Path, condition: Condition, noise: torch.Tensor
    ) -> None:
        teacher = families.of(folder).load_teacher(folder)
        x_t, t = noise.repeat(3, 1, 1, 1, 1) * torch.tensor([1.0, 0.7, 0.4]).view(3, 1, 1, 1, 1), [0.95, 0.3, 0.9]
        three = condition.rows(torch.tensor([0, 0, 0]))
        with torch.no_grad():
            together = teacher.velocity(x_t, torch.tensor(t), three)
            features = teacher.features(x_t, torch.tensor(t), three, [1])[0]
            for row, expert in enumerate((teacher.high, teacher.low, teacher.high)):
                mine = slice(row, row + 1)
                arguments = x_t[mine], torch.tensor(t[mine]), condition
                torch.testing.assert_close(together[mine], expert.velocity(*arguments))
                torch.testing.assert_close(features[mine], expert.features(*arguments, [1])[0])
        assert (teacher.high.velocity(x_t, torch.tensor(t), three) - together)[1].abs().max() > 1e-3

    def test_an_expert_without_clips_here_still_runs_where_another_rank_needs_it(
        self, folder: Path, condition: Condition, noise: torch.Tensor
    ) -> None:
        teacher = families.of(folder).load_teacher(folder)
        calls: list[str] = []
        for name, expert in (("high", teacher.high), ("low", teacher.low)):
            expert.module.register_forward_hook(lambda *_, name=name: calls.append(name))
        alone = teacher.velocity(noise, torch.tensor([0.95]), condition)
        assert calls == ["high"]
        teacher.any_rank = lambda _flag: True
        with_others = teacher.velocity(noise, torch.tensor([0.95]), condition)
        assert calls == ["high", "high", "low"]
        assert torch.equal(alone, with_others)
        with_others.sum().backward()
        assert all(parameter.grad is not None for parameter in teacher.low.module.blocks.parameters())
        assert all(not parameter.grad.any() for parameter in teacher.low.module.blocks.parameters())

    def test_the_generator_starts_from_the_expert_for_noisy_inputs(self, folder: Path) -> None:
        family = families.of(folder)
        generator, teacher = family.load_generator(folder, folder), family.load_teacher(folder)
        assert teacher.start is teacher.high
        for name, value in teacher.module.transformer.state_dict().items():
            assert torch.equal(value, generator.module.state_dict()[name])

    def test_a_folder_that_does_not_say_who_owns_what_noise_is_refused(self, folder: Path, tmp_path: Path) -> None:
        index = json.loads((folder / "model_index.json").read_text()) | {"boundary_ratio": None}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="has no boundary_ratio") as caught:
            families.get("wan22_a14b").load_teacher(tmp_path)
        assert caught.value.exit_code == 2


class TestLTXText(FamilyContract):
    family, task, pipeline = "ltx", "t2v", "LTXPipeline"
    make = staticmethod(lambda folder: save_ltx(folder, timestep_conditioning=False))

    def given_latents(self, noise: Tensor, condition: Condition) -> Tensor:
        return pack(noise, (1, 1, 1))

    def clip_of(self, sample: Tensor, condition: Condition) -> Tensor:
        return unpack(sample, torch.Size((1, 8, 5, 4, 4)), (1, 1, 1))


class TestLTXImage(FamilyContract):
    family, task, pipeline = "ltx", "i2v", "LTXImageToVideoPipeline"
    make = staticmethod(lambda folder: save_ltx(folder, timestep_conditioning=True))
    holds_first_frame = True

    def given_latents(self, noise: Tensor, condition: Condition) -> Tensor:
        assert condition.first_frame is not None
        return pack(with_given_frame(noise, condition.first_frame), (1, 1, 1))

    def clip_of(self, sample: Tensor, condition: Condition) -> Tensor:
        """The scheduler gets the frames behind the first."""
        assert condition.first_frame is not None
        return torch.cat([condition.first_frame, sample], dim=2)


class HunyuanContract(FamilyContract):
    family = "hunyuan15"

    def call(self, pipe: Any, latents: Tensor, first_frame: np.ndarray, guidance: float | None, **more: Any) -> Any:
        """The pipeline's guider is asked for guidance, and image to video takes its size from the picture."""
        if guidance is not None:
            pipe.guider = ClassifierFreeGuidance(guidance_scale=guidance)
        arguments = {"prompt": PROMPT, "latents": latents, "num_frames": self.frames, "output_type": "np", **more}
        if self.task == "t2v":
            return pipe(height=self.side, width=self.side, **arguments)
        return pipe(image=Image.fromarray(first_frame), **arguments)


class TestHunyuanText(HunyuanContract):
    task, pipeline = "t2v", "HunyuanVideo15Pipeline"
    make = staticmethod(lambda folder: save_hunyuan15(folder, "t2v"))

    def test_writing_in_a_prompt_reaches_the_network(self, codec: Any) -> None:
        plain, written = codec.encode_text(["a seven", 'a seven beside "OPEN"'])
        assert not plain[TOKENS:].any()
        # Two quotation marks' worth of template and four letters, a byte a token.
        assert 4 <= written[TOKENS:].abs().amax(dim=-1).gt(0).sum() < 60

    def test_a_mean_flow_model_is_refused(self, folder: Path, tmp_path: Path) -> None:
        config = json.loads((folder / "transformer" / "config.json").read_text()) | {"use_meanflow": True}
        (tmp_path / "transformer").mkdir()
        (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="mean-flow"):
            families.get("hunyuan15").load_teacher(tmp_path)


class TestHunyuanImage(HunyuanContract):
    task, pipeline = "i2v", "HunyuanVideo15ImageToVideoPipeline"
    make = staticmethod(lambda folder: save_hunyuan15(folder, "i2v"))


@pytest.mark.parametrize(
    ("index", "words"),
    [(None, "has no model_index.json"), ({"_class_name": "StableDiffusionPipeline"}, "is a StableDiffusionPipeline")],
)
def test_a_foreign_folder_is_refused_in_one_line(index: dict | None, words: str, tmp_path: Path) -> None:
    if index is not None:
        (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=words) as caught:
        families.of(tmp_path)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
