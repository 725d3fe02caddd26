"""The running average of the generator, kept in the generator's own shards."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, decay: float) -> None:
    """``average <- decay average + (1 - decay) module``, parameter by parameter, without gathering any of them."""
    for kept, new in zip(average.parameters(), module.parameters(), strict=True):
        _local(kept).lerp_(_local(new), 1 - decay)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
