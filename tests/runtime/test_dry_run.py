"""``--dry-run``: what it prints for the presets and a small run, and how it refuses what cannot work."""

from __future__ import annotations

import re
import runpy
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from pose_core import config
from pose_core.data.shards import write_tar
from pose_core.errors import PoseError
from pose_core.models.folders import SHIPPED, local_teacher, read_config
from pose_core.runtime import cluster, manifests
from pose_core.runtime.dry_run import dry_run
from pose_core.runtime.storage import Store
from pose_core.settings import Settings, TrackingSettings


class Preset(NamedTuple):
    """What a preset must say.

    Workers, clip (frames, height, width, rate), the teacher's own shift and guidance, latents and tokens of a clip, and
    the published numbers of parameters.
    """

    workers: int
    clip: tuple[int, int, int, int]
    shift: float
    guidance: float
    latents: str
    tokens: str
    teacher: float
    generator: float


WAN_CLIP, WAN_LATENTS, WAN_TOKENS = (81, 480, 832, 16), "16 x 21 x 60 x 104", "32,760"
PRESETS = {
    "wan21_t2v_1_3b": Preset(8, WAN_CLIP, 3, 5, WAN_LATENTS, WAN_TOKENS, 1.42e9, 1.42e9),
    "wan21_t2v_14b": Preset(32, WAN_CLIP, 3, 5, WAN_LATENTS, WAN_TOKENS, 14.3e9, 14.3e9),
    "wan21_i2v_14b": Preset(32, WAN_CLIP, 3, 5, WAN_LATENTS, WAN_TOKENS, 16.4e9, 16.4e9),
    "wan22_ti2v_5b": Preset(16, (121, 704, 1280, 24), 5, 5, "48 x 31 x 44 x 80", "27,280", 5.0e9, 5.0e9),
    "wan22_i2v_a14b": Preset(32, WAN_CLIP, 5, 3.5, WAN_LATENTS, WAN_TOKENS, 28.6e9, 14.3e9),
    "wan22_t2v_a14b": Preset(32, WAN_CLIP, 12, 3.5, WAN_LATENTS, WAN_TOKENS, 28.6e9, 14.3e9),
    "ltx_2b": Preset(8, (121, 512, 704, 25), 13.5, 3, "128 x 16 x 16 x 22", "5,632", 1.92e9, 1.92e9),
    "ltx_13b": Preset(32, (121, 704, 1216, 25), 1, 3, "128 x 16 x 22 x 38", "13,376", 13.0e9, 13.0e9),
    "hunyuan15_i2v": Preset(16, (121, 480, 848, 24), 5, 6, "32 x 31 x 30 x 53", "49,290", 8.33e9, 8.33e9),
    "hunyuan15_t2v": Preset(16, (121, 480, 848, 24), 5, 6, "32 x 31 x 30 x 53", "49,290", 8.33e9, 8.33e9),
}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cluster is named, no connection may be opened, and the working folder is empty."""

    def refuse(*_: object) -> None:
        raise AssertionError("a dry run of this config must not use the network")

    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def teacher(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "teacher"))


def preset(name: str) -> Settings:
    return config.load((SHIPPED / f"{name}.yaml").read_text(), source=name)


def small(teacher: Path, *overrides: str) -> Settings:
    own = [f"model.teacher={teacher}", "equilibrium.feature_blocks=[0, 1]", "training.workers=1"]
    return config.load("", [*own, *overrides])


def printed(settings: Settings, capsys: pytest.CaptureFixture[str]) -> str:
    dry_run(settings)
    return capsys.readouterr().out


def refused(settings: Settings, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a dry run that ends with exit code 2 and has printed nothing else."""
    with pytest.raises(PoseError) as caught:
        dry_run(settings)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""
    return str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_the_papers_settings(name: str) -> None:
    settings = preset(name)
    priming, equilibrium, data = settings.priming, settings.equilibrium, settings.data
    assert (priming.steps, priming.learning_rate, priming.input_time_min) == (500, 1e-6, 0.9)
    assert (equilibrium.steps, equilibrium.learning_rate, equilibrium.ema_decay) == (1000, 2e-6, 0.995)
    assert (equilibrium.r1_sigma_space, equilibrium.r1_sigma_time) == (0.01, 0.1)
    assert equilibrium.conditional_sds_weight == 10
    said = PRESETS[name]
    assert (data.frames, data.height, data.width, data.frames_per_second) == said.clip
    assert {priming.guidance, equilibrium.guidance, settings.evaluation.guidance} == {said.guidance}
    assert {settings.model.timestep_shift, priming.timestep_shift, equilibrium.timestep_shift} == {said.shift}
    assert settings.training.workers == said.workers
    assert settings.tracking == TrackingSettings()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_judge_features_down_to_the_last_block(name: str) -> None:
    settings = preset(name)
    config = read_config(local_teacher(settings.model.teacher, None, weights=False), "transformer")
    layers = config["num_layers"]
    blocks = settings.equilibrium.feature_blocks
    gaps = [later - earlier for earlier, later in zip(blocks, blocks[1:], strict=False)]
    assert blocks[-1] == layers - 1
    assert max(gaps) - min(gaps) <= 1


def test_runs_of_the_presets_keep_apart() -> None:
    settings = [config.Settings(), *map(preset, PRESETS)]
    names = {each.run.name for each in settings}
    assert len(names) == len({each.export.registered_model for each in settings}) == len(PRESETS) + 1


