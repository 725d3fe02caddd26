"""What the adapters of all families have in common: blocks and their features, how weights are read and written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pose_core.errors import CheckpointError, ConfigError
from pose_core.models.folders import read_config
from pose_core.models.video_model import Condition, StockModel
from pose_core.models.weights import Weights

TIMESTEPS = 1000
"""Scale of the time that stock transformers are given."""
SMALLEST_TIME = 1e-3
"""Below it the velocity of a given frame is no longer divided by the time."""


class Adapter:
    """A stock transformer behind ``VideoModel``; a family adds ``velocity`` and says where its blocks are."""

    blocks_at = "blocks"
    """Attribute of the stock transformer that holds its repeated blocks."""

    def __init__(self, module: Any, weights: Weights | None = None):
        """``weights`` are those that a module on the meta device still lacks."""
        self.module = module
        self.compute_dtype = torch.float32
        self.any_rank: Callable[[Tensor], bool] = bool
        self.unread = [] if weights is None else [(module, weights)]

    @property
    def roots(self) -> list[Any]:
        """The networks that are called, one after the other where there are several."""
        return [self.module]

    @property
    def start(self) -> StockModel:
        """The network that a generator starts from."""
        return self

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return getattr(self.module, self.blocks_at)

    @property
    def width(self) -> int:
        return self.module.config.num_attention_heads * self.module.config.attention_head_dim

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition, told: Tensor | None = None) -> Tensor:
        """See ``VideoModel``."""
        raise NotImplementedError

    def features(self, x_t: Tensor, t: Tensor, condition: Condition, blocks: Sequence[int]) -> list[Tensor]:
        """Outputs ``[B, tokens, width]`` of the blocks named by index, in the order asked for; no later one runs."""
        outputs: dict[int, Tensor] = {}

        def keep(index: int) -> Callable[..., None]:
            # Blocks with a stream for the text return it behind the video's.
            return lambda _module, _inputs, output: outputs.__setitem__(
                index, output[0] if isinstance(output, tuple) else output
            )

        every = self.blocks
        hooks = [every[index].register_forward_hook(keep(index)) for index in blocks]
        setattr(self.module, self.blocks_at, every[: max(blocks) + 1])
        try:
            self.velocity(x_t, t, condition)
        finally:
            setattr(self.module, self.blocks_at, every)
            for hook in hooks:
                hook.remove()
        return [outputs[index] for index in blocks]

    def share_tokens(self, mesh: Any) -> None:
        """See ``VideoModel``."""
        raise ConfigError(
            f"training.context_workers is for Wan models: {type(self.module).__name__} cannot share a clip's tokens, "
            "set training.context_workers=1"
        )

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write full ``weights`` of this model as a folder that stock diffusers loads."""
        with torch.device("meta"):
            module = type(self.module).from_config(self.module.config)
        module.load_state_dict(weights, assign=True)
        module.save_pretrained(folder)

    def read_weights(self) -> None:
        """Read whole what was built without memory; for one process, see ``training/parallel.py`` for more.

        Raises:
            CheckpointError: the files are missing, damaged or of another model (correctable in the call).
        """
        for module, weights in self.unread:
            weights.fill(module)
        self.unread = []


def build_empty(kind: Any, folder: Path, part: str, family: str, dtype: torch.dtype) -> Any:
    """The stock network of ``<folder>/<part>`` on the meta device, its weights to come in ``dtype``.

    The stock loader keeps some weights in float32; sharding computes in one precision anyway (training/parallel.py).

    Raises:
        CheckpointError: the config is missing, or is that of another class (correctable in the call).
    """
    config = read_config(folder, part)
    found = config.get("_class_name")
    if found != kind.__name__:
        raise CheckpointError(
            f"{folder}/{part} is a {found}, model.family={family} needs a {kind.__name__}", in_call=True
        )
    with torch.device("meta"):
        module = kind.from_config(config)
    return nn.Module.to(module, dtype).eval()


def with_given_frame(x_t: Tensor, first_frame: Tensor) -> Tensor:
    """``x_t [B, C, T, H, W]`` with the clean latents ``first_frame [B, C, 1, H, W]`` at its beginning."""
    return torch.cat([first_frame.to(x_t.dtype), x_t[:, :, 1:]], dim=2)


def keep_given_frame(velocity: Tensor, x_t: Tensor, first_frame: Tensor, t: Tensor) -> Tensor:
    """``velocity`` with that of the given frame, which leads from ``x_t`` straight to it: ``(x_t - first_frame) / t``.

    A network that is given the clean first frame predicts nothing useful for it, and the stock pipelines put the given
    frame back in its place. With this velocity every clean estimate and every sample holds it exactly.
    """
    time = t.clamp(min=SMALLEST_TIME).view(-1, 1, 1, 1, 1).to(x_t.dtype)
    return torch.cat([(x_t[:, :, :1] - first_frame.to(x_t.dtype)) / time, velocity[:, :, 1:]], dim=2)
