"""What every model family offers to the rest of the program; a new family is one file that meets this protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Condition:
    """What a video is conditioned on, already encoded.

    text         ``[B, L, D_text]`` prompt embeddings, zeros behind the last token
    image        ``[B, N, D_image]`` embeddings of the first frame, or None (text to video)
    first_frame  ``[B, C_cond, T, H, W]`` mask and latents of the first frame, or None (text to video)
    """

    text: Tensor
    image: Tensor | None = None
    first_frame: Tensor | None = None

    @classmethod
    def of(cls, columns: Mapping[str, Tensor]) -> Condition:
        """Out of a training shard's columns ``text`` and, for image to video, ``image`` and ``first_frame``."""
        return cls(columns["text"], columns.get("image"), columns.get("first_frame"))

    def with_text(self, text: Tensor) -> Condition:
        """The same images with other prompts; ``text [1 or B, L, D_text]`` is repeated for the batch."""
        return Condition(text.expand(self.text.shape[0], -1, -1), self.image, self.first_frame)

    def rows(self, rows: slice | Tensor) -> Condition:
        """Some clips of the batch; ``rows`` may name one more than once."""
        return self._each(lambda part: part[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Condition:
        image, first_frame = (None if part is None else change(part) for part in (self.image, self.first_frame))
        return Condition(change(self.text), image, first_frame)


class VideoModel(Protocol):
    """A rectified-flow video transformer seen through the project's notation (time 0 = data, 1 = noise)."""

    compute_dtype: torch.dtype
    """Precision its inputs are cast to; ``training/parallel.py`` sets it."""

    @property
    def module(self) -> Any:
        """The stock network; parallelism, checkpoints and exports act on it."""
        ...

    @property
    def blocks(self) -> nn.ModuleList:
        """The repeated transformer blocks, the units of sharding."""
        ...

    @property
    def width(self) -> int:
        """Channels of a block's output."""
        ...

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """``v(x_t, t, c)`` for ``x_t [B, C, T, H, W]`` and ``t [B]`` in [0, 1]; shaped like ``x_t``."""
        ...

    def features(self, x_t: Tensor, t: Tensor, condition: Condition, blocks: Sequence[int]) -> list[Tensor]:
        """Outputs ``[B, tokens, width]`` of the blocks named by index, in the order asked for."""
        ...

    def share_tokens(self, mesh: Any) -> None:
        """From now on split a clip's tokens over the ranks of ``mesh``'s dimension ``ulysses`` (context parallelism).

        All of them are given the same clips and get the same outputs; each has its own tokens' part of a gradient.
        """
        ...

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write full ``weights`` of this model as a folder that stock diffusers loads."""
        ...
