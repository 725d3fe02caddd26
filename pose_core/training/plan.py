"""What the networks of a run weigh and what each training worker holds between two steps, from configs alone.

Every network is built on the meta device by the code that builds it for training, so nothing here can drift from it.
What a step makes on top, and so its peak, is for ``simulation.py`` to find, which takes longer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn

from pose_core.errors import ConfigError
from pose_core.models import families
from pose_core.models.folders import read_config
from pose_core.models.parts import ClipShapes, build_encoders, clip_shapes
from pose_core.settings import Settings
from pose_core.training.build import build_networks, phase_turns
from pose_core.training.optimizers import ADAM_MOMENTS, MUON_MOMENTS, split
from pose_core.training.state import Networks

PHASES = ("priming", "equilibrium")
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class WorkerBytes:
    """What one training worker holds in a phase, in bytes; activations and gathered weights come on top."""

    weights: int
    """Its shard of generator, teacher, fake score and heads, in the precision each is kept in."""
    gradients: int
    moments: int
    average: int
    """Its shard of the generator's running average, float32."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Plan:
    """Everything that can be known of a run's networks before weights are loaded."""

    clip: ClipShapes
    parameters: dict[str, int]
    """Numbers of parameters by role, in the order of the pipeline."""
    workers: dict[str, WorkerBytes]
    """What one worker holds, by phase."""


def plan_run(settings: Settings, teacher: Path) -> Plan:
    """Plan the run that ``settings`` ask for with the diffusers folder ``teacher``, of which only configs are read.

    Raises:
        ConfigError: a setting does not fit this teacher.
        CheckpointError: (correctable in the call) the folder lacks a config, or clips of this size do not fit it.
    """
    clip = check_fit(settings, teacher)
    nothing = torch.empty(0, device="meta")
    with nothing.device:  # the LoRA too, which would otherwise be drawn on the CPU first
        networks = {
            phase: build_networks(phase, settings, teacher, teacher, nothing, device=nothing.device, meta=True)
            for phase in PHASES
        }
    return Plan(
        clip,
        _roles(networks["priming"], networks["equilibrium"].heads) | _encoders(teacher),
        {phase: _worker(phase, settings, networks[phase]) for phase in PHASES},
    )


def count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def check_fit(settings: Settings, folder: Path) -> ClipShapes:
    """Shapes of a clip, once the settings are known to fit the teacher in ``folder``, of which only configs are read.

    Raises:
        ConfigError: a setting does not fit this teacher.
        CheckpointError: (correctable in the call) the folder lacks a config, or clips of this size do not fit it.
    """
    model, data, family = settings.model, settings.data, families.of(folder)
    teacher = model.teacher
    if model.family != family.name:
        raise ConfigError(f"model.family={model.family} does not fit {teacher}: set model.family={family.name}")
    tasks = family.tasks(folder)
    if model.task not in tasks:
        raise ConfigError(f"model.task={model.task} does not fit {teacher}: set model.task={tasks[0]}")
    size = {"frames": data.frames, "height": data.height, "width": data.width, "text_tokens": data.text_tokens}
    clip = clip_shapes(folder, task=model.task, **size)
    transformer = read_config(folder, "transformer")
    chosen, blocks = settings.equilibrium.feature_blocks, transformer["num_layers"]
    if max(chosen) >= blocks:
        raise ConfigError(
            f"equilibrium.feature_blocks={list(chosen)} does not fit {teacher}: name blocks from 0 to {blocks - 1}"
        )
    ranks, heads = settings.training.context_workers, transformer["num_attention_heads"]
    if ranks > 1 and not family.shares_tokens:
        raise ConfigError(f"training.context_workers={ranks} does not fit model.family={model.family}: set it to 1")
    if clip.tokens % ranks or heads % ranks:
        raise ConfigError(
            f"training.context_workers={ranks} does not fit {teacher}: it must divide the clip's {clip.tokens} tokens "
            f"and the {heads} attention heads"
        )
    return clip


def _roles(priming: Networks, heads: nn.Module | None) -> dict[str, int]:
    names = {
        "generator": "generator",
        "average": "running average",
        "teacher": "teacher",
        "fake_score": "fake-score LoRA",
    }
    roles = priming.roles()
    found = {said: _total(roles[name].weights().values()) for name, said in names.items() if name in roles}
    return found | {"heads": count(heads) if heads is not None else 0}


def _everything(networks: Networks) -> list[nn.Parameter]:
    return [parameter for module in networks.modules() for parameter in module.parameters()]


def _total(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _encoders(teacher: Path) -> dict[str, int]:
    return {name.replace("_", " "): count(module) for name, module in build_encoders(teacher).items()}


def _worker(phase: str, settings: Settings, networks: Networks) -> WorkerBytes:
    workers = settings.training.workers // settings.training.replicas
    groups = networks.groups()
    turns = phase_turns(phase, settings)
    trained = [p for turn in turns for group in turn.updates for p in groups[group].values()]
    matrices = [p for turn in turns for group in turn.updates for p in split(networks, turn, group)[1]]
    average = {id(parameter) for parameter in networks.average.weights().values()}
    others = [parameter for parameter in _everything(networks) if id(parameter) not in average]
    gradients = FLOAT32_BYTES * _shard(trained, workers)
    return WorkerBytes(
        weights=_bytes(others, workers),
        gradients=gradients,
        moments=ADAM_MOMENTS * gradients - (ADAM_MOMENTS - MUON_MOMENTS) * FLOAT32_BYTES * _shard(matrices, workers),
        average=FLOAT32_BYTES * _shard(networks.average.weights().values(), workers),
    )


def _shard(parameters: Iterable[nn.Parameter], workers: int) -> int:
    """Numbers the first worker holds: FSDP gives it the first of equal slices of every parameter's first axis."""
    return sum(math.ceil(p.shape[0] / workers) * (p.numel() // p.shape[0]) if p.ndim else 1 for p in parameters)


def _bytes(parameters: Iterable[nn.Parameter], workers: int) -> int:
    """What the first worker holds of ``parameters``, in the precision each is kept in."""
    return sum(_shard([parameter], workers) * parameter.element_size() for parameter in parameters)
