"""Distribution, applied from outside: sharding, context parallelism, gradient norms and gathers over a phase's ranks.

Ranks form a mesh of replicate x shard x context. A context group takes the same clips and splits their tokens; weights
are sharded over all ranks of a replica, context groups included, so that none of them holds a copy for itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from pose_core.errors import ConfigError
from pose_core.models.video_model import StockModel
from pose_core.models.weights import Weights, is_adapter, stock_name
from pose_core.settings import TrainingSettings

Nested = TypeVar("Nested")
Shared = TypeVar("Shared")

_SHARING = "gloo_of_training"

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@contextmanager
def pretended(world: int) -> Iterator[None]:
    """Inside, this process is the first of ``world`` ranks that exchange nothing: enough to see what one would hold."""
    shows_errors = sys.excepthook
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = shows_errors  # which a group changes to name its rank


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def from_first_rank(value: Shared, group: dist.ProcessGroup | None = None) -> Shared:
    """What the first rank gave; the others may give anything. All ranks, or those of ``group``, must call it."""
    if not dist.is_initialized():
        return value
    shared = [value]
    dist.broadcast_object_list(shared, src=0, group=group)
    return shared[0]


def cpu_group(timeout_seconds: float) -> dist.ProcessGroup:
    """All ranks once more, for what another thread exchanges; all must call it.

    Gloo gives each group a thread for its sockets, which wakes up a hundred times a second even if nothing comes, on
    ranks' own cores. Where the training's group is gloo, too, this one uses its thread.
    """
    if _SHARING not in dist.Backend.backend_list:
        dist.Backend.register_backend(_SHARING, _share_sockets, devices=["cpu"])
    return dist.new_group(backend=_SHARING, timeout=timedelta(seconds=timeout_seconds))


def _share_sockets(store: dist.Store, rank: int, ranks: int, timeout: timedelta) -> dist.ProcessGroupGloo:
    gloo: Any = dist.ProcessGroupGloo
    options, whole = gloo._Options(), dist.group.WORLD
    options._timeout = timeout
    with suppress(RuntimeError):  # a group of GPUs alone
        training: Any = whole and whole._get_backend(torch.device("cpu"))
        if isinstance(training, gloo):
            options._devices = training.options._devices
    options._devices = options._devices or [gloo.create_default_device()]
    return gloo(store, rank, ranks, options)


@dataclass(frozen=True)
class Mesh:
    """The ranks of a phase, seen twice: as those that hold the weights together, and as those that share a clip."""

    weights: DeviceMesh
    """``(replicate, shard x context)``, or without replicas the latter alone."""
    context: DeviceMesh | None
    """``(data, ring, ulysses)``; None where each rank has clips of its own."""
    context_ranks: int

    @property
    def data_rank(self) -> int:
        """Place among those that take clips of their own; a context group is one of them."""
        return rank() // self.context_ranks

    @property
    def data_ranks(self) -> int:
        return ranks() // self.context_ranks

    @property
    def context_rank(self) -> int:
        return rank() % self.context_ranks


def build_mesh(settings: TrainingSettings, device: torch.device) -> Mesh:
    """The mesh of all ranks, by ``training.replicas`` and ``training.context_workers``; neighbours share a clip."""
    replicas, context = settings.replicas, settings.context_workers
    kind, world = device.type, ranks()
    if world % (replicas * context):
        raise ConfigError(
            f"{world} workers cannot be {replicas} replicas of groups of {context}: "
            "set training.replicas and training.context_workers so that their product divides training.workers"
        )
    if replicas == 1:
        weights = init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    else:
        weights = init_device_mesh(kind, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))
    shared = (
        None
        if context == 1
        else init_device_mesh(kind, (world // context, 1, context), mesh_dim_names=("data", "ring", "ulysses"))
    )
    return Mesh(weights, shared, context)


def shard_model(model: StockModel, settings: TrainingSettings, mesh: Mesh) -> None:
    """Shard a video model in place: every block on its own, the rest with the root; what is unread is read then.

    Master weights and reductions stay float32. Inputs are not cast: in bfloat16 the time given to the network would
    have four distinct values a hundred, and the rotary positions, which stock blocks take in float32, few more.

    Raises:
        CheckpointError: unread weights are missing, damaged or of another model (on every rank).
    """
    dtype = PRECISIONS[settings.precision]
    for module, weights in model.unread:
        weights.check(module)
    if mesh.context is not None:
        model.share_tokens(mesh.context)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        if settings.compile_blocks:
            block.compile()
        _shard(block, mesh, policy)
    for root in model.roots:
        _shard(root, mesh, policy)
    for module, weights in model.unread:
        _read_shards(module, weights)
    model.unread = []
    model.compute_dtype, model.any_rank = dtype, any_rank


def _read_shards(module: nn.Module, weights: Weights) -> None:
    """Give a sharded module that was built on the meta device its weights; this rank reads its own rows alone."""
    meshes = {each.device_mesh for each in module.parameters() if isinstance(each, DTensor)}
    device = torch.device(next(iter(meshes)).device_type)
    module._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if is_adapter(name):
                continue
            assert isinstance(parameter, DTensor)
            _, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            weights.read(stock_name(name), parameter.to_local(), offset[0] if offset else 0)
    weights.close()


def _shard(module: nn.Module, mesh: Mesh, policy: MixedPrecisionPolicy) -> None:
    sharded = fully_shard(module, mesh=mesh.weights, mp_policy=policy)
    if mesh.context is not None:
        # Ranks of a context group hold parts of one clip's gradient: they are summed, and only clips are averaged.
        sharded.set_gradient_divide_factor(float(mesh.data_ranks))
        sharded.set_force_sum_reduction_for_comms(True)


def shard_heads(heads: nn.Module, mesh: Mesh) -> None:
    """Shard the discriminator heads in place; they stay in float32, and see all tokens of a clip on every rank."""
    fully_shard(heads, mesh=mesh.weights)


def reshard(module: nn.Module) -> None:
    """Free what the root keeps gathered after a forward pass, so that ``parameters()`` are this rank's shards.

    It cannot be freed right after the forward: where only block features enter the loss, the backward pass needs the
    root's weights and nothing would gather them again.
    """
    for each in (module, *module.children()):
        if isinstance(each, FSDPModule):
            each.reshard()


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients to at most ``max_norm`` over all ranks; the norm before, a scalar."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def mean_over_ranks(values: dict[str, Tensor]) -> dict[str, float]:
    """Scalars averaged over the ranks, as numbers; every rank must call it with the same names."""
    if not values:
        return {}
    stacked = torch.stack([value.detach().float() for value in values.values()])
    if dist.is_initialized():
        dist.all_reduce(stacked)
        stacked /= dist.get_world_size()
    return dict(zip(values, stacked.tolist(), strict=True))


def any_rank(flag: Tensor) -> bool:
    """Whether the scalar ``flag`` is true on any rank; every rank must call it, and each gets the same answer."""
    return bool(highest(flag.int()))


def highest(value: Tensor) -> int:
    """The largest of the ranks' integer scalars; every rank must call it, and each gets the same answer."""
    if dist.is_initialized():
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def meet(device: torch.device) -> None:
    """Return once every rank has called it."""
    highest(torch.zeros((), dtype=torch.int32, device=device))


def of_whole(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """``function`` of a whole tensor, which keeps its shape; every rank works it out and keeps its part of it."""
    if not isinstance(tensor, DTensor):
        return function(tensor)
    # Every rank has the whole result: nothing has to be sent to share it out.
    result = function(tensor.full_tensor())
    return distribute_tensor(result, tensor.device_mesh, tensor.placements, src_data_rank=None)


def gather_weights(module: nn.Module) -> dict[str, Tensor]:
    """The full weights on rank 0's CPU, an empty dict on the others; every rank must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_model_state_dict(module, options=options))  # type: ignore[arg-type]
