"""Whose turn it is: which loss each turn of a phase takes and which parameters it updates; said here, once.

| phase       | turn          | updates    | constants in its loss                                               |
|-------------|---------------|------------|---------------------------------------------------------------------|
| priming     | fake          | fake_score | x0_hat (stopped)                                                    |
| priming     | generator     | generator  | teacher, fake score                                                 |
| equilibrium | discriminator | heads      | x0_hat (stopped), backbone                                          |
| equilibrium | generator     | generator  | heads, backbone (the averaged weights), teacher                     |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pose_core.config import EquilibriumSettings, PrimingSettings
from pose_core.method import adversarial_equilibrium as equilibrium
from pose_core.method import conditional_consistency as consistency
from pose_core.method import stability_priming as priming
from pose_core.method.flow import one_step, sample_times
from pose_core.models.video_model import Condition
from pose_core.training.state import Batch, Draws, Networks


class Losses(NamedTuple):
    """The scalar to minimise and what else is worth a curve."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Turn:
    """One optimiser's share of a step; ``updates`` names a group of ``Networks.groups()``."""

    name: str
    updates: str
    learning_rate: float
    loss: Callable[[Networks, Batch, Draws], Losses]
    repeats: int = 1


def priming_turns(settings: PrimingSettings) -> list[Turn]:
    """Phase I: the fake score follows, then the generator moves."""
    return [
        Turn("fake", "fake_score", settings.fake_learning_rate, partial(_fake, settings), settings.fake_updates),
        Turn("generator", "generator", settings.learning_rate, partial(_primed_generator, settings)),
    ]


def equilibrium_turns(settings: EquilibriumSettings) -> list[Turn]:
    """Phase II: the heads judge, then the generator answers."""
    return [
        Turn("discriminator", "heads", settings.heads_learning_rate, partial(_discriminator, settings)),
        Turn("generator", "generator", settings.learning_rate, partial(_equilibrium_generator, settings)),
    ]


def _renoise_times(settings: PrimingSettings | EquilibriumSettings, batch: Batch, draws: Draws) -> Tensor:
    window = settings.renoise_time_min, settings.renoise_time_max
    return sample_times(draws.uniform(batch.x_0), *window, settings.timestep_shift)


def _primed_sample(settings: PrimingSettings, networks: Networks, batch: Batch, draws: Draws) -> Tensor:
    t = sample_times(draws.uniform(batch.x_0), settings.input_time_min, 1.0)
    return priming.primed_sample(networks.v_theta(batch.condition), batch.x_0, draws.normal(batch.x_0), t)


def _fake(settings: PrimingSettings, networks: Networks, batch: Batch, draws: Draws) -> Losses:
    with torch.no_grad():
        x0_hat = _primed_sample(settings, networks, batch, draws)
    t = _renoise_times(settings, batch, draws)
    loss = priming.fake_score_loss(networks.v_phi(batch.condition), x0_hat, draws.normal(x0_hat), t)
    return Losses(loss, {})


def _primed_generator(settings: PrimingSettings, networks: Networks, batch: Batch, draws: Draws) -> Losses:
    x0_hat = _primed_sample(settings, networks, batch, draws)
    t = _renoise_times(settings, batch, draws)
    v_phi = networks.v_phi(batch.condition)
    v_real = networks.v_real(batch.condition, settings.guidance)
    gradient = priming.matching_gradient(v_phi, v_real, x0_hat, draws.normal(x0_hat), t)
    return Losses(priming.matching_loss(x0_hat, gradient), {"matching_gradient": gradient.square().mean().sqrt()})


def _judge(settings: EquilibriumSettings, networks: Networks, condition: Condition) -> equilibrium.Judge:
    def judge(x_t: Tensor, t: Tensor) -> equilibrium.Logits:
        assert networks.heads is not None
        repeated = condition.repeat(len(x_t) // len(condition.text))
        features = networks.average.features(x_t, t, repeated, settings.feature_blocks)
        return networks.heads(features, repeated)

    return judge


def _discriminator(settings: EquilibriumSettings, networks: Networks, batch: Batch, draws: Draws) -> Losses:
    x_0 = batch.x_0
    with torch.no_grad():
        x0_hat = one_step(networks.v_theta(batch.condition), draws.normal(x_0))
    in_space = equilibrium.perturb_space(x_0, draws.normal(x_0, T=1), settings.r1_sigma_space)
    in_time = equilibrium.perturb_time(x_0, draws.normal(x_0, H=1, W=1), settings.r1_sigma_time)
    t = _renoise_times(settings, batch, draws)
    judge = _judge(settings, networks, batch.condition)
    samples = (x_0, x0_hat, in_space, in_time)
    real, fake, *moved = equilibrium.discriminator_logits(judge, samples, draws.normal(x_0), t)
    hinge = equilibrium.discriminator_hinge(real, fake)
    r1 = equilibrium.spatio_temporal_r1(real, *moved)
    accuracy = torch.stack([(a > 0).float().mean() + (b < 0).float().mean() for a, b in zip(real, fake, strict=True)])
    return Losses(hinge + settings.r1_weight * r1, {"hinge": hinge, "r1": r1, "accuracy": accuracy.mean() / 2})


def _equilibrium_generator(settings: EquilibriumSettings, networks: Networks, batch: Batch, draws: Draws) -> Losses:
    x0_hat = one_step(networks.v_theta(batch.condition), draws.normal(batch.x_0))
    judge = _judge(settings, networks, batch.condition)
    t = _renoise_times(settings, batch, draws)
    adversarial = equilibrium.generator_adversarial(judge, x0_hat, draws.normal(x0_hat), t)
    total, parts = settings.adversarial_weight * adversarial, {"adversarial": adversarial}
    if batch.condition.first_frame is not None and settings.conditional_sds_weight > 0:
        v_real = networks.v_real(batch.condition, settings.guidance)
        t = _renoise_times(settings, batch, draws)
        parts["conditional_sds"] = consistency.conditional_sds(v_real, x0_hat, draws.normal(x0_hat), t)
        total = total + settings.conditional_sds_weight * parts["conditional_sds"]
    return Losses(total, parts)
