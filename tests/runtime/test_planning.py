"""``pipelines/plan.py``: what it prints, what it refuses, and the smallest change that makes a misfit fit."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from pose_core import config
from pose_core.errors import ConfigError
from pose_core.models.folders import SHIPPED
from pose_core.models.small_folders import save_ltx
from pose_core.runtime import planning
from pose_core.runtime.planning import GIB, Change, Rates, changes, longest_clip, smallest_change
from pose_core.settings import Settings
from pose_core.training.memory import ROLES, Segment
from pose_core.training.simulation import Step

SCRIPT = str(SHIPPED.parent / "plan.py")
RATES = Rates(memory=80, reserve=0.1, teraflops=1000, utilisation=0.5, gigabytes=50, price=2)


def step(gib: float, flops: int = 0, sent: int = 0) -> Step:
    window = dict.fromkeys(ROLES, 0) | {"activations": int(gib * GIB)}
    return Step((Segment("begin", [window]),), flops, sent)


def settings(folder: Path, *overrides: str) -> Settings:
    own = [f"model.teacher={folder}", "equilibrium.feature_blocks=[0, 1]", "training.workers=8"]
    return config.load("", [*own, *overrides])


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *typed: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the script."""
    monkeypatch.setattr(sys, "argv", [SCRIPT, *typed])
    code: object = 0
    try:
        runpy.run_path(SCRIPT, run_name="__main__")
    except SystemExit as caught:
        code = caught.code
    out, err = capsys.readouterr()
    assert isinstance(code, int)
    return code, out, err


def test_time_is_what_takes_longer_and_memory_keeps_its_reserve() -> None:
    assert RATES.seconds(step(1, flops=10**15, sent=10**9)) == pytest.approx(2.0)
    assert RATES.seconds(step(1, flops=10**12, sent=10**11)) == pytest.approx(2.0)
    assert RATES.fits(step(72)) and not RATES.fits(step(72.1))


def test_it_prints_a_row_a_phase_and_count(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def simulate(phase: str, asked: Settings, _folder: Path) -> Step:
        seen.append((phase, asked.training.workers))
        return step(100 / asked.training.workers, flops=5 * 10**14)

    monkeypatch.setattr(planning, "simulate", simulate)
    typed = [f"model.teacher={tiny_folder}", "equilibrium.feature_blocks=[0]", "priming.steps=3600"]
    code, out, _ = run(monkeypatch, capsys, *typed, "--gpus", "1,2", "--gpu-teraflops", "1000", "--no-suggestions")
    assert code == 0
    assert seen == [(phase, count) for count in (1, 2) for phase in ("priming", "equilibrium")]
    # 5e14 operations at 0.4 of 1e15 a second are 1.25 s; 3600 steps of them 1.25 hours, at 2.5 each.
    assert re.search(r"1 +priming +(0\.0 +){4}100\.0 +0\.0 +100\.0 +no +0\.5 +0 +1\.2 +1\.2 +3 ", out)
    assert re.search(r"2 +priming +(0\.0 +){4}50\.0 +0\.0 +50\.0 +yes +0\.5 +0 +1\.2 +1\.2 +6 ", out)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["--gpus", "3", "training.workers=4", "training.replicas=4"], "training.workers=3 must be a multiple"),
        (["--gpus", "0"], "0 is not a list of whole numbers"),
        (["--gpus", "4", "training.context_workers=2"], "training.context_workers=2 does not fit"),
        (["--gpu-price", "-1"], "is not a number above 0"),
        (["model.teacher=nowhere/at-all-there", "--gpus", "x"], "x is not a list"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_the_call(
    typed: list[str],
    words: str,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = [f"model.teacher={tiny_folder}", "equilibrium.feature_blocks=[0]"]
    code, out, err = run(monkeypatch, capsys, *own, *typed)
    assert (code, out) == (2, "")
    assert words in err


@pytest.mark.parametrize(
    ("needed", "found"),
    [
        (90, "training.activation_checkpointing=full"),
        (100, "training.generator=lora"),
        (120, "training.activation_checkpointing=full training.generator=lora"),
        (200, None),
    ],
)
def test_the_smallest_change_that_fits_is_named(
    needed: float, found: str | None, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def simulate(_phase: str, asked: Settings, _folder: Path) -> Step:
        training = asked.training
        saved = 20 * (training.activation_checkpointing == "full") + 30 * (training.generator == "lora")
        return step(needed - saved)

    monkeypatch.setattr(planning, "simulate", simulate)
    expected = None if found is None else Change(found, 70 * GIB)
    assert smallest_change(settings(tiny_folder), tiny_folder, RATES, phases=("priming",)) == expected


def test_changes_go_from_those_that_leave_the_result_as_it_is(tiny_folder: Path) -> None:
    names = [name for each in changes(settings(tiny_folder)) for name in each]
    assert names.index("activation_checkpointing") < names.index("accumulation") < names.index("context_workers")
    assert names[-1] == "generator"
    leanest = ["activation_checkpointing=full", "accumulation=8", "generator=one_base", "precision=bfloat16"]
    left = list(changes(settings(tiny_folder, *(f"training.{each}" for each in leanest))))
    assert left == [{"context_workers": ranks} for ranks in (2, 4, 8)]


def test_sharing_tokens_is_refused_where_the_family_cannot(tmp_path: Path) -> None:
    save_ltx(tmp_path / "ltx", timestep_conditioning=False)
    typed = ["model.family=ltx", "data.height=32", "training.context_workers=2"]
    with pytest.raises(ConfigError, match="training.context_workers=2 does not fit model.family=ltx: set it to 1"):
        planning.check(settings(tmp_path / "ltx", *typed), tmp_path / "ltx")


def test_the_longest_clip_is_the_last_that_fits(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def simulate(_phase: str, asked: Settings, _folder: Path) -> Step:
        return step(12 + asked.data.frames)

    monkeypatch.setattr(planning, "simulate", simulate)
    longest_clip(settings(tiny_folder), RATES)
    assert "has 59 frames" in capsys.readouterr().out  # 60 and fewer fit; frames come as 2k + 1
