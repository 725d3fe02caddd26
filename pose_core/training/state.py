"""What a phase trains: the networks by role, the batch, and the random numbers of a step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pose_core.method.flow import Velocity, guided
from pose_core.models.heads import DiscriminatorHeads
from pose_core.models.lora import Role
from pose_core.models.video_model import Condition, StockModel, bound
from pose_core.training.parallel import Mesh


@dataclass(frozen=True)
class Batch:
    """Real clean latents ``x_0 [B, C, T, H, W]`` and what they are conditioned on; this rank's rows."""

    x_0: Tensor
    condition: Condition

    def parts(self, count: int) -> list[Batch]:
        """The clips in ``count`` equal parts, in order."""
        size = len(self.x_0) // count
        rows = [slice(start, start + size) for start in range(0, size * count, size)]
        return [Batch(self.x_0[each], self.condition.rows(each)) for each in rows]


@dataclass
class Networks:
    """Every network of a phase by its role; parallelism has already been applied to them.

    ``teacher`` is frozen; ``average`` is the generator's running average. The others exist where a turn updates them:
    ``fake``, the fake score; ``heads`` of the discriminator; ``discriminator``, a rival's backbone of its own. Roles
    may share one module (see ``models/lora.py``). ``null_text [1, L, D]`` is the empty prompt. ``mesh`` is there once
    they are sharded.
    """

    generator: Role
    average: Role
    teacher: Role
    null_text: Tensor
    fake: Role | None = None
    discriminator: Role | None = None
    heads: DiscriminatorHeads | None = None
    mesh: Mesh | None = None
    conditioning_time: float = 1.0

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
        """The generator's velocity with its condition bound; of pure noise it is told ``conditioning_time``."""
        return bound(self.generator, condition, self.conditioning_time)

    def v_phi(self, condition: Condition) -> Velocity:
        """The fake score's velocity, without guidance."""
        assert self.fake is not None
        return bound(self.fake, condition)

    def v_real(self, condition: Condition, guidance: float) -> Velocity:
        """The frozen teacher's velocity with classifier-free guidance."""
        unconditional = condition.with_text(self.null_text)
        return guided(bound(self.teacher, condition), bound(self.teacher, unconditional), guidance)


class Draws:
    """Random numbers of one step: every clip of the global batch has its own, however clips are spread over ranks.

    ``first_clip`` is the place in the global batch of the first clip that is drawn for.
    """

    def __init__(self, seed: int, step: int, label: str, first_clip: int, device: torch.device):
        self.key, self.step, self.first_clip, self.device = f"{seed}/{label}/{step}", step, first_clip, device
        self.generators: dict[int, torch.Generator] = {}

    def normal(self, like: Tensor, **sizes_of_one: int) -> Tensor:
        """Standard Gaussian noise shaped like ``like [B, C, T, H, W]``; dimensions named T, H or W may be 1."""
        shape = list(like.shape)
        for name, size in sizes_of_one.items():
            shape["BCTHW".index(name)] = size
        return self._stack(len(like), lambda generator: torch.randn(shape[1:], generator=generator))

    def uniform(self, like: Tensor) -> Tensor:
        """One number in [0, 1) a clip, ``[B]``."""
        return self._stack(len(like), lambda generator: torch.rand((), generator=generator))

    def _stack(self, clips: int, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([draw(self._generator(clip)) for clip in range(clips)]).to(self.device)

    def _generator(self, clip: int) -> torch.Generator:
        if clip not in self.generators:
            key = hashlib.sha256(f"{self.key}/{self.first_clip + clip}".encode()).digest()
            self.generators[clip] = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
        return self.generators[clip]
