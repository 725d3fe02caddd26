"""A rehearsal works as the run does, on few ranks and a small model of the family, and says what became of it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from pose_core import config
from pose_core.errors import ClusterError
from pose_core.models.small_folders import save_small
from pose_core.runtime import rehearsal
from pose_core.runtime.manifests import STAGES
from pose_core.runtime.rehearsal import Seen, rehearse
from pose_core.runtime.rehearsal_settings import mesh, rehearsed, size_of
from pose_core.settings import Settings
from pose_core.training.plan import check_fit

CONFIGS = sorted((Path(__file__).parents[2] / "pipelines" / "configs").glob("*.yaml"))


def load(config_file: Path, *overrides: str) -> Settings:
    return config.load(config_file.read_text(), overrides)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_preset_has_a_rehearsal_that_fits_its_small_model(file: Path, tmp_path: Path) -> None:
    settings = load(file)
    save_small(tmp_path, settings.model.family, settings.model.task, size_of(settings))
    small = rehearsed(settings, tmp_path)
    assert check_fit(small, tmp_path).tokens % 2 == 0
    assert (small.storage.uri, small.tracking.uri, small.data.raw_uri) == ("embedded", "", "moving_digits")
    assert small.model.teacher == str(tmp_path) and small.run.name == "rehearsal"
    assert small.training.gpus_per_worker == small.data.encoder_gpus == 0
    asked, got = settings.training, small.training
    for name in ("generator", "precision", "activation_checkpointing", "compile_blocks"):
        assert getattr(got, name) == getattr(asked, name)
    assert small.method == settings.method and small.priming.fake_updates == settings.priming.fake_updates
    assert small.equilibrium.backbone == settings.equilibrium.backbone
    assert len(small.equilibrium.feature_blocks) == len(settings.equilibrium.feature_blocks)


@pytest.mark.parametrize(
    ("overrides", "shape", "batch", "parts"),
    [
        ([], (1, 2, 1), 1, 1),
        (["training.workers=1"], (1, 1, 1), 1, 1),
        (["training.replicas=4"], (2, 2, 1), 1, 1),
        (["training.replicas=4", "training.context_workers=8"], (2, 1, 2), 1, 1),
        (["training.replicas=2", "training.context_workers=4"], (2, 2, 2), 1, 1),
        (["training.batch_per_worker=12", "training.accumulation=3"], (1, 2, 1), 4, 2),
        (["training.batch_per_worker=3", "training.accumulation=3"], (1, 2, 1), 2, 2),
    ],
)
def test_every_dimension_that_has_several_ranks_has_two(
    overrides: list[str], shape: tuple[int, int, int], batch: int, parts: int, tmp_path: Path
) -> None:
    settings = load(CONFIGS[0].with_name("wan21_i2v_14b.yaml"), *overrides)
    small = rehearsed(settings, tmp_path).training
    assert mesh(small) == shape
    assert (small.batch_per_worker, small.accumulation) == (batch, parts)
    assert small.workers * small.cpus_per_worker <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("overrides", "steps"), [([], (20, 4)), (["priming.steps=0"], (0, 20)), (["equilibrium.steps=0"], (20, 0))]
)
def test_the_first_phase_is_long_enough_for_a_kill_and_one_that_is_left_out_stays_so(
    overrides: list[str], steps: tuple[int, int], tmp_path: Path
) -> None:
    small = rehearsed(load(CONFIGS[0].with_name("ltx_2b.yaml"), *overrides), tmp_path)
    assert (small.priming.steps, small.equilibrium.steps) == steps
    assert max(steps) > rehearsal.KILL_AFTER + small.training.checkpoint_every_steps


def test_lines_tell_where_a_phase_is_and_whether_it_went_on() -> None:
    assert rehearsal._step("stability_priming            3/20     12 s  fake 0.2") == 3
    assert rehearsal._step("stability_priming           20/20     12 s") == 0  # nothing is left to kill
    assert rehearsal._step("rendering clips              3/6       1 s") == 0
    assert rehearsal._step("stability_priming  s3://a/b ") == 0
    seen = Seen(["adversarial_equilibrium  goes on from step 9", "stability_priming   goes on from step 4"])
    assert seen.resumed() == 0
    seen.killed = "stability_priming"
    assert seen.resumed() == 4


def test_a_part_that_fails_is_named_and_what_it_left_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(rehearsal, "PIPELINES", tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "prepare_data.py").write_text("print('fine')")
    script = "import os, sys; print('error: no luck'); sys.exit(any(n.startswith('RAY_') for n in os.environ) or 3)"
    (tmp_path / "stability_priming.py").write_text(script)
    monkeypatch.setenv("RAY_ADDRESS", "http://somebody:8265")
    with pytest.raises(ClusterError, match="failed at stability_priming, kill and resume; .* is in /") as caught:
        rehearse(load(CONFIGS[0].with_name("wan21_t2v_1_3b.yaml")), "prepare_data", "stability_priming")
    assert caught.value.exit_code == 1
    out = capsys.readouterr().out
    assert "ranks     2 of 8: 1 of 1 replicas, 2 of 8 shards, 1 of 1 context workers" in out
    assert "prepare_data             ok" in out and "stability_priming        FAILED" in out and "error: no luck" in out
    folder = Path(str(caught.value).rsplit(" ", 1)[1])
    assert (folder / "stability_priming.log").read_text() == "error: no luck\n"


@pytest.mark.parametrize(
    ("lines", "logs", "ended"),
    [
        ([f"{stage} 12 done" for stage in STAGES], 5, 5),
        (["error: job rehearsal-evaluate-1 failed"], 4, 3),
        (["error: no Ray"], 0, 0),
    ],
)
def test_stages_ended_by_the_table_or_before_the_last_log(
    lines: list[str], logs: int, ended: int, tmp_path: Path
) -> None:
    folder = tmp_path / "outputs/rehearsal/logs"
    folder.mkdir(parents=True)
    for stage in list(STAGES)[:logs]:
        (folder / f"{stage}.log").touch()
    found = rehearsal._stages(tmp_path, Seen(lines))
    assert [well for well, _ in found.values()] == [True] * ended + [False] * (5 - ended)
    well, said = rehearsal._exported(tmp_path)
    assert not well and "model_index.json" in said
