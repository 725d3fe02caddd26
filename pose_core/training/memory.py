"""Follows the bytes of every live tensor storage by role, and counts what is computed and sent, operation by operation.

It sees the operations that torch dispatches, so it works alike on real tensors and on fake ones that hold no numbers.
What a kernel takes for itself while it runs is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed._tools.fake_collectives  # noqa: F401  teaches fake tensors the collectives
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

ROLES = ("weights", "gradients", "optimiser", "average", "activations", "communication")
"""``activations`` are all that a turn makes on its way, batch and whole gradients of the block at work included;
``communication`` are gathered weights and what is being sent."""
Bytes = dict[str, int]

_aten, _c10d, _functional = torch.ops.aten, torch.ops.c10d, torch.ops._c10d_functional
_DEVICE = torch.ops.prim.device.default
_ITEM = _aten._local_scalar_dense.default


@dataclass
class Segment:
    """A forward pass, a backward pass or what lies between: the bytes by role at the peak of each of its windows.

    A window ends where weights are gathered or gradients scattered, so a pass has about one or two a block.
    """

    label: str
    windows: list[Bytes] = field(default_factory=list)


class Tracker(TorchDispatchMode):
    """While active, follows storages; ``segments`` holds the peaks since the last ``start``."""

    def __init__(self, ranks: int = 1, context_ranks: int = 1) -> None:
        super().__init__()
        self.ranks, self.context_ranks = ranks, context_ranks
        self.now: Bytes = dict.fromkeys(ROLES, 0)
        self.total = self.peak = 0
        self.flops = self.sent = 0
        self.segments: list[Segment] = []
        self._live: dict[int, list[Any]] = {}
        self._at_peak = dict(self.now)
        self._paused = False
        self._resize = torch.UntypedStorage.resize_
        self._propagate = ShardingPropagator._propagate_tensor_meta_non_cached

    def start(self, label: str) -> None:
        """Begin a segment."""
        self._close_window()
        self.segments.append(Segment(label))

    def forget(self) -> None:
        """Drop the peaks and counts so far; live storages stay known."""
        self.segments, self.flops, self.sent = [], 0, 0
        self._open_window()

    def finish(self) -> None:
        self._close_window()

    def tag(self, tensors: Iterable[Tensor], role: str) -> None:
        """Say what these tensors are; those not seen before are counted from now on."""
        for tensor in tensors:
            local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            self._see(local, role)
            entry = self._live.get(local.untyped_storage()._cdata)
            if entry is not None and entry[0] != role:
                self.now[entry[0]] -= entry[1]
                self.now[role] += entry[1]
                entry[0] = role

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # fake tensors ask for it so often that the way through would take longest of all
            return args[0].fake_device
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if self._paused:
            return func(*args, **(kwargs or {}))
        if func is _ITEM:  # nothing is known of a fake number: no flag is raised, no count is zero
            return 1.0 if args[0].is_floating_point() else 0
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf, "activations")
        self._count(func, args, kwargs or {}, out)
        return out

    def __enter__(self) -> Tracker:
        resize, live = self._resize, self._live

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            out = resize(storage, size)
            entry = live.get(storage._cdata)
            if entry is not None:
                self._change(entry[0], storage.nbytes() - entry[1])
                entry[1] = storage.nbytes()
            return out

        propagate = self._propagate

        def propagate_(*args: Any, **kwargs: Any) -> Any:
            paused, self._paused = self._paused, True
            try:
                return propagate(*args, **kwargs)
            finally:
                self._paused = paused

        # A sharded tensor learns the shape of a result from stand-ins of full size, which hold no memory.
        ShardingPropagator._propagate_tensor_meta_non_cached = propagate_  # type: ignore[method-assign]
        # FSDP frees and fills its gathered weights by resizing storages, which is not dispatched.
        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        ShardingPropagator._propagate_tensor_meta_non_cached = self._propagate  # type: ignore[method-assign]
        super().__exit__(*error)

    def _see(self, tensor: Tensor, role: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return

        def gone(_: Any) -> None:
            role, size, _reference = self._live.pop(key)
            self._change(role, -size)

        self._live[key] = [role, storage.nbytes(), weakref.ref(storage, gone)]
        self._change(role, storage.nbytes())

    def _change(self, role: str, size: int) -> None:
        self.now[role] += size
        self.total += size
        if self.total > self.peak:
            self.peak = self.total
            self._at_peak = dict(self.now)

    def _open_window(self) -> None:
        self.peak, self._at_peak = self.total, dict(self.now)

    def _close_window(self) -> None:
        if self.segments:
            self.segments[-1].windows.append(self._at_peak)
        self._open_window()

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet is _aten._scaled_dot_product_flash_attention_for_cpu:
            self.flops += sdpa_flop_count(*(each.shape for each in args[:3]))
        elif packet is _aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.flops += sdpa_backward_flop_count(*(each.shape for each in args[:4]))
        elif packet is _c10d._allgather_base_:
            self._gathered(args[0], args[1])
        elif packet is _c10d._reduce_scatter_base_:
            self._scattered(args[0], args[1])
        elif packet is torch.ops.fsdp.split_with_sizes_copy:
            self.tag(kwargs["out"], "communication")
        elif packet is _c10d.allreduce_:
            self.sent += sum(2 * each.nbytes for each in args[0]) * (self.ranks - 1) // self.ranks
        elif packet is _functional.all_to_all_single:
            self.sent += args[0].nbytes * (self.context_ranks - 1) // self.context_ranks
        elif packet is _functional.all_gather_into_tensor:
            self.sent += out.nbytes - args[0].nbytes

    def _gathered(self, whole: Tensor, shard: Tensor) -> None:
        self.tag((whole, shard), "communication")
        self.sent += whole.nbytes - shard.nbytes
        self._close_window()

    def _scattered(self, shard: Tensor, whole: Tensor) -> None:
        self.tag([shard], "gradients")
        self.tag([whole], "communication")
        self.sent += whole.nbytes - shard.nbytes
        self._close_window()
