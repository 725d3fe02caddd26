"""Whose turn it is: which loss each turn of a phase takes and which parameters it updates; said here, once.

| phase       | turn          | updates    | constants in its loss                                               |
|-------------|---------------|------------|---------------------------------------------------------------------|
| priming     | fake          | fake_score | x0_hat (stopped)                                                    |
| priming     | generator     | generator  | teacher, fake score                                                 |
| equilibrium | discriminator | heads      | x0_hat (stopped), backbone                                          |
| equilibrium | generator     | generator  | heads, backbone (of now, averaged or the teacher's), teacher        |

The rivals' turns are in ``rival_turns.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pose_core.method import adversarial_equilibrium as equilibrium
from pose_core.method import conditional_consistency as consistency
from pose_core.method import stability_priming as priming
from pose_core.method.flow import one_step, sample_times
from pose_core.method_settings import EquilibriumSettings, PrimingSettings, RenoisedSection
from pose_core.models.lora import Role
from pose_core.models.video_model import Condition
from pose_core.training.state import Batch, Draws, Networks


class Losses(NamedTuple):
    """The scalar to minimise and what else is worth a curve."""

    total: Tensor
    parts: dict[str, Tensor]


Loss = Callable[[Networks, Batch, Draws], Losses]


@dataclass(frozen=True)
class Turn:
    """One share of a step: ``updates`` gives the learning rate of each group of ``Networks.groups()`` that moves.

    ``adam_beta1`` is the momentum of AdamW, ``muon_scale`` Muon's learning rate for the matrices in the generator's
    blocks as a multiple of its own (0: AdamW moves them, too), ``repeats`` how often a step takes it.
    """

    name: str
    updates: dict[str, float]
    loss: Loss
    adam_beta1: float
    repeats: int = 1
    muon_scale: float = 0.0


def priming_turns(settings: PrimingSettings) -> list[Turn]:
    """Phase I: the fake score follows, then the generator moves."""

    def sample(networks: Networks, batch: Batch, draws: Draws) -> Tensor:
        first = settings.input_time_min if settings.input_time_start is None else settings.input_time_start
        start = priming.window_start(progress(settings, draws), first, settings.input_time_min)
        t = sample_times(draws.uniform(batch.x_0), start, 1.0)
        return priming.primed_sample(networks.v_theta(batch.condition), batch.x_0, draws.normal(batch.x_0), t)

    def fake(networks: Networks, batch: Batch, draws: Draws) -> Losses:
        with torch.no_grad():
            x0_hat = sample(networks, batch, draws)
        t = matching_times(settings, batch, draws)
        loss = priming.fake_score_loss(networks.v_phi(batch.condition), x0_hat, draws.normal(x0_hat), t)
        return Losses(loss, {})

    def generator(networks: Networks, batch: Batch, draws: Draws) -> Losses:
        x0_hat = sample(networks, batch, draws)
        t = matching_times(settings, batch, draws)
        v_phi = networks.v_phi(batch.condition)
        v_real = networks.v_real(batch.condition, settings.guidance)
        normalise = settings.gradient_normalisation == "mean_abs"
        gradient = priming.matching_gradient(v_phi, v_real, x0_hat, draws.normal(x0_hat), t, normalise=normalise)
        return Losses(priming.matching_loss(x0_hat, gradient), {"matching_gradient": gradient.square().mean().sqrt()})

    moved = {"generator": settings.learning_rate}
    return [
        Turn("fake", {"fake_score": settings.fake_learning_rate}, fake, settings.adam_beta1, settings.fake_updates),
        Turn("generator", moved, generator, settings.adam_beta1, muon_scale=settings.muon_scale),
    ]


def equilibrium_turns(settings: EquilibriumSettings) -> list[Turn]:
    """Phase II: the heads judge, then the generator answers."""

    def generator(networks: Networks, batch: Batch, draws: Draws) -> Losses:
        x0_hat = one_step(networks.v_theta(batch.condition), draws.normal(batch.x_0))
        judge = judge_of(backbone(networks, settings.backbone), networks, batch.condition, settings.feature_blocks)
        t = renoise_times(settings, batch, draws)
        adversarial = equilibrium.generator_adversarial(judge, x0_hat, draws.normal(x0_hat), t)
        total, parts = settings.adversarial_weight * adversarial, {"adversarial": adversarial}
        if batch.condition.first_frame is not None and settings.conditional_sds_weight > 0:
            v_real = networks.v_real(batch.condition, settings.guidance)
            t = renoise_times(settings, batch, draws)
            parts["conditional_sds"] = consistency.conditional_sds(v_real, x0_hat, draws.normal(x0_hat), t)
            total = total + settings.conditional_sds_weight * parts["conditional_sds"]
        return Losses(total, parts)

    heads, moved = {"heads": settings.heads_learning_rate}, {"generator": settings.learning_rate}
    return [
        Turn("discriminator", heads, discriminator_turn(settings, settings, settings.backbone), settings.adam_beta1),
        Turn("generator", moved, generator, settings.adam_beta1, muon_scale=settings.muon_scale),
    ]


def discriminator_turn(settings: EquilibriumSettings, times: RenoisedSection, chosen: str) -> Loss:
    """The heads' loss on the features of a backbone that is constant in it: hinge and spatio-temporal R1."""

    def discriminator(networks: Networks, batch: Batch, draws: Draws) -> Losses:
        x_0 = batch.x_0
        with torch.no_grad():
            x0_hat = one_step(networks.v_theta(batch.condition), draws.normal(x_0))
        clips = torch.arange(len(x_0), device=x_0.device)
        some = clips[:: settings.r1_every_clips]
        in_space = equilibrium.perturb_space(x_0[some], draws.normal(x_0, T=1)[some], settings.r1_sigma_space)
        in_time = equilibrium.perturb_time(x_0[some], draws.normal(x_0, H=1, W=1)[some], settings.r1_sigma_time)
        t = renoise_times(times, batch, draws)
        role = backbone(networks, chosen)
        judge = judge_of(role, networks, batch.condition, settings.feature_blocks, constant=True)
        samples = (x_0, clips), (x0_hat, clips), (in_space, some), (in_time, some)
        real, fake, *moved = equilibrium.discriminator_logits(judge, samples, draws.normal(x_0), t)
        hinge = equilibrium.discriminator_hinge(real, fake)
        r1 = equilibrium.spatio_temporal_r1([head[some] for head in real], *moved)
        parts = {"hinge": hinge, "r1": r1, **adversarial_parts(real, fake)}
        return Losses(hinge + settings.r1_weight * r1, parts)

    return discriminator


