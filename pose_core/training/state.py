"""What a phase trains: the networks by role, the batch, and the random numbers of a step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pose_core.method.flow import Velocity, guided
from pose_core.models.heads import DiscriminatorHeads
from pose_core.models.lora import fake_score_parameters, without_fake_score
from pose_core.models.video_model import Condition, VideoModel


@dataclass(frozen=True)
class Batch:
    """Real clean latents ``x_0 [B, C, T, H, W]`` and what they are conditioned on; this rank's rows."""

    x_0: Tensor
    condition: Condition


@dataclass
class Networks:
    """Every network of a phase by its role; parallelism has already been applied to them.

    ``teacher`` is frozen and carries the fake-score LoRA in priming; ``average`` is the generator's running average;
    ``heads`` exist in equilibrium only. ``null_text [1, L, D]`` is the empty prompt.
    """

    generator: VideoModel
    average: VideoModel
    teacher: VideoModel
    null_text: Tensor
    heads: DiscriminatorHeads | None = None

    def groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """Trainable parameters by the name a turn calls them."""
        groups = {"generator": dict(self.generator.module.named_parameters())}
        if fake := fake_score_parameters(self.teacher.module):
            groups["fake_score"] = fake
        if self.heads is not None:
            groups["heads"] = dict(self.heads.named_parameters())
        return groups

    def v_theta(self, condition: Condition) -> Velocity:
        """The generator's velocity with its condition bound."""
        return partial(_velocity, self.generator, condition)

    def v_phi(self, condition: Condition) -> Velocity:
        """The fake score's velocity, the teacher with its LoRA, without guidance."""
        return partial(_velocity, self.teacher, condition)

    def v_real(self, condition: Condition, guidance: float) -> Velocity:
        """The frozen teacher's velocity with classifier-free guidance."""

        def teacher(condition: Condition, x_t: Tensor, t: Tensor) -> Tensor:
            with without_fake_score(self.teacher.module):
                return self.teacher.velocity(x_t, t, condition)

        return guided(partial(teacher, condition), partial(teacher, condition.with_text(self.null_text)), guidance)


def _velocity(model: VideoModel, condition: Condition, x_t: Tensor, t: Tensor) -> Tensor:
    return model.velocity(x_t, t, condition)


class Draws:
    """Random numbers of one step, the same whatever the number of ranks: drawn for the global batch, sliced by rank."""

    def __init__(self, seed: int, step: int, label: str, rank: int, ranks: int, device: torch.device):
        key = hashlib.sha256(f"{seed}/{label}/{step}".encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
        self.rank, self.ranks, self.device = rank, ranks, device

    def normal(self, like: Tensor, **sizes_of_one: int) -> Tensor:
        """Standard Gaussian noise shaped like ``like [B, C, T, H, W]``; dimensions named T, H or W may be 1."""
        shape = list(like.shape)
        for name, size in sizes_of_one.items():
            shape["BCTHW".index(name)] = size
        return self._mine(torch.randn(shape[0] * self.ranks, *shape[1:], generator=self.generator))

    def uniform(self, like: Tensor) -> Tensor:
        """One number in [0, 1) a clip, ``[B]``."""
        return self._mine(torch.rand(len(like) * self.ranks, generator=self.generator))

    def _mine(self, values: Tensor) -> Tensor:
        return values.chunk(self.ranks)[self.rank].to(self.device)