def test_every_preset_is_listed_here() -> None:
    found = {file.stem for file in SHIPPED.glob("*.yaml")}
    assert {name for name in found if not name.startswith("digits")} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_needs_no_weights_no_gpus_and_no_network(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, said = printed(preset(name), capsys), PRESETS[name]
    frames, height, width, _ = said.clip
    assert f"3 x {frames} x {height} x {width}" in text and said.latents in text and said.tokens in text
    for role, published in (("generator", said.generator), ("teacher", said.teacher)):
        counted = re.search(rf"{role} +([0-9,]+) ", text)
        assert counted is not None
        assert int(counted[1].replace(",", "")) == pytest.approx(published, rel=0.01), role
    assert re.search(r"storage +warning +s3://YOUR-BUCKET/pose is a placeholder", text)
    assert re.search(r"raw data +warning +s3://YOUR-BUCKET/raw is a placeholder", text)
    assert "no cluster named" in text and f"each of {said.workers} workers holds" in text
    assert "see pipelines/plan.py" in text
    lines = text.splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 100


def test_the_14b_preset_prints_published_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(preset("wan21_i2v_14b"), capsys)
    assert re.search(r"generator +16,394,878,784 +61\.08 GiB", text)
    assert re.search(r"text encoder +5,680,910,336 +21\.16 GiB", text)
    assert re.search(r"total between two steps +11\.\d\d GiB +11\.\d\d GiB", text)


def test_a_small_run_checks_what_this_machine_has(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(small(teacher, "evaluation.judge="), capsys)
    for thing in ("teacher", "judge", "storage", "raw data", "cluster", "memory"):
        assert re.search(rf"^{thing} +ok ", text, re.MULTILINE), thing
    assert "this machine has" in text and "SeaweedFS is installed" in text
    assert list(Path.cwd().iterdir()) == []


def test_stages_are_listed_in_order_with_what_is_done(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = small(teacher, f"storage.uri={tmp_path}/store")
    run = Store.open(settings.storage.uri).child(manifests.run_prefix(settings))
    stage = manifests.STAGES["prepare_data"]
    manifests.write_manifest(run, stage, settings, metrics={}, mlflow_run_id="", seconds=1.0)
    text = printed(settings, capsys)
    found = re.findall(rf"^({'|'.join(manifests.STAGES)}) .* (done|to do)$", re.sub(" +$", "", text, flags=re.M), re.M)
    assert found == [(name, "done" if name == stage.name else "to do") for name in manifests.STAGES]
    other = settings.model_copy(update={"run": settings.run.model_copy(update={"seed": 1})})
    assert " done" not in printed(other, capsys)


def test_what_an_embedded_store_holds_is_not_known(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(".pose/object_store/data").mkdir(parents=True)
    assert printed(small(teacher), capsys).count("not known") == len(manifests.STAGES)


def test_a_missing_part_of_the_teacher_is_named(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    next((teacher / "vae").glob("*.safetensors")).unlink()
    assert f"{teacher} has no vae/*.safetensors" in refused(small(teacher), capsys)


def test_more_workers_than_this_machine_can_hold_are_refused(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "training.workers=5000" in refused(small(teacher, "training.workers=5000"), capsys)


def test_a_store_without_credentials_is_refused(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    message = refused(small(teacher, "storage.uri=s3://videos/pose"), capsys)
    assert "no credentials for s3://videos/pose" in message


def test_a_store_below_a_file_is_refused(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file/store" in refused(small(teacher, f"storage.uri={tmp_path}/file/store"), capsys)


def test_raw_data_are_counted_or_refused(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    settings = small(teacher, f"data.raw_uri={raw}")
    assert f"data.raw_uri={raw} holds no videos: name a folder of WebDataset tars" in refused(settings, capsys)
    write_tar(raw / "clips.tar", [("clip", {"json": b"{}"})])
    (raw / "film.mp4").write_bytes(b"")
    assert f"raw data ok {raw} holds 1 tars, 1 video files" in " ".join(printed(settings, capsys).split())


def test_a_judge_that_is_no_folder_is_refused(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "evaluation.judge=nobody" in refused(small(teacher, "evaluation.judge=nobody"), capsys)


def test_a_cluster_that_takes_no_jobs_is_refused(
    teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://host:10001")
    assert "RAY_ADDRESS=ray://host:10001 takes no jobs" in refused(small(teacher), capsys)


@pytest.mark.parametrize("autoscales", [False, True])
def test_a_named_cluster_must_hold_the_workers_or_grow(
    autoscales: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = SimpleNamespace(get_address=lambda: "http://head:8265")
    monkeypatch.setattr(cluster, "current_dashboard_url", lambda: "http://head:8265")
    monkeypatch.setattr(cluster, "connect", lambda: client)
    monkeypatch.setattr(cluster, "capacity", lambda _: cluster.Capacity(192, 8, autoscales))
    if autoscales:
        assert "8 GPUs and may grow; 32 workers" in " ".join(printed(preset("wan21_i2v_14b"), capsys).split())
    else:
        assert "training.workers=32" in refused(preset("wan21_i2v_14b"), capsys)


def test_the_command_ends_with_exit_code_2_and_one_line(
    teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (teacher / "transformer" / "config.json").unlink()
    script = str(SHIPPED.parent / "full_distill.py")
    monkeypatch.setattr(sys, "argv", [script, "--dry-run", f"model.teacher={teacher}"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(script, run_name="__main__")
    output = capsys.readouterr()
    assert (caught.value.code, output.out) == (2, "")
    assert output.err.count("\n") == 1 and "has no transformer/config.json" in output.err
