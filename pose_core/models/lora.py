"""The fake score: a LoRA on the frozen teacher, switched on and off around each forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig
from torch import nn

ADAPTER = "fake_score"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
"""Attention and feed-forward projections of a diffusers transformer block."""


def add_fake_score(module: Any, rank: int) -> None:
    """Freeze ``module`` and add a LoRA that is zero at the start, so fake and real score begin equal."""
    module.requires_grad_(False)
    module.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), adapter_name=ADAPTER)


def fake_score_parameters(module: Any) -> dict[str, nn.Parameter]:
    """The LoRA's own parameters by name."""
    return {name: parameter for name, parameter in module.named_parameters() if f".{ADAPTER}." in name}


@contextmanager
def without_fake_score(module: Any) -> Iterator[None]:
    """Inside, the module is the teacher alone; outside it is the fake score again, if it carries one."""
    if not getattr(module, "peft_config", None):
        yield
        return
    module.disable_adapters()
    try:
        yield
    finally:
        module.enable_adapters()
