"""Builds a phase's networks from folders and shards them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from pose_core.models import families
from pose_core.models.heads import DiscriminatorHeads
from pose_core.models.lora import ADAPTER_FILE, Role, add_adapter, checkpoint_activations, load_adapter
from pose_core.models.video_model import StockModel, VideoModel
from pose_core.settings import Settings
from pose_core.training import parallel
from pose_core.training.parallel import Mesh
from pose_core.training.rival_turns import apt_turns, dmd2_turns, ladd_turns, lcm_turns
from pose_core.training.state import Networks
from pose_core.training.turns import Turn, equilibrium_turns, priming_turns


def phase_turns(phase: str, settings: Settings) -> list[Turn]:
    """The turns of ``priming`` or ``equilibrium``, by the method of the run; rivals with one phase repeat it."""
    first, second = {
        "pose": (lambda s: priming_turns(s.priming), lambda s: equilibrium_turns(s.equilibrium)),
        "lcm": (lcm_turns, lcm_turns),
        "apt": (lcm_turns, apt_turns),
        "ladd": (ladd_turns, ladd_turns),
        "dmd2": (dmd2_turns, dmd2_turns),
    }[settings.method.name]
    return first(settings) if phase == "priming" else second(settings)


def build_networks(
    phase: str,
    settings: Settings,
    teacher: Path,
    generator: Path,
    null_text: Tensor,
    *,
    device: torch.device,
    meta: bool = False,
) -> Networks:
    """Load every network of a phase and move it to ``device``.

    ``meta=True`` leaves the transformers' weights unread, for ``shard_networks`` or for a plan; adapters and heads are
    made on torch's default device then. ``teacher`` is the teacher's diffusers folder, ``generator`` one whose
    ``transformer`` the generator starts from, with its adapter beside it where an earlier phase trained one. Roles are
    only made where a turn needs them.
    """
    moved = {group for turn in phase_turns(phase, settings) for group in turn.updates}
    networks = _roles(settings, teacher, generator, null_text, "fake_score" in moved, meta)
    if "discriminator" in moved:
        networks.discriminator = Role(_generator(settings, generator, teacher, meta))
    if "heads" in moved:
        with _seeded(settings.run.seed):
            networks.heads = _heads(settings, teacher, networks.generator)
    for parameter in networks.average.weights().values():
        parameter.requires_grad_(False)
    if networks.teacher.module is not networks.generator.module:
        for parameter in networks.teacher.weights().values():
            parameter.requires_grad_(False)
    kept = settings.training.activation_checkpointing
    if kept != "none":
        for model in networks.models():  # all of them: a constant judge or score, too, has a graph from its input
            checkpoint_activations(model, keep_attention=kept == "selective")
        if networks.heads is not None:
            networks.heads.recompute = True
    for module in networks.modules() if not meta else filter(None, [networks.heads]):
        module.to(device)
    return networks


def _roles(
    settings: Settings, teacher: Path, generator: Path, null_text: Tensor, with_fake: bool, meta: bool
) -> Networks:
    """Generator, average, teacher and fake score, on as many sets of weights as ``training.generator`` asks for."""
    training = settings.training
    family = families.get(settings.model.family)
    if training.generator == "full":
        frozen = Role(family.load_teacher(teacher, meta=meta))
        learning, average = (Role(_generator(settings, generator, teacher, meta)) for _ in range(2))
    else:
        # What never moves is kept in the precision of computation; adapters are added in float32.
        dtype = parallel.PRECISIONS[training.precision]
        frozen = Role(family.load_teacher(teacher, meta=meta, dtype=dtype))
        one_base = training.generator == "one_base"
        shared = frozen.base.start if one_base else family.load_generator(teacher, teacher, meta=meta, dtype=dtype)
        learning, average = (_adapter(shared, name, training.lora_rank, settings) for name in ("generator", "average"))
        file = generator / ADAPTER_FILE
        if file.is_file():  # of the phase before; the teacher has none
            for role in (learning, average):
                load_adapter(role, file)
    fake = _adapter(frozen.base, "fake_score", settings.priming.fake_lora_rank, settings) if with_fake else None
    told = settings.method.conditioning_time
    return Networks(learning, average, frozen, null_text, fake, conditioning_time=told)


def _adapter(base: StockModel, name: str, rank: int, settings: Settings) -> Role:
    """A new adapter; all of one rank begin equal, so the average begins as the generator."""
    with _seeded(settings.run.seed):
        return add_adapter(base, name, rank)


def shard_networks(networks: Networks, settings: Settings, mesh: Mesh) -> None:
    """Apply FSDP2, and what else the settings ask for, to every network; of unread weights a rank reads its own shard.

    Raises:
        CheckpointError: unread weights are missing, damaged or of another model (correctable in the call).
    """
    for model in networks.models():
        parallel.shard_model(model, settings.training, mesh)
    if networks.heads is not None:
        parallel.shard_heads(networks.heads, mesh)
    networks.mesh = mesh


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, new weights are the same on every rank and in every run: FSDP shards what each rank holds unseen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _generator(settings: Settings, folder: Path, teacher: Path, meta: bool) -> StockModel:
    return families.get(settings.model.family).load_generator(folder, teacher, meta=meta)


def _heads(settings: Settings, teacher: Path, generator: VideoModel) -> DiscriminatorHeads:
    widths = families.get(settings.model.family).widths(teacher, settings.model.task)
    equilibrium = settings.equilibrium
    return DiscriminatorHeads(
        blocks=len(equilibrium.feature_blocks),
        width=generator.width,
        head_width=equilibrium.head_width,
        text_width=widths.text,
        image_width=(widths.image or widths.first_frame) * equilibrium.semantic_head,
        queries=equilibrium.semantic_queries,
    )
