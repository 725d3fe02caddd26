"""Every family on two FSDP2 ranks: each rank reads its own shard, and both phases train as in one process."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from family_ranks import CASES, MAKE, NAMES, PHASES, SHARING, STEPS, share, train, work
from spawned import run_ranks

EVERY_CASE = pytest.mark.parametrize("name", NAMES.values())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folders = tmp_path_factory.mktemp("families")
    for case, make in MAKE.items():
        make(folders / "-".join(case))
    return folders


@pytest.fixture(scope="module")
def ranks(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found; spawned once for all families."""
    return run_ranks(work, folders, tmp_path_factory.mktemp("ranks"))


@EVERY_CASE
def test_every_sharded_weight_is_the_files(ranks: list[dict[str, Any]], name: str) -> None:
    assert [rank[name][phase]["wrong"] for rank in ranks for phase in PHASES] == [[]] * 4


@EVERY_CASE
def test_both_phases_run_two_steps(ranks: list[dict[str, Any]], name: str) -> None:
    for phase in PHASES:
        first, second = (rank[name][phase]["curves"] for rank in ranks)
        assert len(first) == STEPS and first == second
        assert all(math.isfinite(value) for step in first for value in step.values())
        assert all(value == 0 for step in first for curve, value in step.items() if curve.endswith("/skipped"))


@EVERY_CASE
def test_what_learns_moves_and_the_teacher_does_not(ranks: list[dict[str, Any]], name: str) -> None:
    for phase, also in (("priming", "fake_score"), ("equilibrium", "heads")):
        for rank in ranks:
            assert rank[name][phase]["moved"] == sorted(["average", "generator", also])


@pytest.mark.parametrize("case", [case for case in CASES if case[2] == "full"], ids=NAMES.get)
def test_the_first_losses_are_those_of_one_process(
    ranks: list[dict[str, Any]], folders: Path, case: tuple[str, ...]
) -> None:
    alone = train(case, folders / "-".join(case[:2]), sharded=False)
    for phase, curve in (("priming", "fake/loss"), ("equilibrium", "discriminator/loss")):
        two, one = (found[phase]["curves"][0][curve] for found in (ranks[0][NAMES[case]], alone))
        assert two == pytest.approx(one, rel=1e-5)


def test_ranks_that_share_a_clips_tokens_report_the_losses_of_one_process(tmp_path: Path) -> None:
    for case in SHARING:
        MAKE[case[:2]](tmp_path / "-".join(case[:2]))
        for file in tmp_path.glob("*/transformer*/config.json"):  # the same weights as two heads, one for each rank
            config = json.loads(file.read_text()) | {"num_attention_heads": 2, "attention_head_dim": 16}
            file.write_text(json.dumps(config))
    first, second = run_ranks(share, tmp_path, tmp_path)
    assert first == second
    for case in SHARING:
        alone = train(case, tmp_path / "-".join(case[:2]), sharded=False)
        for phase in PHASES:
            curves = [found[phase]["curves"][0] for found in (first[NAMES[case]], alone)]
            for curve in (curve for curve in curves[1] if curve.endswith("/loss")):
                assert curves[0][curve] == pytest.approx(curves[1][curve], rel=1e-4), (case, phase, curve)
