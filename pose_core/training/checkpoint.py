"""Training state as a distributed checkpoint: every rank writes and reads its own shards, in the background.

Checkpoints lie in storage that others may write to, so reading one runs nothing that lies in it.
"""

from __future__ import annotations

import io
import threading
import uuid
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from pose_core.errors import CheckpointError, ClusterError, PoseError, StorageGoneError
from pose_core.training import parallel
from pose_core.training.checkpoint_files import Commit, Files, Reader, Writer
from pose_core.training.checkpoint_staging import Staging, layout
from pose_core.training.optimizers import group_of
from pose_core.training.parallel import Shared
from pose_core.training.state import Networks

_FLAT = "flat"
"""Under it the planner finds all there is: DCP takes its time over each entry of what it is given."""


class Saver:
    """Saves in the background: ``start`` copies the state to the CPU and returns, a thread writes the copy.

    Every rank must make one and call its methods in the same order. The thread has a process group of its own, so that
    the ranks' agreement on a checkpoint never meets their training. ``timeout_seconds`` is how long a rank waits for
    another to finish writing.
    """

    def __init__(self, timeout_seconds: float = 1800.0):
        self.group = None
        if dist.is_initialized():
            self.group = parallel.cpu_group(timeout_seconds)
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._failure: PoseError | None = None
        self._planner = _SavePlanner()

    def start(
        self,
        files: Files,
        step: int,
        networks: Networks,
        optimizers: dict[str, torch.optim.Optimizer],
        commit: Commit,
    ) -> None:
        """Begin to write the state after ``step`` finished steps; it may change as soon as this returns.

        Raises:
            PoseError: why the checkpoint before this one could not be written.
        """
        self.wait()
        staged = self._staging.copy(_state(step, networks, optimizers))
        # A daemon: a worker that ends by an error does not wait for a store that is away.
        self._thread = threading.Thread(target=self._write, args=(files, step, staged, commit), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return once the checkpoint that was begun last is committed.

        Raises:
            PoseError: why it could not be written; the same kind on all ranks.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def from_first_rank(self, value: Shared) -> Shared:
        """What the first rank gave; the others may give anything."""
        return parallel.from_first_rank(value, self.group)

    def _write(self, files: Files, step: int, state: dict[str, Any], commit: Commit) -> None:
        try:
            dcp.save(
                {_FLAT: state},
                storage_writer=Writer(files, commit),
                planner=self._planner,
                process_group=self.group,
                no_dist=self.group is None,
            )
        # One of them is no Exception, and nothing may end this thread unseen.
        except (Exception, CheckpointException) as error:
            cause = _cause(error)
            if not isinstance(cause, PoseError):
                reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
                cause = ClusterError(f"the checkpoint of step {step} could not be written to {files.uri}: {reason}")
            self._failure = cause


def load(files: Files, networks: Networks, optimizers: dict[str, torch.optim.Optimizer]) -> int:
    """Restore networks and optimisers in place; the number of finished steps.

    Raises:
        CheckpointError: it is not a checkpoint of these networks, or damaged.
        StorageGoneError: the store stayed away.
    """
    state = _state(0, networks, optimizers)
    try:
        dcp.load(
            {_FLAT: state}, storage_reader=Reader(files), planner=_LoadPlanner(), no_dist=not dist.is_initialized()
        )
    # DCP raises many types, one of them no Exception; but for a store's, they mean that this folder cannot be used.
    except (Exception, CheckpointException) as error:
        cause = _cause(error)
        if isinstance(cause, StorageGoneError):  # it has been waited for, and says so
            raise cause from error
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
        raise CheckpointError(
            f"{files.uri} is not a checkpoint of this run: {reason}; remove it or choose another run.name"
        ) from error
    for role, optimizer in optimizers.items():
        for number, group in enumerate(optimizer.param_groups):
            below = f"optimizers.{role}.param_groups.{number}"
            group.update({name: state[f"{below}.{name}"] for name in group if name != "params"})
    return state["step"]


def _cause(error: BaseException) -> BaseException:
    """What went wrong on a rank; one of ours before what followed from it on others."""
    if not isinstance(error, CheckpointException):
        return error
    causes = [failure[0] for failure in error.failures.values()]
    return next((cause for cause in causes if isinstance(cause, PoseError)), causes[0])


def _state(step: int, networks: Networks, optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Any]:
    """All that changes, by the names that DCP would give it; it would look at each of them in every save."""
    stored, flat = _stored(networks), {"step": step}
    for role, module in stored.items():
        flat |= {f"networks.{role}.{name}": value for name, value in _own(networks, role, module).items()}
    for role, optimizer in optimizers.items():
        module = stored[group_of(role)]
        if not optimizer.state:
            get_optimizer_state_dict(module, optimizer)  # makes it
        names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
        below = f"optimizers.{role}"
        for parameter, values in optimizer.state.items():
            flat |= {f"{below}.state.{names[parameter]}.{name}": value for name, value in values.items()}
        for number, group in enumerate(optimizer.param_groups):
            values = group | {"params": [names[parameter] for parameter in group["params"]]}
            flat |= {f"{below}.param_groups.{number}.{name}": value for name, value in values.items()}
    return flat


def _stored(networks: Networks) -> dict[str, nn.Module]:
    """The modules behind what changes, by role; roles may share one. The frozen teacher is not stored."""
    modules = {name: role.module for name, role in networks.roles().items() if name != "teacher"}
    return modules if networks.heads is None else modules | {"heads": networks.heads}


def _own(networks: Networks, name: str, module: nn.Module) -> dict[str, Any]:
    """A role's own weights out of its module's."""
    weights = module.state_dict(keep_vars=True)
    if name == "heads":
        return weights
    own = networks.roles()[name].weights()
    return {key: value for key, value in weights.items() if key in own}


class _SavePlanner(dcp.DefaultSavePlanner):
    """What lies where is worked out and agreed on once, and again when names, sizes or shards change."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False, enable_plan_caching=True)
        # DCP keeps what was agreed on under a name, for the process.
        self._cached_plans_key = uuid.uuid4().hex
        self._layout: dict[str, Any] = {}
        self._agreed: dict[str, Any] | None = None

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict[_FLAT], storage_meta, is_coordinator)

    def create_local_plan(self) -> dcp.SavePlan:
        self._layout = layout(self.state_dict)
        if self._layout == self._agreed:
            return dcp.SavePlan([], usable=False)
        return super().create_local_plan()

    def finish_plan(self, new_plan: dcp.SavePlan) -> dcp.SavePlan:
        finished = super().finish_plan(new_plan)
        self._agreed = self._layout  # only now: what DCP does not know must be sent again
        return finished


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """Takes only a checkpoint that holds exactly what is asked for, and unpickles only plain numbers and strings."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict[_FLAT], metadata, is_coordinator)

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
