"""What each of two ranks does for ``test_parallel.py``: phases, checkpoint, a copy, bfloat16, a second group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phases import CASES, Phase, build_phase, differing, load, local, save
from torch import Tensor

from pose_core.training import parallel

SAVED_STEP, LAST_STEP = 2, 3


def work(_rank: int, folder: Path, out: Path) -> dict[str, Any]:
    """Every case: trained, saved, resumed, in bfloat16, and turn by turn."""
    return {
        name: {**_float32(name, folder, out), **_bfloat16(name, folder), "moved": moved_by_turn(name, folder, True)}
        for name in CASES
    }


def share(rank: int, _folder: Path, _out: Path) -> dict[str, Any]:
    """What each gets from the first one, in the training's group and in another, and how many threads serve sockets."""
    other = parallel.cpu_group(60.0)
    told = [parallel.from_first_rank(f"rank {rank}"), parallel.from_first_rank(f"rank {rank}, too", other)]
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return {"told": told, "socket_threads": threads.count("gloo_tcp_loop")}


def _float32(name: str, folder: Path, out: Path) -> dict[str, Any]:
    phase = build_phase(name, folder, sharded=True)
    phase.train(0, SAVED_STEP, sample=True)
    save(out / name, SAVED_STEP, phase)
    phase.sample()
    phase.train(SAVED_STEP, LAST_STEP, sample=True)
    resumed = build_phase(name, folder, sharded=True)
    step = load(out / name, resumed)
    resumed.train(step, LAST_STEP)
    return {
        "history": phase.history,
        "step": step,
        "resumed_history": resumed.history,
        "resumed_differs": differing(phase.tensors(), resumed.tensors()),
        "generator": parallel.gather_weights(phase.networks.generator.module),
        "average": parallel.gather_weights(phase.networks.average.module),
        "held": sum(local(parameter).numel() for parameter in phase.networks.generator.module.parameters()),
    }


def moved_by_turn(name: str, folder: Path, sharded: bool) -> dict[str, list[str]]:
    """Names of the weights that differ, bit by bit, after one step of each turn alone."""
    found = {}
    for index in range(len(build_phase(name, folder).turns)):
        phase = build_phase(name, folder, sharded=sharded)
        before = phase.tensors()
        phase.train(0, 1, turns=[phase.turns[index]])
        after = phase.tensors()
        changed = differing(before, {key: after[key] for key in before})
        found[phase.turns[index].name] = sorted(key for key in changed if not key.startswith("average/"))
    return found


INPUTS = {"hidden_states": "torch.bfloat16", "timestep": "torch.float32", "rotary": "torch.float32"}
"""What a network that computes in bfloat16 is given, and what its blocks are beside."""


def _bfloat16(name: str, folder: Path) -> dict[str, Any]:
    phase = build_phase(name, folder, "training.precision=bfloat16", sharded=True)
    seen: dict[str, Tensor] = {}
    module = phase.networks.generator.module
    module.register_forward_pre_hook(lambda _module, _args, inputs: seen.update(inputs), with_kwargs=True)
    module.blocks[0].attn1.register_forward_pre_hook(lambda _module, args: seen.update(rotary=args[3][0]))
    phase.train(0, 1)
    return {
        "bfloat16_history": phase.history,
        "bfloat16_weights": sorted({str(value.dtype) for value in _weights(phase)}),
        "bfloat16_inputs": {name: str(seen[name].dtype) for name in INPUTS},
    }


def _weights(phase: Phase) -> list[Tensor]:
    return [value for name, value in phase.tensors().items() if not name.endswith(".step")]
