"""The turns of the rivals, in the same terms as ``turns.py``: same loop, data, sharding and logging.

| method | turn          | updates              | constants in its loss                            |
|--------|---------------|----------------------|--------------------------------------------------|
| lcm    | generator     | generator            | averaged generator, teacher                      |
| apt    | discriminator | discriminator, heads | x0_hat (stopped)                                 |
| apt    | generator     | generator            | discriminator, heads                             |
| ladd   | discriminator | heads                | x0_hat (stopped), teacher                        |
| ladd   | generator     | generator            | heads, teacher                                   |
| dmd2   | fake          | fake_score, heads    | x0_hat (stopped)                                 |
| dmd2   | generator     | generator            | teacher, fake score, heads                       |

APT primes with lcm's turn. Deviation: DMD2's critic is the LoRA on the shared teacher that POSE has too, where the
paper trains a third full copy; so both match distributions with the same tools.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pose_core.method import adversarial_equilibrium as equilibrium
from pose_core.method import stability_priming as priming
from pose_core.method.flow import add_noise, one_step
from pose_core.models.video_model import bound
from pose_core.rivals import apt, lcm
from pose_core.settings import Settings
from pose_core.training.state import Batch, Draws, Networks
from pose_core.training.turns import (
    Losses,
    Turn,
    adversarial_parts,
    discriminator_turn,
    judge_of,
    matching_times,
    renoise_times,
)


def lcm_turns(settings: Settings) -> list[Turn]:
    """Consistency distillation."""
    rivals = settings.rivals

    def generator(networks: Networks, batch: Batch, draws: Draws) -> Losses:
        t, s = lcm.grid_times(draws.uniform(batch.x_0), rivals.consistency_intervals)
        # Every time by its own name: what one step gains from being told another is lost where that is trained.
        v_theta, v_average = (bound(role, batch.condition) for role in (networks.generator, networks.average))
        v_real = networks.v_real(batch.condition, rivals.consistency_guidance)
        loss = lcm.consistency_loss(v_theta, v_average, v_real, batch.x_0, draws.normal(batch.x_0), t, s)
        return Losses(loss, {})

    moved = {"generator": rivals.learning_rate}
    return [Turn("generator", moved, generator, rivals.adam_beta1, muon_scale=rivals.muon_scale)]


def apt_turns(settings: Settings) -> list[Turn]:
    """Adversarial training against a full copy of the network."""
    rivals, heads = settings.rivals, settings.equilibrium

    def discriminator(networks: Networks, batch: Batch, draws: Draws) -> Losses:
        x_0 = batch.x_0
        with torch.no_grad():
            x0_hat = one_step(networks.v_theta(batch.condition), draws.normal(x_0))
        t = renoise_times(rivals, batch, draws)
        judge = judge_of(networks.discriminator, networks, batch.condition, heads.feature_blocks)
        moved = x_0 + rivals.r1_sigma * draws.normal(x_0)
        clips = torch.arange(len(t), device=t.device)
        samples = [(latents, clips) for latents in (x_0, x0_hat, moved)]
        real, fake, near = equilibrium.discriminator_logits(judge, samples, draws.normal(x_0), t)
        loss, r1 = apt.discriminator_loss(real, fake), apt.approximated_r1(real, near)
        return Losses(loss + rivals.r1_weight * r1, {"adversarial": loss, "r1": r1, **adversarial_parts(real, fake)})

    def generator(networks: Networks, batch: Batch, draws: Draws) -> Losses:
        x0_hat = one_step(networks.v_theta(batch.condition), draws.normal(batch.x_0))
        t, eps = renoise_times(rivals, batch, draws), draws.normal(x0_hat)
        judge = judge_of(networks.discriminator, networks, batch.condition, heads.feature_blocks)

        def loss(sample: Tensor) -> Tensor:
            clips = torch.arange(len(t), device=t.device)
            return apt.generator_loss(judge(add_noise(sample, eps, t), t, clips))

        return Losses(equilibrium.through_sample(loss, x0_hat), {})

    updates = {"discriminator": rivals.discriminator_learning_rate, "heads": rivals.heads_learning_rate}
    moved = {"generator": rivals.adversarial_learning_rate}
    return [
        Turn("discriminator", updates, discriminator, rivals.adam_beta1),
        Turn("generator", moved, generator, rivals.adam_beta1, muon_scale=rivals.muon_scale),
    ]


def ladd_turns(settings: Settings) -> list[Turn]:
    """Latent adversarial diffusion distillation: the frozen teacher's features, from the first step on."""
    rivals, phase = settings.rivals, settings.equilibrium

    def generator(networks: Networks, batch: Batch, draws: Draws) -> Losses:
        x0_hat = one_step(networks.v_theta(batch.condition), draws.normal(batch.x_0))
        t = renoise_times(rivals, batch, draws)
        judge = judge_of(networks.teacher, networks, batch.condition, phase.feature_blocks)
        return Losses(equilibrium.generator_adversarial(judge, x0_hat, draws.normal(x0_hat), t), {})

    heads, moved = {"heads": rivals.heads_learning_rate}, {"generator": rivals.adversarial_learning_rate}
    return [
        Turn("discriminator", heads, discriminator_turn(phase, rivals, "frozen"), rivals.adam_beta1),
        Turn("generator", moved, generator, rivals.adam_beta1, muon_scale=rivals.muon_scale),
    ]


def dmd2_turns(settings: Settings) -> list[Turn]:
    """Distribution matching and an adversarial loss together; the fake score's features carry the heads."""
    rivals, phase, blocks = settings.rivals, settings.priming, settings.equilibrium.feature_blocks

    def fake(networks: Networks, batch: Batch, draws: Draws) -> Losses:
        x_0 = batch.x_0
        with torch.no_grad():
            x0_hat = one_step(networks.v_theta(batch.condition), draws.normal(x_0))
        t, eps = matching_times(phase, batch, draws), draws.normal(x_0)
        score = priming.fake_score_loss(networks.v_phi(batch.condition), x0_hat, eps, t)
        judge = judge_of(networks.fake, networks, batch.condition, blocks)
        clips = torch.arange(len(t), device=t.device)
        real, generated = equilibrium.discriminator_logits(judge, [(x_0, clips), (x0_hat, clips)], eps, t)
        hinge = equilibrium.discriminator_hinge(real, generated)
        parts = {"score": score, "hinge": hinge, **adversarial_parts(real, generated)}
        return Losses(score + rivals.gan_weight * hinge, parts)

    def generator(networks: Networks, batch: Batch, draws: Draws) -> Losses:
        x0_hat = one_step(networks.v_theta(batch.condition), draws.normal(batch.x_0))
        t, eps = matching_times(phase, batch, draws), draws.normal(x0_hat)
        v_phi, v_real = networks.v_phi(batch.condition), networks.v_real(batch.condition, rivals.matching_guidance)
        matching = priming.matching_loss(x0_hat, priming.matching_gradient(v_phi, v_real, x0_hat, eps, t))
        judge = judge_of(networks.fake, networks, batch.condition, blocks)
        adversarial = equilibrium.generator_adversarial(judge, x0_hat, eps, t)
        parts = {"matching": matching, "adversarial": adversarial}
        return Losses(matching + rivals.gan_weight * adversarial, parts)

    updates = {"fake_score": phase.fake_learning_rate, "heads": rivals.heads_learning_rate}
    moved = {"generator": rivals.learning_rate}
    return [
        Turn("fake", updates, fake, phase.adam_beta1, phase.fake_updates),
        Turn("generator", moved, generator, phase.adam_beta1, muon_scale=phase.muon_scale),
    ]
