"""LoRA adapters on a transformer, and networks that share one set of frozen weights through them.

Teacher, fake score, generator and its average can be one base with an adapter each: a ``Role`` is the base seen through
one adapter, or through none. Adapters are zero at the start, so every role begins as the base.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from pose_core.errors import CheckpointError
from pose_core.models.video_model import Condition, StockModel

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "ff.net.0.proj", "ff.net.2"]
"""Attention and feed-forward projections of the diffusers transformer blocks, whichever of them there are."""
ADAPTER_FILE = "adapter.safetensors"


class Role:
    """A video model seen through one of its adapters, or without any; meets ``VideoModel``."""

    def __init__(self, base: StockModel, adapter: str | None = None):
        self.base, self.adapter = base, adapter

    @property
    def module(self) -> Any:
        return self.base.module

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.base.compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype) -> None:
        self.base.compute_dtype = dtype

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.base.blocks

    @property
    def width(self) -> int:
        return self.base.width

    def weights(self) -> dict[str, nn.Parameter]:
        """This role's own parameters by name: its adapter's, or without one the base's."""
        mine = (lambda name: f".{self.adapter}." in name) if self.adapter else (lambda name: ".lora_" not in name)
        return {name: parameter for name, parameter in self.module.named_parameters() if mine(name)}

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition, told: Tensor | None = None) -> Tensor:
        """See ``VideoModel``."""
        with switched_to(self.module, self.adapter):
            return self.base.velocity(x_t, t, condition, told)

    def features(self, x_t: Tensor, t: Tensor, condition: Condition, blocks: Sequence[int]) -> list[Tensor]:
        """Outputs ``[B, tokens, width]`` of the blocks named by index, in the order asked for."""
        with switched_to(self.module, self.adapter):
            return self.base.features(x_t, t, condition, blocks)

    def share_tokens(self, mesh: Any) -> None:
        """See ``VideoModel``."""
        self.base.share_tokens(mesh)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write full ``weights`` of the module as a folder that stock diffusers loads, this role's adapter merged in.

        The adapter alone goes beside it, so that a later phase can go on with it on the same base.
        """
        self.base.save(folder, merge(weights, self.adapter))
        if self.adapter is not None:
            marker = f".{self.adapter}."
            own = {name.replace(marker, "."): value for name, value in weights.items() if marker in name}
            save_file({name: value.contiguous() for name, value in own.items()}, folder.parent / ADAPTER_FILE)


def add_adapter(model: StockModel, adapter: str, rank: int) -> Role:
    """Freeze the base's own weights and add a LoRA, in float32, that changes nothing yet.

    It is made on torch's default device, where a base whose weights are still unread is on none.
    """
    for name, parameter in model.module.named_parameters():
        if ".lora_" not in name:
            parameter.requires_grad_(False)
    with _where_made():
        # By name inside the blocks: the embedders of some families have layers of the same names.
        layers = rf"{model.blocks_at}\.\d+\.(.*\.)?({'|'.join(map(re.escape, TARGETS))})"
        model.module.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), adapter_name=adapter)
    role = Role(model, adapter)
    # peft lets only the newest adapter learn; here each learns unless its owner freezes it, and all in float32.
    for name, parameter in model.module.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
    return role


@contextmanager
def _where_made() -> Iterator[None]:
    """Inside, new adapters stay where and as they are made.

    peft moves them to their layer, twice; with that one on the meta device their initial values would be lost.
    """
    moves = LoraLayer._move_adapter_to_device_of_base_layer, LoraModel._replace_module
    LoraLayer._move_adapter_to_device_of_base_layer = lambda *_arguments, **_named: None
    LoraModel._replace_module = lambda _self, parent, name, made, _child: setattr(parent, name, made)
    try:
        yield
    finally:
        LoraLayer._move_adapter_to_device_of_base_layer, LoraModel._replace_module = moves


@torch.no_grad()
def load_adapter(role: Role, file: Path) -> None:
    """Set the role's adapter to the weights that ``Role.save`` left in ``file``.

    Raises:
        CheckpointError: when they are of another rank or another model (correctable in the call).
    """
    own, marker = role.weights(), f".{role.adapter}."
    stored = load_file(file)
    wanted = {name.replace(marker, "."): parameter for name, parameter in own.items()}
    if {k: v.shape for k, v in stored.items()} != {k: v.shape for k, v in wanted.items()}:
        raise CheckpointError(
            f"{file} does not fit this model with training.lora_rank: use the rank it was trained with", in_call=True
        )
    for name, parameter in wanted.items():
        parameter.copy_(stored[name])


@contextmanager
def switched_to(module: nn.Module, adapter: str | None) -> Iterator[None]:
    """Inside, forward passes of ``module`` go through ``adapter``, or through none.

    peft's own switches also change which parameters learn, which would tear graphs of other roles that are not yet
    differentiated; so its layers' state is set directly and put back.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active


def checkpoint_activations(model: StockModel, *, keep_attention: bool = False) -> None:
    """Recompute block activations in the backward pass, through the adapter that the forward pass went through.

    ``keep_attention`` keeps what attention gave, which costs most to compute again for its bytes.
    """
    context = partial(create_selective_checkpoint_contexts, _keep_attention) if keep_attention else noop_context_fn

    def run(block: nn.Module, *inputs: Any) -> Any:
        layer = next((layer for layer in block.modules() if isinstance(layer, BaseTunerLayer)), None)
        adapter = None if layer is None or layer._disable_adapters else layer._active_adapter[0]

        def forward(*again: Any) -> Any:
            with switched_to(block, adapter):
                return block(*again)

        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=context)

    for root in model.roots:
        root.enable_gradient_checkpointing(run)


def _keep_attention(_context: Any, operation: Any, *_inputs: Any, **_options: Any) -> CheckpointPolicy:
    attention = str(operation).startswith("aten._scaled_dot_product")
    return CheckpointPolicy.MUST_SAVE if attention else CheckpointPolicy.PREFER_RECOMPUTE


def merge(weights: dict[str, Tensor], adapter: str | None) -> dict[str, Tensor]:
    """A module's full ``weights`` as the stock module has them: ``W + B A``, other adapters left out."""
    merged = {name.replace(".base_layer.", "."): value for name, value in weights.items() if ".lora_" not in name}
    if adapter is None:
        return merged
    for name, down in weights.items():
        if f".lora_A.{adapter}." in name:
            up = weights[name.replace(".lora_A.", ".lora_B.")]
            target = name.replace(f".lora_A.{adapter}.", ".")
            # The scale is alpha / rank, which ``add_adapter`` makes 1.
            merged[target] = (merged[target].float() + up.float() @ down.float()).to(merged[target].dtype)
    return merged
