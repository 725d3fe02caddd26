"""Fingerprints, manifests, and what counts as done."""

from __future__ import annotations

from pathlib import Path

import pytest

from pose_core import config
from pose_core.errors import ConfigError
from pose_core.runtime.manifests import (
    _HOW_NOT_WHAT,
    STAGES,
    begin,
    fingerprint,
    is_done,
    pending,
    read_manifest,
    run_prefix,
    write_manifest,
)
from pose_core.runtime.storage import Store
from pose_core.settings import Settings

PREPARE, PRIMING, EQUILIBRIUM = (
    STAGES[name] for name in ("prepare_data", "stability_priming", "adversarial_equilibrium")
)


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path)).child(run_prefix(Settings()))


def settings_with(*overrides: str) -> Settings:
    return config.load("", overrides)


def finish(run: Store, *names: str, settings: Settings | None = None) -> None:
    for name in names:
        begin(run, STAGES[name], settings or Settings())
        write_manifest(run, STAGES[name], settings or Settings(), metrics={}, mlflow_run_id="", seconds=1)


def changed_by(*overrides: str) -> set[str]:
    before, after = Settings(), settings_with(*overrides)
    return {name for name, stage in STAGES.items() if fingerprint(stage, before) != fingerprint(stage, after)}


EVERY = set(STAGES)


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("run.seed=1", EVERY),
        ("model.teacher=another", EVERY),
        ("data.frames=5", EVERY),
        ("curation.min_motion=1", EVERY),
        ("training.batch_per_worker=4", EVERY - {"prepare_data"}),
        ("priming.steps=200", EVERY - {"prepare_data"}),
        ("equilibrium.steps=200", {"adversarial_equilibrium", "evaluate", "export"}),
        ("evaluation.clips=8", {"evaluate", "export"}),
        ("export.alias=best", {"export"}),
    ],
)
def test_a_setting_changes_the_stages_it_decides_and_all_after_them(override: str, changed: set[str]) -> None:
    assert changed_by(override) == changed


@pytest.mark.parametrize(
    "override",
    [
        "storage.uri=s3://elsewhere/prefix",
        "tracking.uri=http://mlflow",
        "tracking.log_every_steps=7",
        "run.name=another",
        "run.output_folder=elsewhere",
        "training.max_failures=9",
        "training.checkpoint_every_steps=7",
        "data.encoder_actors=7",
        "curation.examples_per_rule=7",
    ],
)
def test_where_and_how_a_run_is_done_changes_nothing(override: str) -> None:
    assert changed_by(override) == set()


def test_every_setting_left_out_of_the_fingerprint_exists() -> None:
    for section, keys in _HOW_NOT_WHAT.items():
        assert keys <= set(getattr(Settings(), section).model_dump()), section


def test_stages_come_after_what_they_read() -> None:
    order = list(STAGES)
    assert all(order.index(name) < order.index(stage.name) for stage in STAGES.values() for name in stage.inputs)
    assert len({fingerprint(stage, Settings()) for stage in STAGES.values()}) == len(order)


def test_a_manifest_is_read_as_it_was_written(run: Store) -> None:
    metrics = {"loss": 0.25, "diverged": float("nan")}
    written = write_manifest(run, PRIMING, Settings(), metrics=metrics, mlflow_run_id="abc", seconds=12.5)
    assert read_manifest(run, PRIMING) == written
    assert written.metrics == {"loss": 0.25, "diverged": None}
    assert written.inputs == {"prepare_data": fingerprint(PREPARE, Settings())}
    assert Settings.model_validate(written.settings) == Settings()
    assert (written.mlflow_run_id, written.seconds) == ("abc", 12.5)
    assert run.list() == ["stability_priming/manifest.json"]


@pytest.mark.parametrize(
    "uri", ["postgresql://me:hunter2@db/mlflow", "http://hunter2@mlflow", "postgresql://db/mlflow?password=hunter2&a=b"]
)
def test_no_password_gets_into_a_manifest(run: Store, uri: str) -> None:
    write_manifest(run, PREPARE, settings_with(f"tracking.uri={uri}"), metrics={}, mlflow_run_id="", seconds=1)
    text = run.read_text("prepare_data/manifest.json")
    assert "hunter2" not in text
    assert "***" in text


def test_only_the_stages_that_match_the_settings_are_done(run: Store) -> None:
    assert [stage.name for stage in pending(run, Settings())] == list(STAGES)
    finish(run, "prepare_data", "stability_priming")
    assert is_done(run, PREPARE, Settings())
    assert is_done(run, PRIMING, Settings())
    assert not is_done(run, PRIMING, settings_with("priming.steps=200"))
    assert is_done(run, PREPARE, settings_with("priming.steps=200"))
    assert [stage.name for stage in pending(run, Settings())] == ["adversarial_equilibrium", "evaluate", "export"]


