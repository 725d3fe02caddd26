"""What a phase trains: the networks by role, the batch, and the random numbers of a step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pose_core.method.flow import Velocity, guided
from pose_core.models.heads import DiscriminatorHeads
from pose_core.models.lora import Role
from pose_core.models.video_model import Condition, StockModel, VideoModel


@dataclass(frozen=True)
class Batch:
    """Real clean latents ``x_0 [B, C, T, H, W]`` and what they are conditioned on; this rank's rows."""

    x_0: Tensor
    condition: Condition


@dataclass
class Networks:
    """Every network of a phase by its role; parallelism has already been applied to them.

    ``teacher`` is frozen; ``average`` is the generator's running average. The others exist where a turn updates them:
    ``fake``, the fake score; ``heads`` of the discriminator; ``discriminator``, a rival's backbone of its own. Roles
    may share one module (see ``models/lora.py``). ``null_text [1, L, D]`` is the empty prompt.
    """

    generator: Role
    average: Role
    teacher: Role
    null_text: Tensor
    fake: Role | None = None
    discriminator: Role | None = None
    heads: DiscriminatorHeads | None = None

    def roles(self) -> dict[str, Role]:
        """The transformers by role."""
        named = {
            "generator": self.generator,
            "average": self.average,
            "teacher": self.teacher,
            "fake_score": self.fake,
            "discriminator": self.discriminator,
        }
        return {name: role for name, role in named.items() if role is not None}

    def models(self) -> list[StockModel]:
        """The transformers behind the roles, each once: one that is a part of another is not named beside it."""
        models = {id(role.module): role.base for role in self.roles().values()}
        parts = {id(part) for model in models.values() for part in model.module.modules() if part is not model.module}
        return [model for key, model in models.items() if key not in parts]

    def modules(self) -> list[nn.Module]:
        """Everything that has weights, each once."""
        heads = [] if self.heads is None else [self.heads]
        return [*(model.module for model in self.models()), *heads]

    def groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """Trainable parameters by the name a turn calls them."""
        trained = ("generator", "fake_score", "discriminator")
        groups = {name: role.weights() for name, role in self.roles().items() if name in trained}
        if self.heads is not None:
            groups["heads"] = dict(self.heads.named_parameters())
        return groups

    def v_theta(self, condition: Condition) -> Velocity:
        """The generator's velocity with its condition bound."""
        return partial(_velocity, self.generator, condition)

    def v_average(self, condition: Condition) -> Velocity:
        """The averaged generator's velocity."""
        return partial(_velocity, self.average, condition)

    def v_phi(self, condition: Condition) -> Velocity:
        """The fake score's velocity, without guidance."""
        assert self.fake is not None
        return partial(_velocity, self.fake, condition)

    def v_real(self, condition: Condition, guidance: float) -> Velocity:
        """The frozen teacher's velocity with classifier-free guidance."""
        unconditional = condition.with_text(self.null_text)
        return guided(
            partial(_velocity, self.teacher, condition), partial(_velocity, self.teacher, unconditional), guidance
        )


def _velocity(model: VideoModel, condition: Condition, x_t: Tensor, t: Tensor) -> Tensor:
    return model.velocity(x_t, t, condition)


class Draws:
    """Random numbers of one step, the same whatever the number of ranks: drawn for the global batch, sliced by rank."""

    def __init__(self, seed: int, step: int, label: str, rank: int, ranks: int, device: torch.device):
        key = hashlib.sha256(f"{seed}/{label}/{step}".encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
        self.step, self.rank, self.ranks, self.device = step, rank, ranks, device

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
