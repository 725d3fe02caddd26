"""Teacher, fake score, generator and backbone on one set of weights train exactly as on sets of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from phases import PHASES, Phase, batches, build_phase, differing, load, save

from pose_core.training.state import Draws

LORA = ["training.lora_rank=2", "equilibrium.backbone=current"]


def adapters(phase: Phase) -> dict[str, torch.Tensor]:
    roles = phase.networks.roles()
    return {
        f"{role}/{name}": value.detach().clone()
        for role in roles
        if role != "teacher"
        for name, value in roles[role].weights().items()
    }


@pytest.mark.parametrize("backbone", ["current", "average", "frozen"])
@pytest.mark.parametrize("name", PHASES)
def test_its_losses_and_adapters_equal_those_of_separate_copies(tiny_folder: Path, name: str, backbone: str) -> None:
    found = []
    for mode in ("lora", "one_base"):
        phase = build_phase(name, tiny_folder, *LORA, f"training.generator={mode}", f"equilibrium.backbone={backbone}")
        phase.train(0, 4)
        found.append(phase)
    assert found[0].history == found[1].history
    assert differing(adapters(found[0]), adapters(found[1])) == []


def test_it_holds_the_base_once(tiny_folder: Path) -> None:
    def held(mode: str) -> int:
        networks = build_phase("priming", tiny_folder, *LORA, f"training.generator={mode}").networks
        return sum(parameter.numel() for module in networks.modules() for parameter in module.parameters())

    base = sum(p.numel() for p in build_phase("priming", tiny_folder).networks.average.module.parameters())
    assert held("full") > 3 * base
    assert 2 * base < held("lora") < 2.5 * base
    assert base < held("one_base") < 1.5 * base


def test_recomputed_activations_change_nothing(tiny_folder: Path) -> None:
    found = []
    for recompute in ("none", "full", "selective"):
        phase = build_phase(
            "equilibrium",
            tiny_folder,
            *LORA,
            "training.generator=one_base",
            f"training.activation_checkpointing={recompute}",
        )
        phase.networks.generator.module.train()
        phase.train(0, 2)
        found.append(phase)
    assert found[0].history == found[1].history == found[2].history


def test_frozen_weights_are_kept_in_the_precision_of_computation(tiny_folder: Path) -> None:
    networks = build_phase(
        "priming", tiny_folder, *LORA, "training.generator=one_base", "training.precision=bfloat16"
    ).networks
    assert {str(p.dtype) for p in networks.teacher.weights().values()} == {"torch.bfloat16"}
    assert {str(p.dtype) for p in networks.generator.weights().values()} == {"torch.float32"}


def test_a_checkpoint_holds_adapters_only_and_goes_on_bit_by_bit(tiny_folder: Path, tmp_path: Path) -> None:
    phase, restored = (build_phase("priming", tiny_folder, *LORA, "training.generator=one_base") for _ in range(2))
    phase.train(0, 2)
    save(tmp_path, 2, phase)
    assert load(tmp_path, restored) == 2
    phase.train(2, 3)
    restored.train(2, 3)
    assert differing(phase.tensors(), restored.tensors()) == []
    assert restored.history == phase.history[2:]


def test_the_second_phase_goes_on_with_the_adapter_of_the_first(tiny_folder: Path, tmp_path: Path) -> None:
    from pose_core import config
    from pose_core.training.build import build_networks

    phase = build_phase("priming", tiny_folder, *LORA, "training.generator=one_base")
    phase.train(0, 2)
    average = phase.networks.average
    average.save(tmp_path / "transformer", dict(average.module.state_dict()))
    settings = config.load("", [*LORA, "training.generator=one_base", "equilibrium.feature_blocks=[0]"])
    networks = build_networks(
        "equilibrium", settings, tiny_folder, tmp_path, torch.zeros(1, 6, 32), device=torch.device("cpu")
    )
    batch, t = next(batches(0)), torch.full((4,), 0.5)
    with torch.no_grad():
        for role in (networks.generator, networks.average):
            torch.testing.assert_close(
                role.velocity(batch.x_0, t, batch.condition), average.velocity(batch.x_0, t, batch.condition)
            )


def test_current_backbone_weights_get_nothing_from_being_the_judge(tiny_folder: Path) -> None:
    """The generator's gradient flows through its sample alone, whoever judges that."""
    phase = build_phase(
        "equilibrium", tiny_folder, "equilibrium.backbone=current", "equilibrium.conditional_sds_weight=0"
    )
    draws = Draws(0, 0, "any", 0, torch.device("cpu"))
    losses = phase.turns[1].loss(phase.networks, next(batches(0)), draws)
    losses.total.backward()
    through_current = [p.grad.clone() for p in phase.networks.generator.weights().values() if p.grad is not None]
    other = build_phase(
        "equilibrium", tiny_folder, "equilibrium.backbone=frozen", "equilibrium.conditional_sds_weight=0"
    )
    other.turns[1].loss(other.networks, next(batches(0)), Draws(0, 0, "any", 0, torch.device("cpu"))).total.backward()
    # All three backbones are the teacher at the first step: as constants they give the same gradient.
    for mine, theirs in zip(through_current, other.networks.generator.weights().values(), strict=True):
        torch.testing.assert_close(mine, theirs.grad)
