"""Builds a phase's networks from folders and shards them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from pose_core.config import Settings
from pose_core.models import wan
from pose_core.models.heads import DiscriminatorHeads
from pose_core.models.lora import add_fake_score
from pose_core.models.video_model import VideoModel
from pose_core.models.wan import Wan, read_config
from pose_core.training import parallel
from pose_core.training.state import Networks
from pose_core.training.turns import Turn, equilibrium_turns, priming_turns


def phase_turns(phase: str, settings: Settings) -> list[Turn]:
    """The turns of ``priming`` or ``equilibrium``."""
    return priming_turns(settings.priming) if phase == "priming" else equilibrium_turns(settings.equilibrium)


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
    """Load every network of a phase and move it to ``device``; ``meta=True`` builds them without weights.

    ``teacher`` is the teacher's diffusers folder, ``generator`` one whose ``transformer`` the generator starts from.
    """
    networks = Networks(
        generator=_model(generator, meta, teacher),
        average=_model(generator, meta, teacher),
        teacher=_model(teacher, meta, teacher),
        null_text=null_text,
    )
    networks.average.module.requires_grad_(False)
    networks.teacher.module.requires_grad_(False)
    if settings.training.activation_checkpointing:
        networks.generator.module.enable_gradient_checkpointing()
    with _seeded(settings.run.seed):
        if phase == "priming":
            add_fake_score(networks.teacher.module, settings.priming.fake_lora_rank)
        else:
            networks.heads = _heads(settings, teacher, networks.generator, meta)
    if not meta:
        for model in (networks.generator, networks.average, networks.teacher):
            model.module.to(device)
        if networks.heads is not None:
            networks.heads.to(device)
    return networks


def shard_networks(networks: Networks, settings: Settings) -> None:
    """Apply FSDP2 to every network in place."""
    for model in (networks.generator, networks.average, networks.teacher):
        parallel.shard_model(model, settings.training.precision)
    if networks.heads is not None:
        parallel.shard_heads(networks.heads)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, new weights are the same on every rank and in every run: FSDP shards what each rank holds unseen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _model(folder: Path, meta: bool, teacher: Path) -> Wan:
    return wan.load(folder, image_tokens=wan.count_image_tokens(teacher), meta=meta)


def _heads(settings: Settings, teacher: Path, generator: VideoModel, meta: bool) -> DiscriminatorHeads:
    config = read_config(teacher, "transformer")
    equilibrium = settings.equilibrium
    with torch.device("meta" if meta else "cpu"):
        return DiscriminatorHeads(
            blocks=len(equilibrium.feature_blocks),
            width=generator.width,
            head_width=equilibrium.head_width,
            text_width=config["text_dim"],
            image_width=config.get("image_dim") or 0,
            queries=equilibrium.semantic_queries,
        )
