"""Distribution, applied from outside: FSDP2 sharding, gradient norms and gathers over the ranks of a phase."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from pose_core.models.video_model import StockModel
from pose_core.models.weights import Weights, is_adapter, stock_name

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def shard_model(model: StockModel, precision: Literal["float32", "bfloat16"]) -> None:
    """Shard a video model in place: every block on its own, the rest with the root; what is unread is read then.

    Master weights and reductions stay float32. The root does not cast its inputs: in bfloat16 the time given to the
    network would have four distinct values a hundred.

    Raises:
        CheckpointError: unread weights are missing, damaged or of another model (on every rank).
    """
    dtype = PRECISIONS[precision]
    for module, weights in model.unread:
        weights.check(module)
    for block in model.blocks:
        fully_shard(block, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for root in model.roots:
        fully_shard(root, mp_policy=policy)
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


def shard_heads(heads: nn.Module) -> None:
    """Shard the discriminator heads in place; they stay in float32."""
    fully_shard(heads)


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
    if dist.is_initialized():
        flag = flag.int()
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def gather_weights(module: nn.Module) -> dict[str, Tensor]:
    """The full weights on rank 0's CPU, an empty dict on the others; every rank must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_model_state_dict(module, options=options))  # type: ignore[arg-type]
