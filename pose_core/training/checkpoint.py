"""Training state as a distributed checkpoint: every rank writes and reads its own shards; nothing is unpickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from pose_core.errors import CheckpointError
from pose_core.models.lora import fake_score_parameters
from pose_core.training.state import Networks

PARTIAL = StateDictOptions(strict=False)


def save(folder: Path, step: int, networks: Networks, optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """Write the state after ``step`` finished steps; every rank must call it with its own or a shared folder."""
    dcp.save(_state(step, networks, optimizers), checkpoint_id=folder)


def load(folder: Path, networks: Networks, optimizers: dict[str, torch.optim.Optimizer]) -> int:
    """Restore networks and optimisers in place; the number of finished steps.

    Raises:
        CheckpointError: when the folder is not a checkpoint of these networks.
    """
    state = _state(0, networks, optimizers)
    try:
        dcp.load(state, checkpoint_id=folder)
    except Exception as error:  # DCP raises many types; all of them mean that this folder cannot be used
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder} is not a checkpoint of this run: {reason}") from error
    for name, module in _modules(networks).items():
        set_model_state_dict(module, state["networks"][name], options=PARTIAL)
    for name, optimizer in optimizers.items():
        set_optimizer_state_dict(_owner(networks, name), optimizer, state["optimizers"][name])
    return state["step"]


def _state(step: int, networks: Networks, optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Any]:
    weights = {name: get_model_state_dict(module) for name, module in _modules(networks).items()}
    if "fake_score" in weights:
        own = fake_score_parameters(networks.teacher.module)
        weights["fake_score"] = {name: value for name, value in weights["fake_score"].items() if name in own}
    return {
        "step": step,
        "networks": weights,
        "optimizers": {
            name: get_optimizer_state_dict(_owner(networks, name), optimizer) for name, optimizer in optimizers.items()
        },
    }


def _modules(networks: Networks) -> dict[str, nn.Module]:
    modules = {"generator": networks.generator.module, "average": networks.average.module}
    return modules | {name: _owner(networks, name) for name in networks.groups() if name != "generator"}


def _owner(networks: Networks, group: str) -> nn.Module:
    """The module that holds a group of parameters."""
    if group == "heads":
        assert networks.heads is not None
        return networks.heads
    return networks.teacher.module if group == "fake_score" else networks.generator.module
