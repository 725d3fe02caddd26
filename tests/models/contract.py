"""What every family must show against the stock pipeline of its folder; a family's test class says how to call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pose_core.inference.export import export_folder
from pose_core.inference.sampler import OneStepSampler
from pose_core.method.flow import guided
from pose_core.models import families
from pose_core.models.parts import check_parts, clip_shapes
from pose_core.models.video_model import Condition, bound

PROMPT = "a seven moving up and left"
TOKENS = 16
LIMIT = 1e-5
"""Largest difference from the stock pipeline, in float32."""


@dataclass
class Recorded:
    """What a stock pipeline fed its scheduler, step by step."""

    outputs: list[Tensor]
    times: list[float]
    samples: list[Tensor]


class FamilyContract:
    """The tests of a family; subclasses are named ``Test…`` and make a small folder of the published classes."""

    family: ClassVar[str]
    task: ClassVar[str]
    frames: ClassVar[int] = 9
    side: ClassVar[int] = 32
    blocks: ClassVar[int] = 2
    pipeline: ClassVar[str]
    """The stock pipeline of the task."""

    @staticmethod
    def make(folder: Path) -> None:
        """Write the small folder."""
        raise NotImplementedError

    # How the stock pipeline is called, and what its tensors mean in the project's notation.

    def call(self, pipe: Any, latents: Tensor, first_frame: np.ndarray, guidance: float | None, **more: Any) -> Any:
        """Run the pipeline on one clip from ``latents``; without ``guidance`` as a person would, who wants none."""
        size = {"height": self.side, "width": self.side, "num_frames": self.frames}
        image = {"image": Image.fromarray(first_frame)} if self.task == "i2v" else {}
        return pipe(
            prompt=PROMPT, latents=latents, guidance_scale=guidance or 1.0, output_type="np", **image, **size, **more
        )

    def given_latents(self, noise: Tensor, condition: Condition) -> Tensor:
        """The noise as the pipeline takes it."""
        return noise

    def clip_of(self, sample: Tensor, condition: Condition) -> Tensor:
        """A tensor of the scheduler as ``[B, C, T, h, w]``."""
        return sample

    holds_first_frame: ClassVar[bool] = False
    """Whether the given frame takes the place of the clip's first, so that no velocity of it is used."""

    # The tests.

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp(self.family) / "folder"
        self.make(folder)
        return folder

    @pytest.fixture(scope="class")
    def pipe(self, folder: Path) -> Any:
        pipe = getattr(diffusers, self.pipeline).from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @pytest.fixture(scope="class")
    def first_frame(self) -> np.ndarray:
        coarse = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return coarse.repeat(self.side // 4, axis=0).repeat(self.side // 4, axis=1)

    @pytest.fixture(scope="class")
    def codec(self, folder: Path) -> Any:
        return families.of(folder).load_codec(folder, TOKENS)

    @pytest.fixture(scope="class")
    def condition(self, codec: Any, first_frame: np.ndarray) -> Condition:
        return codec.encode_condition([PROMPT], first_frame[None] if self.task == "i2v" else None, self.frames)

    @pytest.fixture(scope="class")
    def noise(self, folder: Path) -> Tensor:
        shapes = clip_shapes(folder, **self.size())
        return torch.randn(1, *shapes.latents, generator=torch.Generator().manual_seed(5))

    def size(self) -> dict[str, Any]:
        size = {"frames": self.frames, "height": self.side, "width": self.side}
        return {"task": self.task, "text_tokens": TOKENS, **size}

    def record(self, pipe: Any, run: Callable[[], Any]) -> Recorded:
        recorded = Recorded([], [], [])
        step = pipe.scheduler.step

        def keep(output: Tensor, t: Tensor, sample: Tensor, **more: Any) -> Any:
            recorded.outputs.append(output.clone())
            recorded.times.append(float(t) / 1000)
            recorded.samples.append(sample.clone())
            return step(output, t, sample, **more)

        pipe.scheduler.step = keep
        try:
            run()
        finally:
            pipe.scheduler.step = step
        return recorded

    def test_the_folder_is_this_familys_and_complete(self, folder: Path) -> None:
        family = families.of(folder)
        assert family.name == self.family
        assert self.task in family.tasks(folder)
        check_parts(folder, weights=True)

    def test_shapes_are_those_of_an_encoded_clip(self, folder: Path, codec: Any, condition: Condition) -> None:
        video = np.random.default_rng(1).integers(0, 256, (1, self.frames, self.side, self.side, 3), dtype=np.uint8)
        shapes = clip_shapes(folder, **self.size())
        encoded = [codec.encode_video(video), condition.text, condition.image, condition.first_frame]
        assert shapes.trained_on == [tuple(tensor.shape[1:]) for tensor in encoded if tensor is not None]
        widths = families.of(folder).widths(folder, self.task)
        assert widths.text == condition.text.shape[-1]
        assert widths.image == (0 if condition.image is None else condition.image.shape[-1])
        assert widths.first_frame == (0 if condition.first_frame is None else condition.first_frame.shape[1])
        assert codec.decode(encoded[0]).shape == video.shape

    def test_each_clip_of_a_batch_is_encoded_and_decoded_as_if_alone(self, codec: Any) -> None:
        video = np.random.default_rng(2).integers(0, 256, (2, self.frames, self.side, self.side, 3), dtype=np.uint8)
        first_frames = video[:, 0] if self.task == "i2v" else None
        prompts = [PROMPT, "an eight"]
        latents, condition = codec.encode_video(video), codec.encode_condition(prompts, first_frames, self.frames)
        decoded = codec.decode(latents)
        for row in range(2):
            mine = slice(row, row + 1)
            given = None if first_frames is None else first_frames[mine]
            alone = codec.encode_condition(prompts[mine], given, self.frames)
            torch.testing.assert_close(latents[mine], codec.encode_video(video[mine]), atol=LIMIT, rtol=LIMIT)
            for name in ("text", "image", "first_frame"):
                together, single = getattr(condition, name), getattr(alone, name)
                assert (together is None) == (single is None)
                if single is not None:
                    torch.testing.assert_close(together[mine], single, atol=LIMIT, rtol=LIMIT)
            assert np.abs(decoded[mine] - codec.decode(latents[mine])).max() <= LIMIT

    def test_a_codec_for_videos_alone_decodes_the_same_and_holds_no_other_encoder(
        self, folder: Path, codec: Any
    ) -> None:
        video = np.random.default_rng(3).integers(0, 256, (1, self.frames, self.side, self.side, 3), dtype=np.uint8)
        alone = families.of(folder).load_codec(folder, TOKENS, only_video=True)
        latents = codec.encode_video(video)
        assert torch.equal(alone.encode_video(video), latents)
        assert np.array_equal(alone.decode(latents), codec.decode(latents))
        modules = {name for name, part in alone.pipeline.components.items() if isinstance(part, torch.nn.Module)}
        assert modules == {"vae"}

    @pytest.mark.parametrize("guidance", [1.0, 4.0])
    def test_the_velocity_is_what_the_stock_pipeline_feeds_its_scheduler(
        self, folder: Path, pipe: Any, codec: Any, condition: Condition, noise: Tensor, first_frame, guidance: float
    ) -> None:
        latents = self.given_latents(noise, condition)
        found = self.record(pipe, lambda: self.call(pipe, latents, first_frame, guidance, num_inference_steps=3))
        assert len(found.times) == 3 and found.times[0] > 0.99
        model = families.of(folder).load_teacher(folder)
        null = condition.with_text(codec.encode_text([""]))
        ours = guided(bound(model, condition), bound(model, null), guidance)
        skipped = int(self.holds_first_frame)
        for output, time, sample in zip(found.outputs, found.times, found.samples, strict=True):
            x_t = self.clip_of(sample, condition)
            with torch.no_grad():
                got = ours(x_t, torch.tensor([time], dtype=torch.float64))
            expected = self.clip_of(output, condition)
            assert got.shape == x_t.shape == expected.shape
            assert (got - expected)[:, :, skipped:].abs().max() <= LIMIT
            assert expected[:, :, skipped:].std() > 0.01

    def test_the_given_frame_is_kept_exactly(self, folder: Path, condition: Condition, noise: Tensor) -> None:
        if not self.holds_first_frame:
            assert condition.first_frame is None or condition.first_frame.shape[2] == noise.shape[2]
            return
        model = families.of(folder).load_generator(folder, folder)
        assert condition.first_frame is not None
        for time in (0.3, 1.0):
            with torch.no_grad():
                x_0 = noise - time * model.velocity(noise, torch.tensor([time]), condition)
            torch.testing.assert_close(x_0[:, :, :1], condition.first_frame)

    def test_features_are_those_of_the_blocks_asked_for(
        self, folder: Path, pipe: Any, condition: Condition, noise: Tensor, first_frame: np.ndarray
    ) -> None:
        model = families.of(folder).load_generator(folder, folder)
        seen: list[Tensor] = []
        blocks = getattr(pipe.transformer, model.blocks_at)
        assert len(blocks) == len(model.blocks) == self.blocks

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        hooks = [block.register_forward_hook(keep) for block in blocks]
        try:
            latents = self.given_latents(noise, condition)
            found = self.record(pipe, lambda: self.call(pipe, latents, first_frame, 1.0, num_inference_steps=2))
        finally:
            for hook in hooks:
                hook.remove()
        x_t = self.clip_of(found.samples[0], condition)
        last, first = model.features(x_t, torch.tensor([found.times[0]], dtype=torch.float64), condition, [1, 0])
        assert first.shape[-1] == model.width
        assert (first - seen[0]).abs().max() <= LIMIT * max(1, seen[0].abs().max())
        assert (last - seen[1]).abs().max() <= LIMIT * max(1, seen[1].abs().max())
        assert (first - last).abs().max() > 1e-3
        assert all(not block._forward_hooks for block in model.blocks)
        ran: list[int] = []
        model.blocks[1].register_forward_hook(lambda *_: ran.append(1))
        model.features(x_t, torch.tensor([0.5]), condition, [0])
        assert not ran and len(model.blocks) == self.blocks

    def test_only_of_pure_noise_it_is_told_another_time(
        self, folder: Path, condition: Condition, noise: Tensor
    ) -> None:
        model = families.of(folder).load_teacher(folder)
        usual, told = bound(model, condition), bound(model, condition, 0.75)
        one, earlier = torch.ones(1), torch.full((1,), 0.75)
        with torch.no_grad():
            assert torch.equal(told(noise, earlier), usual(noise, earlier))
            assert not torch.equal(told(noise, one), usual(noise, one))
            # A given frame is where the step ends whatever the network is told; the others move as they do at 0.75.
            frames = slice(1 if condition.first_frame is not None and condition.first_frame.shape[2] == 1 else 0, None)
            assert torch.equal(told(noise, one)[:, :, frames], usual(noise, earlier)[:, :, frames])
            assert torch.equal(told(noise, one)[:, :, : frames.start], usual(noise, one)[:, :, : frames.start])

    @pytest.mark.parametrize("told", [1.0, 0.96])
    def test_the_exported_folder_samples_in_one_step_in_the_stock_pipeline(
        self, folder: Path, condition: Condition, noise: Tensor, first_frame: np.ndarray, tmp_path: Path, told: float
    ) -> None:
        model = families.of(folder).load_generator(folder, folder)
        generator = torch.Generator().manual_seed(4)
        weights = {
            name: value + 0.02 * torch.randn(value.shape, generator=generator)
            for name, value in model.module.state_dict().items()
        }
        model.save(tmp_path / "generator", weights)
        export_folder(folder, tmp_path / "generator", tmp_path / "model", self.task, told)
        check_parts(tmp_path / "model", weights=True)
        sampler = OneStepSampler.load(tmp_path / "model", TOKENS)
        assert sampler.times.conditioning == told
        ours = sampler([PROMPT], first_frame[None] if self.task == "i2v" else None, [noise])[0]
        pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
        assert type(pipe).__name__ == self.pipeline
        pipe.set_progress_bar_config(disable=True)
        latents = self.given_latents(noise, condition)
        theirs = self.call(pipe, latents, first_frame, None, num_inference_steps=1).frames[0]
        assert theirs.shape == ours.shape == (self.frames, self.side, self.side, 3)
        assert np.abs(theirs - ours).max() <= LIMIT
        assert ours.std() > 0.01
