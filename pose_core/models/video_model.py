"""What every model family offers to the rest of the program; a new family is one file that meets this protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Condition:
    """What a video is conditioned on, already encoded.

    text         ``[B, L, D_text]`` prompt embeddings, zeros behind the last token
    image        ``[B, N, D_image]`` embeddings of the first frame, or None (text to video, no image encoder)
    first_frame  ``[B, C_cond, T, H, W]`` mask and latents of the first frame, ``[B, C, 1, H, W]`` the latents alone
                 where the model takes them in the clip's place, or None (text to video)
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
        """The stock network, or several under one module; optimisers, checkpoints and exports act on it."""
        ...

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The repeated transformer blocks, the units of sharding."""
        ...

    @property
    def width(self) -> int:
        """Channels of a block's output."""
        ...

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition, told: Tensor | None = None) -> Tensor:
        """``v(x_t, t, c)`` for ``x_t [B, C, T, H, W]`` and ``t [B]`` in [0, 1]; shaped like ``x_t``.

        ``told [B]`` is the time that the network is given where that is not ``t``.
        """
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


def bound(
    model: VideoModel, condition: Condition, conditioning_time: float = 1.0
) -> Callable[[Tensor, Tensor], Tensor]:
    """The model's velocity ``v(x_t, t)`` with its condition bound; of pure noise it is told ``conditioning_time``.

    Told an earlier time than 1 it takes the noise for a clip's and leans on it more.
    """
    return partial(_velocity, model, condition, conditioning_time)


def _velocity(model: VideoModel, condition: Condition, conditioning_time: float, x_t: Tensor, t: Tensor) -> Tensor:
    told = None if conditioning_time == 1 else torch.where(t == 1, conditioning_time, t)
    return model.velocity(x_t, t, condition, told)


class StockModel(VideoModel, Protocol):
    """A video model with weights of its own, which roles are seen through; what a family loads."""

    blocks_at: str
    """Attribute of a stock network that holds its repeated blocks."""
    any_rank: Callable[[Tensor], bool]
    """Whether a flag is true on any rank, where ranks must agree on which network runs; ``parallel.py`` sets it."""
    unread: list[tuple[Any, Any]]
    """Networks built on the meta device and the ``Weights`` that they still lack."""

    @property
    def roots(self) -> list[Any]:
        """The networks that are called, each a root of sharding."""
        ...

    @property
    def start(self) -> StockModel:
        """The network that a generator starts from: this one, or of several experts the one for the noisiest inputs."""
        ...

    def read_weights(self) -> None:
        """Read what is unread, whole."""
        ...


class Codec(Protocol):
    """The frozen encoders around a transformer. It owns the normalisation of latents and what a prompt becomes."""

    text_tokens: int
    """Prompt tokens kept."""

    @property
    def temporal_factor(self) -> int:
        """Frames a latent frame stands for; the first stands for one alone."""
        ...

    def encode_video(self, video: np.ndarray) -> Tensor:
        """Clips ``[B, F, H, W, 3]`` uint8 to normalised latents ``[B, C, T, h, w]``, float32."""
        ...

    def encode_text(self, prompts: list[str]) -> Tensor:
        """Prompts to embeddings ``[B, L, D_text]``, zeros wherever there is no token."""
        ...

    def encode_condition(self, prompts: list[str], first_frames: np.ndarray | None, frames: int) -> Condition:
        """Prompts and, for image to video, first frames ``[B, H, W, 3]`` uint8 of clips with ``frames`` frames."""
        ...

    def decode(self, latents: Tensor) -> np.ndarray:
        """Normalised latents ``[B, C, T, h, w]`` to clips ``[B, F, H, W, 3]``, float32 in [0, 1]."""
        ...

    def decode_uint8(self, latents: Tensor) -> np.ndarray:
        """``decode`` as pixels 0..255, uint8."""
        ...


Shape = tuple[int, ...]


@dataclass(frozen=True)
class ClipShapes:
    """What one clip becomes on its way through the model, without the batch axis."""

    pixels: Shape
    """``(3, F, H, W)``"""
    latents: Shape
    """``(C, T, h, w)``"""
    text: Shape
    """``(L, D_text)``"""
    image: Shape | None
    """``(N, D_image)``, None for text to video or without an image encoder"""
    first_frame: Shape | None
    """``(C_cond, T or 1, h, w)``, None for text to video"""
    tokens: int
    """Length of the sequence the transformer attends over."""

    @property
    def trained_on(self) -> list[Shape]:
        """The tensors of a training row."""
        return [shape for shape in (self.latents, self.text, self.image, self.first_frame) if shape is not None]


@dataclass(frozen=True)
class ConditionWidths:
    """Channels of what a clip is conditioned on; 0 where there is none of it."""

    text: int
    image: int = 0
    first_frame: int = 0


class Family(Protocol):
    """Everything the program asks of a family of models; ``families.py`` knows them by name."""

    name: str
    """What ``model.family`` calls it."""
    pipelines: Mapping[str, str]
    """The stock pipeline that loads an exported folder, by task."""
    shares_tokens: bool
    """Whether ``StockModel.share_tokens`` works: ranks can split the tokens of one clip."""

    def tasks(self, folder: Path) -> tuple[str, ...]:
        """``i2v``, ``t2v`` or both: what the model in the folder can be conditioned on."""
        ...

    def widths(self, folder: Path, task: str) -> ConditionWidths:
        """Channels of the condition."""
        ...

    def load_teacher(self, folder: Path, *, meta: bool = False, dtype: torch.dtype = torch.float32) -> StockModel:
        """The pretrained model; ``meta`` leaves its weights unread, ``dtype`` is what they are kept in.

        Raises:
            CheckpointError: what the folder lacks, or that it is of another family (correctable in the call).
        """
        ...

    def load_generator(
        self, folder: Path, teacher: Path, *, meta: bool = False, dtype: torch.dtype = torch.float32
    ) -> StockModel:
        """The network in ``<folder>/transformer`` that a generator is or starts from; ``teacher`` has the other parts.

        Raises:
            CheckpointError: as ``load_teacher``.
        """
        ...

    def load_codec(self, folder: Path, text_tokens: int, device: str = "cpu", *, only_video: bool = False) -> Codec:
        """Every part but the transformers; ``only_video`` is content with what encodes and decodes videos.

        Raises:
            CheckpointError: naming the part that is missing or does not load.
        """
        ...

    def compression(self, folder: Path) -> tuple[int, int]:
        """Frames that become one latent frame, and what a clip's sides must be multiples of, in pixels."""
        ...

    def clip_shapes(
        self, folder: Path, *, task: str, frames: int, height: int, width: int, text_tokens: int
    ) -> ClipShapes:
        """Shapes of a clip of ``frames`` frames of ``height`` x ``width`` pixels, from configs alone.

        Raises:
            CheckpointError: a config is missing, or the clip's size is not one that the model takes.
        """
        ...

    def one_step_index(self, index: dict[str, Any], task: str) -> dict[str, Any]:
        """The teacher's ``model_index.json`` as that of an exported one-step folder."""
        ...

    def finish_export(self, out: Path) -> None:
        """Change in an exported folder what else has to differ from the teacher's."""
        ...
