"""Runs tiny phases, in the test's process or on ranks spawned by it; shared by the tests of training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from pose_core import config
from pose_core.models.video_model import Condition
from pose_core.runtime.steady_files import SteadyFiles
from pose_core.runtime.storage import Store
from pose_core.settings import Settings
from pose_core.training import build, checkpoint, loop, parallel
from pose_core.training.optimizers import build_optimizers
from pose_core.training.state import Batch, Networks
from pose_core.training.telemetry import Record, unrecorded
from pose_core.training.turns import Turn

CPU = torch.device("cpu")
GLOBAL_CLIPS = 4
PHASES = ["priming", "equilibrium"]
ONE_BASE = ["training.generator=one_base", "training.lora_rank=2"]
CASES: dict[str, list[str]] = {
    "priming": [],
    "equilibrium": [],
    "priming, one base": ONE_BASE,
    "equilibrium, one base": ONE_BASE,
    "priming, muon": ["priming.muon_scale=1"],
    "equilibrium, muon": ["equilibrium.muon_scale=1"],
}
"""Phases as they are built by default, and with all roles on one set of frozen weights."""
LAST_BIASES = {"heads/token_heads.0.3.bias", "heads/token_heads.1.3.bias", "heads/semantic_head.logit.bias"}
"""A head's last bias has no gradient but rounding while all logits are within the hinge's margins."""
TINY = [
    "priming.fake_lora_rank=2",
    # The LoRA's first matrix has no gradient until its second has moved.
    "priming.fake_updates=2",
    "equilibrium.feature_blocks=[0, 1]",
    "equilibrium.head_width=16",
    "equilibrium.semantic_queries=2",
    # Two ranks then measure the penalty on the same clips as one.
    "equilibrium.r1_every_clips=2",
]


@dataclass
class Phase:
    """One phase with its networks, and what its steps reported, averaged over the ranks."""

    settings: Settings
    networks: Networks
    turns: list[Turn]
    optimizers: dict[str, torch.optim.Optimizer]
    history: list[dict[str, float]] = field(default_factory=list)

    def train(
        self,
        first_step: int,
        steps: int,
        *,
        seed: int = 0,
        turns: Sequence[Turn] | None = None,
        sample: bool = False,
        record: Record = unrecorded,
    ) -> None:
        """Run steps ``first_step`` to ``steps`` with all turns or those given; ``sample`` after each."""

        def after_step(_step: int, values: dict[str, Tensor]) -> None:
            self.history.append(parallel.mean_over_ranks(values))
            if sample:
                self.sample()

        loop.train(
            self.networks,
            self.optimizers,
            self.turns if turns is None else turns,
            batches(first_step, self.networks.mesh, self.networks.null_text.device),
            first_step=first_step,
            steps=steps,
            seed=seed,
            gradient_clip=1.0,
            ema_decay=0.75,
            after_step=after_step,
            non_finite_steps=3,
            accumulation=self.settings.training.accumulation,
            record=record,
        )

    @torch.no_grad()
    def sample(self) -> None:
        """One forward pass of generator and average, which on several ranks leaves their roots gathered."""
        batch = next(batches(0))
        for model in (self.networks.generator, self.networks.average):
            model.velocity(batch.x_0, torch.ones(len(batch.x_0)), batch.condition)

    def tensors(self) -> dict[str, Tensor]:
        """Copies of every weight and of the optimisers' states by name; this rank's shards where they are sharded."""
        found: dict[str, Tensor] = {}
        for role, module in modules(self.networks).items():
            if isinstance(module, FSDPModule):
                module.reshard()  # the root of a network may still be gathered from its last forward pass
            found |= {f"{role}/{name}": value for name, value in module.named_parameters()}
        for group, optimizer in self.optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                found |= {f"{group}.adamw/{index}.{name}": value for name, value in state.items()}
        return {name: local(value).detach().clone() for name, value in found.items()}


def build_phase(name: str, folder: Path, *overrides: str, sharded: bool = False, device: torch.device = CPU) -> Phase:
    """A new phase whose generator starts from the teacher in ``folder``; overrides as a person would type them."""
    settings = config.load("", [*TINY, *CASES[name], *overrides])
    name = name.split(",")[0]
    null_text = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(99)).to(device)
    networks = build.build_networks(name, settings, folder, folder, null_text, device=device, meta=sharded)
    if sharded:
        build.shard_networks(networks, settings, parallel.build_mesh(settings.training, device))
    turns = build.phase_turns(name, settings)
    return Phase(settings, networks, turns, build_optimizers(networks, turns, weight_decay=0.0))


def batches(first_step: int, mesh: parallel.Mesh | None = None, device: torch.device = CPU) -> Iterator[Batch]:
    """This rank's rows of an endless row of global batches, each the same whatever came before it."""
    step = first_step
    while True:
        generator = torch.Generator().manual_seed(1000 + step)
        shapes = (8, 3, 4, 4), (6, 32), (5, 32), (10, 3, 4, 4)
        x_0, text, *image = (torch.randn(GLOBAL_CLIPS, *shape, generator=generator).to(device) for shape in shapes)
        text[:, 4:] = 0
        place, ranks = (mesh.data_rank, mesh.data_ranks) if mesh else (parallel.rank(), parallel.ranks())
        mine = GLOBAL_CLIPS // ranks
        rows = slice(place * mine, (place + 1) * mine)
        yield Batch(x_0[rows], Condition(text, *image).rows(rows))
        step += 1


def modules(networks: Networks) -> dict[str, torch.nn.Module]:
    """Every network by its role."""
    found = {role: getattr(networks, role).module for role in ("generator", "average", "teacher")}
    if networks.discriminator is not None:
        found["discriminator"] = networks.discriminator.module
    return found if networks.heads is None else found | {"heads": networks.heads}


def files(folder: Path) -> SteadyFiles:
    """Where a checkpoint lies, for one that is in a local folder."""
    return SteadyFiles(Store.open(str(folder)), retry_seconds=0.0)


def save(folder: Path, step: int, phase: Phase) -> None:
    """Save a phase and wait for the end."""
    saver = checkpoint.Saver()
    saver.start(files(folder), step, phase.networks, phase.optimizers, commit=lambda objects: None)
    saver.wait()


def load(folder: Path, phase: Phase) -> int:
    """Restore a phase; the number of finished steps."""
    return checkpoint.load(files(folder), phase.networks, phase.optimizers)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Names under which two sets of tensors are not the same, bit by bit."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]
