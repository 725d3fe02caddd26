"""A step without numbers holds and computes what closed forms say, and a deep network is extended exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from family_ranks import MAKE
from phases import GLOBAL_CLIPS, TINY, Phase, build_phase

from pose_core import config
from pose_core.errors import ConfigError
from pose_core.models import small
from pose_core.settings import Settings
from pose_core.training import simulation
from pose_core.training.memory import ROLES, Segment, Tracker
from pose_core.training.plan import plan_run
from pose_core.training.simulation import Step, simulate

SMALL = [*TINY, "data.frames=5", "data.height=16", "data.width=16", "training.activation_checkpointing=full"]


def settings(*overrides: str) -> Settings:
    return config.load("", [*SMALL, f"training.batch_per_worker={GLOBAL_CLIPS}", "training.workers=1", *overrides])


def folder_of_depth(tiny_folder: Path, folder: Path, blocks: int) -> Path:
    """The tiny folder with another number of blocks; only its configs are read."""
    shutil.copytree(tiny_folder, folder)
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_layers": blocks}))
    return folder


@pytest.mark.parametrize(
    ("phase", "override"),
    [
        ("priming", "training.generator=one_base"),
        ("equilibrium", "training.generator=full"),
        ("priming", "priming.muon_scale=1"),
    ],
)
def test_what_stays_is_what_the_closed_form_says(phase: str, override: str, tiny_folder: Path) -> None:
    asked = settings("training.workers=3", "training.batch_per_worker=1", override)
    closed = plan_run(asked, tiny_folder).workers[phase]
    step = simulate(phase, asked, tiny_folder)
    begin = step.segments[0].windows[0]
    buffers = begin["weights"] - closed.weights
    assert 0 <= buffers < 2**20  # tables of rotary positions, which are no parameters
    assert begin["average"] == closed.average
    # AdamW also keeps a step a parameter.
    assert 0 <= begin["optimiser"] - closed.moments < 4 * 200
    most = max(window["gradients"] for segment in step.segments for window in segment.windows)
    assert 0 < most <= closed.gradients


@pytest.mark.parametrize("features", [(3, 7), (2, 5), (0, 1)])
def test_a_deep_network_is_extended_as_if_it_were_simulated_whole(
    features: tuple[int, int], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of_depth(tiny_folder, tmp_path / "deep", 8)
    asked = settings("training.workers=2", f"equilibrium.feature_blocks={list(features)}")
    extended = simulate("equilibrium", asked, folder)
    monkeypatch.setattr(simulation, "LEAST_DEPTH", 8)
    whole = simulate("equilibrium", asked, folder)
    assert (extended.flops, extended.sent) == (whole.flops, whole.sent)
    assert extended.peak_bytes == pytest.approx(whole.peak_bytes, rel=2e-3)


def test_it_counts_the_multiplications_of_a_closed_form(tiny_folder: Path) -> None:
    """One block more costs its matrices and its attention, in each of the passes that a turn takes through it."""
    with torch.device("meta"):
        block = small.build_transformer(heads=1, layers=1, channels=8, text_width=32).blocks[0]
    tokens, width, text, image = 3 * 2 * 2, 32, 16, 5
    asked = settings("training.batch_per_worker=1", "training.activation_checkpointing=none", "priming.guidance=1")
    matrices = {name: p.numel() for name, p in block.named_parameters() if p.ndim == 2}
    of_text = sum(matrices[f"attn2.{name}.weight"] for name in ("to_k", "to_v"))
    of_image = sum(matrices[f"attn2.{name}.weight"] for name in ("add_k_proj", "add_v_proj"))
    of_video = sum(matrices.values()) - of_text - of_image
    attention = 4 * tokens * (tokens + text + 1 + image) * width
    forward = 2 * (of_video * tokens + of_text * (text + 1) + of_image * image) + attention
    found = []
    for blocks in (2, 3):
        with simulation._of_depth(tiny_folder, blocks) as folder:
            found.append(simulate("priming", asked, folder).flops)
    plain = found[1] - found[0]
    # A fake turn, of which there are two: a sample, the fake score forward, and backward through frozen weights. The
    # generator's: forward with generator, fake and real score, and backward, twice a forward pass. LoRA comes on top.
    assert 2 * 3 + 5 < plain / forward < 12


def test_more_ranks_hold_less_and_context_ranks_share_tokens(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two_heads"
    shutil.copytree(tiny_folder, folder)
    small.build_transformer(heads=2, layers=2, channels=8, text_width=32).save_pretrained(folder / "transformer")
    one, two, shared, replicas = (
        simulate("priming", settings("data.frames=9", "data.height=32", "data.width=32", *each), folder)
        for each in (
            [],
            ["training.workers=2"],
            ["training.workers=2", "training.context_workers=2"],
            ["training.workers=2", "training.replicas=2"],
        )
    )
    assert one.sent == 0 < two.sent < shared.sent
    assert two.peak["optimiser"] == pytest.approx(one.peak["optimiser"] / 2, rel=0.05)
    assert replicas.peak["optimiser"] == one.peak["optimiser"]
    assert 0.5 * two.flops < shared.flops < 0.7 * two.flops  # all ranks embed the prompt
    assert most(shared, "activations") < 0.7 * most(two, "activations")


def test_recomputing_saves_memory_and_costs_computation(tiny_folder: Path, tmp_path: Path) -> None:
    folder = folder_of_depth(tiny_folder, tmp_path / "four", 4)
    none, selective, full = (
        simulate("priming", settings(f"training.activation_checkpointing={kept}"), folder)
        for kept in ("none", "selective", "full")
    )
    assert none.peak_bytes > selective.peak_bytes >= full.peak_bytes
    assert none.flops < selective.flops < full.flops


@pytest.mark.parametrize("case", [case for case in MAKE if case[1] == "i2v"], ids="-".join)
def test_every_family_can_be_simulated_or_says_that_it_cannot(case: tuple[str, str], tmp_path: Path) -> None:
    MAKE[case](tmp_path / "model")
    own = (f"model.family={case[0]}", f"model.task={case[1]}", "training.batch_per_worker=1", "training.workers=2")
    asked = settings("data.frames=9", "data.height=32", "data.width=32", *own)
    for phase in ("priming", "equilibrium"):
        if case[0] == "hunyuan15":
            with pytest.raises(ConfigError, match="model.family=hunyuan15 cannot be simulated"):
                simulate(phase, asked, tmp_path / "model")
        else:
            closed = plan_run(asked, tmp_path / "model").workers[phase]
            begin = simulate(phase, asked, tmp_path / "model").segments[0].windows[0]
            assert 0 <= begin["weights"] - closed.weights < 2**20
            assert begin["average"] == closed.average


def most(step: Step, role: str) -> int:
    return max(window[role] for segment in step.segments for window in segment.windows)


def test_the_tracker_follows_storages_by_role() -> None:
    with Tracker() as tracker:
        tracker.start("first")
        held = torch.zeros(1000)
        tracker.tag([held], "weights")
        view = held[10:]
        gone = [torch.zeros(500)]
        gone.clear()
        tracker.start("second")
        kept = held + 1
        held.untyped_storage().resize_(0)
        del view
        tracker.finish()
    assert tracker.now == dict.fromkeys(ROLES, 0) | {"activations": kept.nbytes}
    nothing = dict.fromkeys(ROLES, 0)
    assert tracker.segments == [
        Segment("first", [nothing | {"weights": 4000, "activations": 2000}]),
        Segment("second", [nothing | {"weights": 4000, "activations": 4000}]),
    ]


def test_simulating_leaves_nothing_behind(tiny_folder: Path) -> None:
    resize = torch.UntypedStorage.resize_
    before: Phase = build_phase("priming", tiny_folder)
    simulate("priming", settings(), tiny_folder)
    assert torch.UntypedStorage.resize_ is resize
    before.train(0, 1)
    assert before.history[0]["fake/loss"] > 0
