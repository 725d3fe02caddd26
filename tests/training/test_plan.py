"""The plan of a run against the published models' sizes and against networks that were really built and sharded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from pose_core import config
from pose_core.errors import CheckpointError, ConfigError
from pose_core.models.folders import SHIPPED, local_teacher
from pose_core.settings import Settings
from pose_core.training.build import build_networks, phase_turns, shard_networks
from pose_core.training.muon import Muon
from pose_core.training.optimizers import build_optimizers
from pose_core.training.parallel import build_mesh
from pose_core.training.plan import PHASES, plan_run


def preset(name: str, *overrides: str) -> Settings:
    return config.load((SHIPPED / f"{name}.yaml").read_text(), overrides)


def plan_preset(name: str, *overrides: str):
    settings = preset(name, *overrides)
    return plan_run(settings, local_teacher(settings.model.teacher, settings.model.revision, weights=False))


@pytest.mark.parametrize(
    ("name", "transformer", "encoders"),
    [
        ("wan21_t2v_1_3b", 1.42e9, {"vae": 0.127e9, "text encoder": 5.68e9}),
        ("wan21_i2v_14b", 16.4e9, {"vae": 0.127e9, "text encoder": 5.68e9, "image encoder": 0.632e9}),
        ("wan22_ti2v_5b", 5.0e9, {"vae": 0.705e9, "text encoder": 5.68e9}),
        ("ltx_2b", 1.92e9, {"vae": 0.419e9, "text encoder": 4.76e9}),
        ("ltx_13b", 13.0e9, {"text encoder": 4.76e9}),
        ("hunyuan15_i2v", 8.33e9, {"text encoder": 7.07e9, "text encoder 2": 0.219e9, "image encoder": 0.428e9}),
    ],
)
def test_networks_have_the_published_sizes(name: str, transformer: float, encoders: dict[str, float]) -> None:
    plan = plan_preset(name)
    for role in ("generator", "running average", "teacher"):
        assert plan.parameters[role] == pytest.approx(transformer, rel=0.01)
    assert {role: plan.parameters.get(role) for role in encoders} == pytest.approx(encoders, rel=0.01)
    assert ("image encoder" in plan.parameters) == ("image encoder" in encoders)
    # Light beside the backbone, as the method wants them.
    assert 0 < plan.parameters["heads"] < 0.003 * transformer
    assert 0 < plan.parameters["fake-score LoRA"] < 0.07 * transformer


def test_of_two_experts_the_teacher_holds_both_and_the_generator_one() -> None:
    for name in ("wan22_i2v_a14b", "wan22_t2v_a14b"):
        plan = plan_preset(name)
        assert plan.parameters["generator"] == plan.parameters["running average"] == pytest.approx(14.3e9, rel=0.01)
        assert plan.parameters["teacher"] == 2 * plan.parameters["generator"]
        one_base = plan_preset(name, "training.generator=one_base", "training.workers=1")
        # Both experts in bfloat16, adapters beside them.
        assert one_base.workers["priming"].weights == pytest.approx(2 * plan.parameters["teacher"], rel=0.2)


def test_a_480p_clip_of_81_frames_has_its_known_shapes() -> None:
    clip = plan_preset("wan21_i2v_14b").clip
    assert (clip.pixels, clip.latents, clip.tokens) == ((3, 81, 480, 832), (16, 21, 60, 104), 32760)
    assert (clip.text, clip.image, clip.first_frame) == ((512, 4096), (257, 1280), (20, 21, 60, 104))
    clip = plan_preset("wan21_t2v_1_3b", "data.frames=33").clip
    assert (clip.latents, clip.tokens) == ((16, 9, 60, 104), 9 * 30 * 52)
    assert clip.trained_on == [(16, 9, 60, 104), (512, 4096)]


def test_the_14b_run_fits_its_workers_as_a_closed_form_says() -> None:
    plan = plan_preset("wan21_i2v_14b")
    model, workers = plan.parameters["generator"], 32
    lora, heads = plan.parameters["fake-score LoRA"], plan.parameters["heads"]
    for phase, other in (("priming", lora), ("equilibrium", heads)):
        worker = plan.workers[phase]
        assert worker.weights == pytest.approx(4 * (2 * model + other) / workers, rel=0.01)
        assert worker.gradients == pytest.approx(4 * (model + other) / workers, rel=0.01)
        assert worker.moments == 2 * worker.gradients
        assert worker.average == pytest.approx(4 * model / workers, rel=0.01)


@pytest.fixture
def three_ranks() -> Iterator[None]:
    """Rank 0 of a group of three that exchange nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("scale", [0, 1])
@pytest.mark.parametrize("phase", PHASES)
def test_the_plan_is_what_sharded_networks_really_hold(
    phase: str, scale: float, tiny_folder: Path, three_ranks: None
) -> None:
    overrides = "training.workers=3", "equilibrium.feature_blocks=[0, 1]", f"{phase}.muon_scale={scale}"
    settings = config.load("", overrides)
    plan = plan_run(settings, tiny_folder)
    networks = build_networks(phase, settings, tiny_folder, tiny_folder, torch.empty(0), device=torch.device("cpu"))
    models = [networks.generator.module, networks.teacher.module, *([networks.heads] if networks.heads else [])]
    shard_networks(networks, settings, build_mesh(settings.training, torch.device("cpu")))
    held = [parameter for model in models for parameter in model.parameters()]
    assert plan.workers[phase].weights == sum(map(local_bytes, held))
    assert plan.workers[phase].average == sum(map(local_bytes, networks.average.module.parameters()))
    optimizers = build_optimizers(networks, phase_turns(phase, settings), weight_decay=0.0).values()
    moved = [(p, type(each)) for each in optimizers for group in each.param_groups for p in group["params"]]
    assert plan.workers[phase].gradients == sum(local_bytes(p) for p, _ in moved)
    numbers = {torch.optim.AdamW: 2, Muon: 1}
    assert plan.workers[phase].moments == sum(numbers[kind] * local_bytes(p) for p, kind in moved)


def local_bytes(parameter: torch.Tensor) -> int:
    assert isinstance(parameter, DTensor)
    return parameter.to_local().numel() * parameter.to_local().element_size()


def test_more_workers_hold_less_each_and_replicas_hold_it_again() -> None:
    few, many = (plan_preset("wan21_t2v_1_3b", f"training.workers={n}").workers["priming"] for n in (8, 16))
    assert many.weights == pytest.approx(few.weights / 2, rel=0.02)
    replicas = plan_preset("wan21_t2v_1_3b", "training.workers=16", "training.replicas=2").workers["priming"]
    assert replicas == few


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("model.task=t2v", ConfigError, "set model.task=i2v"),
        ("equilibrium.feature_blocks=[0, 2]", ConfigError, r"feature_blocks=\[0, 2\].*from 0 to 1"),
        ("data.frames=10", CheckpointError, r"data.frames=10 .*2k\+1"),
        ("data.width=36", CheckpointError, "data.width=36 .*multiple of 8"),
    ],
)
def test_what_does_not_fit_the_teacher_is_named(
    override: str, error: type[ConfigError], words: str, tiny_folder: Path
) -> None:
    settings = config.load("", ["equilibrium.feature_blocks=[0]", override])
    with pytest.raises(error, match=words) as caught:
        plan_run(settings, tiny_folder)
    assert caught.value.exit_code == 2
