"""Wan 2.2 A14B: two experts, one for noisy inputs and one for the rest, that share nothing but their form.

A score comes from the expert that owns the noise level. The generator, which starts at pure noise, is the expert for
noisy inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pose_core.errors import CheckpointError
from pose_core.models.adapter import TIMESTEPS, Adapter
from pose_core.models.folders import read_index
from pose_core.models.video_model import Condition, StockModel
from pose_core.models.wan import Wan, WanFamily, count_image_tokens, load_part

Evaluate = Callable[[Wan, Tensor], list[Tensor]]
"""Outputs ``[rows, ...]`` of an expert for the clips named by a tensor of indices."""


class ExpertPair(nn.Module):
    """Both transformers under one module, named as in a diffusers folder."""

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module):
        super().__init__()
        self.transformer, self.transformer_2 = transformer, transformer_2

    def add_adapter(self, config: Any, adapter_name: str) -> None:
        """A LoRA on each, as the stock transformers add it."""
        for expert in self.children():
            expert.add_adapter(config, adapter_name=adapter_name)  # type: ignore[operator]


class Experts(Adapter):
    """Two Wan transformers, of which ``high`` owns the times from ``boundary`` to 1 and ``low`` those below."""

    def __init__(self, high: Wan, low: Wan, boundary: float):
        self.high, self.low, self.boundary = high, low, boundary
        super().__init__(ExpertPair(high.module, low.module))
        self.unread = high.unread + low.unread
        high.unread = low.unread = []

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.high.compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype) -> None:
        self.high.compute_dtype = self.low.compute_dtype = dtype

    @property
    def roots(self) -> list[Any]:
        return [self.high.module, self.low.module]

    @property
    def start(self) -> StockModel:
        return self.high

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [*self.high.blocks, *self.low.blocks]

    @property
    def width(self) -> int:
        return self.high.width

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition, told: Tensor | None = None) -> Tensor:
        """See ``VideoModel``; the time that is told decides whose clip it is."""
        heard = t if told is None else told

        def evaluate(expert: Wan, rows: Tensor) -> list[Tensor]:
            return [expert.velocity(x_t[rows], t[rows], condition.rows(rows), heard[rows])]

        return self._by_owner(heard, evaluate)[0]

    def features(self, x_t: Tensor, t: Tensor, condition: Condition, blocks: Sequence[int]) -> list[Tensor]:
        """Outputs ``[B, tokens, width]`` of each clip's expert's blocks, in the order asked for."""

        def evaluate(expert: Wan, rows: Tensor) -> list[Tensor]:
            return expert.features(x_t[rows], t[rows], condition.rows(rows), blocks)

        return self._by_owner(t, evaluate)

    def share_tokens(self, mesh: Any) -> None:
        """See ``VideoModel``."""
        for expert in (self.high, self.low):
            expert.share_tokens(mesh)

    def _by_owner(self, t: Tensor, evaluate: Evaluate) -> list[Tensor]:
        """Every clip by the expert that owns its time; an expert that any rank needs runs on all of them.

        Sharded weights are gathered by all ranks together. A rank without a clip for such an expert runs its first
        clip through it and leaves the result, and its gradients, out by a factor of 0.
        """
        noisy = t * TIMESTEPS >= self.boundary * TIMESTEPS
        outputs: list[Tensor] = []
        for expert, owned in ((self.high, noisy), (self.low, ~noisy)):
            if not self.any_rank(owned.any()):
                continue
            # In their order; unlike ``nonzero`` this also runs on tensors that hold no numbers, for a plan.
            rows = torch.argsort(~owned, stable=True)[: int(owned.sum())]
            idle = rows.numel() == 0
            found = evaluate(expert, rows.new_zeros(1) if idle else rows)
            outputs = outputs or [each.new_zeros(len(t), *each.shape[1:]) for each in found]
            outputs = [
                output + 0 * each.sum() if idle else output.index_copy(0, rows, each)
                for output, each in zip(outputs, found, strict=True)
            ]
        return outputs


class A14BFamily(WanFamily):
    """Wan 2.2 A14B, text or image to video; its image to video has no image encoder."""

    name = "wan22_a14b"

    def load_teacher(self, folder: Path, *, meta: bool = False, dtype: torch.dtype = torch.float32) -> Adapter:
        boundary = read_index(folder).get("boundary_ratio")
        if not isinstance(boundary, float):
            raise CheckpointError(
                f"{folder}/model_index.json has no boundary_ratio, which says what noise each expert owns: "
                "fetch the folder again",
                in_call=True,
            )
        tokens = count_image_tokens(folder)
        high, low = (
            load_part(Wan, folder, part, tokens, self.name, meta, dtype) for part in ("transformer", "transformer_2")
        )
        return Experts(high, low, boundary)

    def one_step_index(self, index: dict[str, Any], task: str) -> dict[str, Any]:
        # One network makes every step now: the stock pipeline must not ask the other expert.
        alone = {"transformer_2": [None, None], "boundary_ratio": None}
        return super().one_step_index(index, task) | alone


FAMILY = A14BFamily()