def backbone(networks: Networks, chosen: str) -> Role:
    """Whose features the heads judge."""
    return {"current": networks.generator, "average": networks.average, "frozen": networks.teacher}[chosen]


def judge_of(
    role: Role | None, networks: Networks, condition: Condition, blocks: tuple[int, ...], *, constant: bool = False
) -> equilibrium.Judge:
    """Backbone features, then heads; ``constant`` keeps no graph of the backbone, for a turn of the heads alone."""

    def judge(x_t: Tensor, t: Tensor, clips: Tensor) -> equilibrium.Logits:
        assert role is not None and networks.heads is not None
        of_each = condition.rows(clips)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not constant):
            features = role.features(x_t, t, of_each, blocks)
        return networks.heads(features, of_each)

    return judge


def adversarial_parts(real: equilibrium.Logits, fake: equilibrium.Logits) -> dict[str, Tensor]:
    """How often the heads are right."""
    right = [(a > 0).float().mean() + (b < 0).float().mean() for a, b in zip(real, fake, strict=True)]
    return {"accuracy": torch.stack(right).mean() / 2}


def progress(settings: PrimingSettings, draws: Draws) -> float:
    """How much of the phase's steps are done; 1 where it goes on behind them until its seconds are used up."""
    return min(draws.step / max(settings.steps, 1), 1.0)


def matching_times(settings: PrimingSettings, batch: Batch, draws: Draws) -> Tensor:
    """Times ``[B]`` at which scores are matched, and learnt."""
    shift = priming.shift_at(progress(settings, draws), settings.timestep_shift, settings.unshifted_share)
    return renoise_times(settings, batch, draws, shift)


def renoise_times(settings: RenoisedSection, batch: Batch, draws: Draws, shift: float | None = None) -> Tensor:
    """Times ``[B]`` at which generated clips are noised again, shifted as the settings say or by ``shift``."""
    window = settings.renoise_time_min, settings.renoise_time_max
    middle = settings.renoise_distribution == "logit_normal"
    shift = settings.timestep_shift if shift is None else shift
    return sample_times(draws.uniform(batch.x_0), *window, shift, middle=middle)