@pytest.mark.parametrize("part", [0, 0.5, 0.99])
def test_half_a_manifest_is_none(run: Store, part: float) -> None:
    finish(run, "prepare_data")
    whole = run.read_bytes("prepare_data/manifest.json")
    run.write_bytes("prepare_data/manifest.json", whole[: int(len(whole.rstrip()) * part)])
    assert read_manifest(run, PREPARE) is None
    assert not is_done(run, PREPARE, Settings())


@pytest.mark.parametrize("content", [b"[]", b"null", b"{}", b'{"stage": "prepare_data"}', b"\xff\xfe"])
def test_something_else_is_no_manifest(run: Store, content: bytes) -> None:
    run.write_bytes("prepare_data/manifest.json", content)
    assert not is_done(run, PREPARE, Settings())


def test_another_stages_manifest_is_none(run: Store) -> None:
    finish(run, "prepare_data")
    run.write_bytes("stability_priming/manifest.json", run.read_bytes("prepare_data/manifest.json"))
    assert not is_done(run, PRIMING, Settings())


def test_a_stage_refuses_to_begin_without_its_inputs(run: Store) -> None:
    finish(run, "prepare_data")
    with pytest.raises(ConfigError, match=r"run pipelines/stability_priming\.py with the same config first"):
        begin(run, EQUILIBRIUM, Settings())


def test_a_stage_refuses_inputs_made_with_other_settings(run: Store) -> None:
    finish(run, "prepare_data")
    with pytest.raises(ConfigError, match="stability_priming needs what prepare_data makes with these settings"):
        begin(run, PRIMING, settings_with("data.frames=5"))


def test_an_interrupted_stage_finds_what_it_left(run: Store) -> None:
    begin(run, PREPARE, Settings()).write_bytes("checkpoint", b"half way")
    assert begin(run, PREPARE, Settings()).read_bytes("checkpoint") == b"half way"
    assert not is_done(run, PREPARE, Settings())


def test_leftovers_of_other_settings_are_deleted(run: Store) -> None:
    finish(run, "prepare_data")
    begin(run, PRIMING, Settings()).write_bytes("checkpoint", b"half way")
    run.write_bytes("stability_priming_too/checkpoint", b"another folder")
    begin(run, PRIMING, settings_with("priming.steps=7"))
    assert run.list("stability_priming") == ["stability_priming/started"]
    assert run.list("stability_priming_too") == ["stability_priming_too/checkpoint"]


def test_an_artifact_ends_when_it_is_made_again(run: Store) -> None:
    finish(run, "prepare_data", "stability_priming")
    run.write_bytes("stability_priming/weights", b"old")
    begin(run, PRIMING, Settings())
    assert not is_done(run, PRIMING, Settings())
    assert run.list("stability_priming") == ["stability_priming/started"]


@pytest.mark.parametrize("override", ["run.seed=0", "curation.min_motion=3"])
def test_a_stage_that_makes_only_what_is_missing_keeps_its_folder_and_loses_its_manifest(
    run: Store, override: str
) -> None:
    finish(run, "prepare_data")
    run.write_bytes("prepare_data/train/shard", b"old")
    settings = settings_with(override)
    begin(run, PREPARE, settings)
    assert not is_done(run, PREPARE, Settings()) and not is_done(run, PREPARE, settings)
    assert run.read_bytes("prepare_data/train/shard") == b"old"


def test_deleting_an_artifact_begins_with_its_manifest(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(run, "prepare_data", "stability_priming")

    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(run), "_delete", cut_off)
    with pytest.raises(KeyboardInterrupt):
        begin(run, PRIMING, settings_with("priming.steps=7"))
    assert not is_done(run, PRIMING, Settings())


def test_another_method_or_a_rivals_own_setting_is_another_result_and_poses_is_not_touched_by_rivals() -> None:
    def prints(*overrides: str) -> list[str]:
        return [fingerprint(STAGES[name], config.load("", overrides)) for name in ("prepare_data", "stability_priming")]

    data, pose = prints()
    assert prints("rivals.gan_weight=0.5", "equilibrium.steps=7") == [data, pose]
    dmd2 = prints("method.name=dmd2")
    assert dmd2[0] == data and dmd2[1] != pose
    assert prints("method.name=dmd2", "rivals.gan_weight=0.5")[1] != dmd2[1]
    assert prints("method.name=dmd2", "equilibrium.heads_learning_rate=0.01")[1] != dmd2[1]
