"""Training state as a distributed checkpoint: every rank writes and reads its own shards.

Checkpoints lie in storage that others may write to, so reading one runs nothing that lies in it.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from pose_core.errors import CheckpointError
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
        dcp.load(state, storage_reader=_Reader(folder), planner=_Planner())
    # DCP raises many types, one of them no Exception; all of them mean that this folder cannot be used.
    except (Exception, CheckpointException) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        reason = " ".join(str(cause).split())[:300]
        raise CheckpointError(
            f"{folder} is not a checkpoint of this run: {reason}; remove it or choose another run.name"
        ) from error
    for name, module in _stored(networks).items():
        set_model_state_dict(module, state["networks"][name], options=PARTIAL)
    for name, optimizer in optimizers.items():
        set_optimizer_state_dict(_stored(networks)[name], optimizer, state["optimizers"][name])
    return state["step"]


def _state(step: int, networks: Networks, optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Any]:
    stored = _stored(networks)
    return {
        "step": step,
        "networks": {name: _own(networks, name, module) for name, module in stored.items()},
        "optimizers": {name: get_optimizer_state_dict(stored[name], each) for name, each in optimizers.items()},
    }


def _stored(networks: Networks) -> dict[str, nn.Module]:
    """The modules behind what changes, by role; roles may share one. The frozen teacher is not stored."""
    modules = {name: role.module for name, role in networks.roles().items() if name != "teacher"}
    return modules if networks.heads is None else modules | {"heads": networks.heads}


def _own(networks: Networks, name: str, module: nn.Module) -> dict[str, Any]:
    """A role's own weights out of its module's."""
    weights = get_model_state_dict(module)
    if name == "heads":
        return weights
    own = networks.roles()[name].weights()
    return {key: value for key, value in weights.items() if key in own}


class _Reader(dcp.FileSystemReader):
    """Unpickles a checkpoint's index, which is a pickle by format, with nothing but the index's own types."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _IndexUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    known = {
        "torch": {"Size"},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            "_MEM_FORMAT_ENCODING",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
        },
        "pathlib": {"PosixPath", "WindowsPath"},
        "pathlib._local": {"PosixPath", "WindowsPath"},
    }

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self.known.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its index names {module}.{name}, which no index needs")


class _Planner(dcp.DefaultLoadPlanner):
    """Takes only a checkpoint that holds exactly what is asked for, and unpickles only plain numbers and strings."""

    def create_local_plan(self) -> dcp.LoadPlan:
        assert self.metadata is not None
        other = self.metadata.state_dict_metadata.keys() ^ self.state_dict.keys()
        if other:
            raise ValueError(f"{len(other)} entries are in only one of the two, e.g. {min(other)}")
        return super().create_local_plan()

    def load_bytes(self, read_item: dcp.ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # refuses code; the stock planner below would run it
        value.seek(0)
        super().load_bytes(read_item, value)
