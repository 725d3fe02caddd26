"""Training in one process: the same steps as on a cluster, as many as asked for or as CPU seconds allow."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from phases import TINY, batches
from safetensors.torch import load_file
from torch import Tensor

from pose_core import config
from pose_core.models.video_model import Condition
from pose_core.training import local
from pose_core.training.state import Batch

NULL_TEXT = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(99))
SMALL = [*TINY, "training.workers=1", "training.batch_per_worker=2", "tracking.log_every_steps=1"]


def train(folder: Path, out: Path, *overrides: str, seconds: dict[str, float] | None = None) -> local.Trained:
    settings = config.load("", [*SMALL, "priming.steps=1", "equilibrium.steps=1", *overrides])
    return local.train_method(settings, folder, NULL_TEXT, next(batches(0)), out, seconds=seconds)


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")


def same(first: Path, second: Path) -> bool:
    return all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())


def test_the_seed_decides_the_generator_and_both_phases_change_it(tiny_folder: Path, tmp_path: Path) -> None:
    ways = {"both": [], "again": [], "other": ["run.seed=1"], "first": ["equilibrium.steps=0"]}
    trained = {name: train(tiny_folder, tmp_path / name, *changes) for name, changes in ways.items()}
    assert same(tmp_path / "both", tmp_path / "again")
    assert not same(tmp_path / "both", tmp_path / "other")
    assert not same(tmp_path / "both", tmp_path / "first")
    assert not same(tiny_folder, tmp_path / "first")
    assert [trained["both"].updates, trained["first"].updates] == [2, 1]


def test_every_update_has_its_losses_and_every_phase_its_cpu_seconds(tiny_folder: Path, tmp_path: Path) -> None:
    trained = train(tiny_folder, tmp_path / "out", "priming.steps=2")
    assert [updates for updates, _ in trained.curves] == [1, 2, 3]
    assert {name.split("/")[0] for _, values in trained.curves for name in values} == {"priming", "equilibrium"}
    assert trained.cpu_seconds.keys() == {"priming", "equilibrium"}
    assert min(trained.cpu_seconds.values()) > 0


def test_cpu_seconds_in_place_of_steps_end_a_phase_after_the_step_that_passes_them(
    tiny_folder: Path, tmp_path: Path
) -> None:
    trained = train(tiny_folder, tmp_path / "out", "priming.steps=50", seconds={"priming": 1e-6, "equilibrium": 1e-6})
    assert trained.updates == 2
    more = train(tiny_folder, tmp_path / "more", seconds={"priming": 2.0, "equilibrium": 1e-6})
    assert more.updates > 2
    assert more.cpu_seconds["priming"] >= 2.0


@pytest.mark.parametrize(
    ("steps", "shares"),
    [
        ((3, 2), {"priming": 6.0, "equilibrium": 4.0}),
        ((1, 4), {"priming": 2.0, "equilibrium": 8.0}),  # a step costs 2 s in either phase
        ((5, 0), {"priming": 10.0}),
        ((0, 5), {"equilibrium": 10.0}),
    ],
)
def test_a_method_gets_the_seconds_of_the_phases_it_has(steps: tuple[int, int], shares: dict[str, float]) -> None:
    settings = config.load("", [f"priming.steps={steps[0]}", f"equilibrium.steps={steps[1]}"])
    spent, of_other = {"priming": 6.0, "equilibrium": 4.0}, {"priming": 3, "equilibrium": 2}
    assert local.share_seconds(settings, spent, of_other) == pytest.approx(shares)


def test_a_method_with_both_phases_shares_out_the_seconds_of_one_that_has_one() -> None:
    settings = config.load("", ["priming.steps=3", "equilibrium.steps=1"])
    shares = local.share_seconds(settings, {"equilibrium": 8.0}, {"equilibrium": 4})
    assert shares == pytest.approx({"priming": 6.0, "equilibrium": 2.0})


def test_every_epoch_has_every_clip_once_in_an_order_of_its_own_that_the_seed_decides() -> None:
    clips = Batch(torch.arange(6.0).view(6, 1, 1, 1, 1), Condition(torch.arange(6.0).view(6, 1, 1)))

    def epochs(seed: int) -> list[list[float]]:
        taken = list(itertools.islice(local.shuffled(clips, 4, seed), 3))
        assert all(torch.equal(batch.x_0.flatten(), batch.condition.text.flatten()) for batch in taken)
        order = torch.cat([batch.x_0.flatten() for batch in taken]).tolist()
        return [order[:6], order[6:]]

    first, second = epochs(0)
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4, 5]
    assert first != second
    assert epochs(0) == [first, second]
    assert epochs(1) != [first, second]
