"""What each of two ranks does for ``test_families.py``: reads its shards of every family and trains both phases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from phases import local
from safetensors.torch import load_file
from torch import nn

from pose_core import config
from pose_core.models.parts import clip_shapes
from pose_core.models.small_folders import save_hunyuan15, save_ltx, save_wan, save_wan22_a14b, save_wan22_ti2v
from pose_core.models.video_model import ClipShapes, Condition
from pose_core.training import build, loop, parallel
from pose_core.training.optimizers import build_optimizers
from pose_core.training.state import Batch, Networks

STEPS, GLOBAL_CLIPS, TOKENS = 2, 4, 6
PHASES = ("priming", "equilibrium")
MAKE = {
    ("wan", "t2v"): lambda folder: save_wan(folder, "t2v"),
    ("wan", "i2v"): lambda folder: save_wan(folder, "i2v"),
    ("wan22_ti2v", "t2v"): save_wan22_ti2v,
    ("wan22_ti2v", "i2v"): save_wan22_ti2v,
    ("wan22_a14b", "t2v"): lambda folder: save_wan22_a14b(folder, "t2v"),
    ("wan22_a14b", "i2v"): lambda folder: save_wan22_a14b(folder, "i2v"),
    ("ltx", "t2v"): lambda folder: save_ltx(folder, timestep_conditioning=False),
    ("ltx", "i2v"): lambda folder: save_ltx(folder, timestep_conditioning=True),
    ("hunyuan15", "t2v"): lambda folder: save_hunyuan15(folder, "t2v"),
    ("hunyuan15", "i2v"): lambda folder: save_hunyuan15(folder, "i2v"),
}
CASES = [
    *((*case, "full", "float32") for case in MAKE),
    *((*case, "one_base", "bfloat16") for case in MAKE if case[1] == "i2v"),
]
"""Family, task, what of the generator learns, precision."""
SHARING = [case for case in CASES if case[0] in ("wan22_ti2v", "wan22_a14b") and case[1:3] == ("i2v", "full")]
"""Those of Wan's families whose networks are called in another way than Wan 2.1's."""
NAMES = {case: "-".join(case) for case in CASES}


def work(_rank: int, folders: Path, _out: Path) -> dict[str, Any]:
    """Every case by its name."""
    return {NAMES[case]: train(case, folders / "-".join(case[:2]), sharded=True) for case in CASES}


def share(_rank: int, folders: Path, _out: Path) -> dict[str, Any]:
    """Every case of ``SHARING`` by its name, on ranks that share the tokens of a clip."""
    own = ("training.workers=2", "training.context_workers=2")
    return {NAMES[case]: train(case, folders / "-".join(case[:2]), *own, sharded=True) for case in SHARING}


def train(case: tuple[str, ...], folder: Path, *overrides: str, sharded: bool) -> dict[str, Any]:
    """Both phases for two steps: their curves, what was read wrongly, and which networks moved."""
    return {phase: _phase(phase, case, folder, sharded, overrides) for phase in PHASES}


def _phase(
    phase: str, case: tuple[str, ...], folder: Path, sharded: bool, overrides: tuple[str, ...]
) -> dict[str, Any]:
    family, task, mode, precision = case
    settings = config.load(
        "",
        [
            *(f"model.family={family}", f"model.task={task}", f"training.generator={mode}"),
            *(f"training.precision={precision}", "training.lora_rank=2", "priming.fake_lora_rank=2"),
            *("equilibrium.feature_blocks=[0, 1]", "equilibrium.head_width=16", "equilibrium.semantic_queries=2"),
            f"training.activation_checkpointing={'full' if mode == 'one_base' else 'none'}",
            *("equilibrium.r1_every_clips=2", *overrides),
        ],
    )
    shapes = clip_shapes(folder, task=task, frames=9, height=32, width=32, text_tokens=TOKENS)
    null_text = _draw(99, 1, shapes.text)
    networks = build.build_networks(
        phase, settings, folder, folder, null_text, device=torch.device("cpu"), meta=sharded
    )
    if sharded:
        mesh = parallel.build_mesh(settings.training, torch.device("cpu"))
        build.shard_networks(networks, settings, mesh)
    found: dict[str, Any] = {"wrong": _wrong(networks, folder)}
    before = _copies(networks)
    found["curves"] = _train(phase, settings, networks, shapes)
    after = _copies(networks)
    found["moved"] = sorted(
        role for role in before if any(not torch.equal(a, b) for a, b in zip(before[role], after[role], strict=True))
    )
    return found


def _train(phase: str, settings: Any, networks: Networks, shapes: ClipShapes) -> list[dict[str, float]]:
    curves: list[dict[str, float]] = []

    def after_step(_step: int, values: dict[str, torch.Tensor]) -> None:
        curves.append(parallel.mean_over_ranks(values))

    turns = build.phase_turns(phase, settings)
    loop.train(
        networks,
        build_optimizers(networks, turns, weight_decay=0.0),
        turns,
        _batches(shapes, networks),
        first_step=0,
        steps=STEPS,
        seed=0,
        gradient_clip=1.0,
        ema_decay=0.75,
        after_step=after_step,
        non_finite_steps=1,
    )
    return curves


def _batches(shapes: ClipShapes, networks: Networks) -> Iterator[Batch]:
    """This rank's rows of clips whose shapes are the family's."""
    rank, ranks = (0, 1) if networks.mesh is None else (networks.mesh.data_rank, networks.mesh.data_ranks)
    mine = GLOBAL_CLIPS // ranks
    rows = slice(rank * mine, (rank + 1) * mine)
    for step in range(STEPS):
        drawn = [
            None if shape is None else _draw(10 * step + index, GLOBAL_CLIPS, shape)[rows]
            for index, shape in enumerate((shapes.latents, shapes.text, shapes.image, shapes.first_frame))
        ]
        x_0, *given = drawn
        assert x_0 is not None
        yield Batch(x_0, Condition(*given))  # type: ignore[arg-type]


def _draw(seed: int, clips: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(clips, *shape, generator=torch.Generator().manual_seed(seed))


def _copies(networks: Networks) -> dict[str, list[torch.Tensor]]:
    for model in networks.models():
        parallel.reshard(model.module)
    roles: dict[str, Any] = {name: role.weights().values() for name, role in networks.roles().items()}
    if networks.heads is not None:
        roles["heads"] = networks.heads.parameters()
    return {name: [local(weight).detach().clone() for weight in weights] for name, weights in roles.items()}


def _wrong(networks: Networks, folder: Path) -> list[str]:
    """Weights that are not, bit by bit, this rank's rows of what the files hold."""
    wrong = []
    for role, each in networks.roles().items():
        pair = hasattr(each.module, "transformer_2")
        parts = {"transformer": each.module.transformer, "transformer_2": each.module.transformer_2} if pair else {}
        for part, module in (parts or {"transformer": each.module}).items():
            wrong += [f"{role}/{part}/{name}" for name in _differing(module, folder / part)]
    return wrong


def _differing(module: nn.Module, place: Path) -> list[str]:
    stored = load_file(place / "diffusion_pytorch_model.safetensors")
    found = []
    for name, parameter in module.named_parameters():
        if ".lora_" not in name:
            whole = stored[name.replace(".base_layer.", ".")].to(parameter.dtype)
            size = -(-len(whole) // parallel.ranks())
            first = parallel.rank() * size
            if not torch.equal(local(parameter).detach(), whole[first : first + size]):
                found.append(name)
    return found
