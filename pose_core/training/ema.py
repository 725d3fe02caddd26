"""The running average of the generator, kept in the generator's own shards."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


@torch.no_grad()
def follow(average: Mapping[str, nn.Parameter], weights: Mapping[str, nn.Parameter], decay: float) -> None:
    """``average <- decay average + (1 - decay) weights``, parameter by parameter, without gathering any of them."""
    for kept, new in zip(average.values(), weights.values(), strict=True):
        _local(kept).lerp_(_local(new), 1 - decay)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
