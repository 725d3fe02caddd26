"""The whole chain as a person runs it, on the embedded store and a local Ray, with a train worker killed half-way."""

from __future__ import annotations

import configparser
import json
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from pose_core.data.clips import decode
from pose_core.data.moving_digits import FRAMES
from pose_core.runtime.object_store import EmbeddedStore
from pose_core.runtime.storage import Store

pytestmark = pytest.mark.integration

STAGES = ["prepare_data", "stability_priming", "adversarial_equilibrium", "evaluate", "export"]
PRIMING_STEPS, EQUILIBRIUM_STEPS, LOG_EVERY, CHECKPOINT_EVERY = 60, 4, 2, 5
KILL_AFTER = 2 * CHECKPOINT_EVERY
"""A step beyond this one is taken only once a first checkpoint is whole: the second waits for it."""
LORA_RANK = 4
SETTINGS = (
    *("run.name=whole", "data.digits_clips=32", "data.digits_heldout_clips=16", "data.digits_clips_per_tar=16"),
    *("data.clips_per_shard=16", "data.encoder_actors=1", "training.batch_per_worker=2", "training.sample_clips=2"),
    *(f"priming.steps={PRIMING_STEPS}", f"equilibrium.steps={EQUILIBRIUM_STEPS}"),
    *(f"training.checkpoint_every_steps={CHECKPOINT_EVERY}", f"tracking.log_every_steps={LOG_EVERY}"),
    *("training.sample_every_steps=40", "evaluation.clips=8", "evaluation.workers=1", "evaluation.teacher_steps=4"),
    *("export.registered_model=tiny", "export.alias=newest", f"export.lora_rank={LORA_RANK}"),
)
SECRETS = (".pose/object_store/credentials", ".pose/object_store/s3.json", ".pose/ray/ray_token")


@dataclass(frozen=True)
class Run:
    """A run that has ended: its working folder, exit code, what it printed and what is still there of it."""

    folder: Path
    exit_code: int
    printed: list[str]
    killed_after: int
    """Step at which the program said that priming was when one of its workers was killed."""
    left_processes: list[str]

    @property
    def mlflow_uri(self) -> str:
        return f"sqlite:///{self.folder}/.pose/mlflow.db"


@pytest.fixture(scope="module")
def command(script: Callable[..., list[str]]) -> list[str]:
    return script("full_distill", *SETTINGS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, command: list[str], environment: dict[str, str]) -> Run:
    """The chain from nothing to the end; a train worker is killed once priming has a checkpoint to go on from."""
    folder = tmp_path_factory.mktemp("whole")
    marked = environment | {"STARTED_BY_TEST_IN": str(folder)}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=folder, env=marked, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    printed, killed_after = [], 0
    try:
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line.rstrip())
            if not killed_after and (step := priming_step(line)) > KILL_AFTER:
                train_workers(process.pid)[0].send_signal(signal.SIGKILL)
                killed_after = step
        process.wait()
    finally:
        process.terminate()
        process.wait()
    return Run(folder, process.returncode, printed, killed_after, processes_of(folder))


def priming_step(line: str) -> int:
    words = line.split()
    return int(words[1].split("/")[0]) if words[:1] == ["stability_priming"] and "/" in words[1] else 0


def train_workers(process_id: int) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(process_id).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # ended since it was listed
            if "ray::RayTrainWorker" in "".join(process.cmdline()[:1]):
                found.append(process)
    return found


def processes_of(folder: Path) -> list[str]:
    """Names of the processes that work in ``folder`` or were started with its mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cwd().startswith(str(folder)) or process.environ().get("STARTED_BY_TEST_IN") == str(folder):
                found.append(process.name())
    return found


@pytest.fixture(scope="module")
def stored(run: Run) -> dict[str, bytes]:
    """Every object that the run left in the embedded store."""
    with EmbeddedStore(run.folder / ".pose" / "object_store") as server:
        store = Store.open(server.uri)
        return {key: store.read_bytes(key) for key in store.list()}


@pytest.fixture(scope="module")
def mlflow_runs(run: Run) -> dict[str, object]:
    """The MLflow runs of the experiment by name."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(run.mlflow_uri)
    experiment = client.get_experiment_by_name("pose")
    return {found.info.run_name: found for found in client.search_runs([experiment.experiment_id])}


def test_the_run_ends_well_although_a_worker_was_killed(run: Run) -> None:
    assert run.exit_code == 0, "\n".join(run.printed)
    assert KILL_AFTER < run.killed_after < PRIMING_STEPS
    (resumed,) = [line for line in run.printed if "goes on from step" in line]
    step = int(resumed.split()[-1])
    assert step % CHECKPOINT_EVERY == 0 and 0 < step < PRIMING_STEPS
    log = (run.folder / "outputs/whole/logs/stability_priming.log").read_text()
    assert log.count("Started training worker group of size 2") == 2
    assert any(line.split()[:1] == ["stability_priming"] and f"{PRIMING_STEPS}/" in line for line in run.printed)


def test_it_ends_with_a_table_and_the_places_of_the_results(run: Run) -> None:
    rows = [line.split() for line in run.printed]
    assert [row[0] for row in rows if row[-1:] == ["done"]] == STAGES
    places = {row[0]: Path(row[1]) for row in rows if row[:1] in (["report"], ["pictures"], ["model"])}
    assert places["report"].is_file() and places["pictures"].is_file() and places["model"].is_dir()
    assert any(row[:1] == ["browse"] and "mlflow" in " ".join(row) and run.mlflow_uri in " ".join(row) for row in rows)


def test_every_stage_names_what_it_was_made_from(stored: dict[str, bytes]) -> None:
    manifests = {stage: json.loads(stored[f"runs/whole/{stage}/manifest.json"]) for stage in STAGES}
    fingerprints = {stage: manifest["fingerprint"] for stage, manifest in manifests.items()}
    assert len(set(fingerprints.values())) == len(STAGES)
    for stage, manifest in manifests.items():
        assert manifest["stage"] == stage
        assert manifest["inputs"] == {name: fingerprints[name] for name in manifest["inputs"]}
    assert set(manifests["export"]["inputs"]) == {"adversarial_equilibrium", "evaluate"}
    assert manifests["prepare_data"]["metrics"] == {
        **{"train_clips": 32, "validation_clips": 16, "test_clips": 16},
        "quarantined_clips": 0,
    }


def test_mlflow_has_a_parent_and_a_finished_child_for_every_stage(
    run: Run, stored: dict[str, bytes], mlflow_runs: dict
) -> None:
    assert sorted(mlflow_runs) == sorted([*STAGES, "whole"])
    assert {found.info.status for found in mlflow_runs.values()} == {"FINISHED"}
    parent = mlflow_runs["whole"].info.run_id
    for stage in STAGES:
        assert mlflow_runs[stage].data.tags["mlflow.parentRunId"] == parent
        manifest = json.loads(stored[f"runs/whole/{stage}/manifest.json"])
        assert manifest["mlflow_run_id"] == mlflow_runs[stage].info.run_id
    assert mlflow_runs["stability_priming"].data.params["priming.steps"] == str(PRIMING_STEPS)


@pytest.mark.parametrize(
    ("stage", "steps", "turns"),
    [
        ("stability_priming", PRIMING_STEPS, ("fake", "generator")),
        ("adversarial_equilibrium", EQUILIBRIUM_STEPS, ("discriminator", "generator")),
    ],
)
def test_curves_have_a_point_for_every_logged_step(
    run: Run, mlflow_runs: dict, stage: str, steps: int, turns: tuple[str, ...]
) -> None:
    from mlflow.tracking import MlflowClient

    client, run_id = MlflowClient(run.mlflow_uri), mlflow_runs[stage].info.run_id
    cost = ("step_seconds/forward", "memory_gibibytes/activations", "videos_per_second", "tokens_per_second")
    for own in (*((f"{turn}/loss", f"{turn}/gradient_norm") for turn in turns), cost):
        for curve in own:
            points = client.get_metric_history(run_id, curve)
            assert {point.step for point in points} == set(range(LOG_EVERY, steps + 1, LOG_EVERY)), curve
            assert np.isfinite([point.value for point in points]).all(), curve


@pytest.mark.parametrize(
    ("stage", "steps"),
    [("stability_priming", [40, PRIMING_STEPS]), ("adversarial_equilibrium", [EQUILIBRIUM_STEPS])],
)
def test_samples_of_both_phases_can_be_watched(run: Run, mlflow_runs: dict, stage: str, steps: list[int]) -> None:
    samples = Path(mlflow_runs[stage].info.artifact_uri) / "samples"
    assert sorted(path.name for path in samples.iterdir()) == sorted(
        f"step-{step:05d}.{kind}" for step in steps for kind in ("mp4", "png")
    )
    for step in steps:
        frames, _ = decode((samples / f"step-{step:05d}.mp4").read_bytes())
        assert len(frames) == 2 * FRAMES and frames.std() > 1  # two clips, and something to see
        with Image.open(samples / f"step-{step:05d}.png") as sheet:
            assert np.asarray(sheet).std() > 1


def test_the_registered_model_is_the_exported_diffusers_folder(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.artifacts import download_artifacts

    monkeypatch.setenv("MLFLOW_TRACKING_URI", run.mlflow_uri)
    exported = run.folder / "outputs/whole/model"
    downloaded = Path(download_artifacts("models:/tiny@newest", dst_path=str(tmp_path)))
    files = {path.relative_to(exported): path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    assert files == {
        path.relative_to(downloaded): path.read_bytes() for path in downloaded.rglob("*") if path.is_file()
    }
    parts = json.loads(files[Path("model_index.json")])
    assert parts["_class_name"] == "WanImageToVideoPipeline"
    for part in ("transformer", "vae", "text_encoder", "image_encoder"):
        assert any(path.suffix == ".safetensors" and path.parts[0] == part for path in files), part


def test_lora_files_with_their_error_and_cards_with_pictures_come_with_it(run: Run, stored: dict[str, bytes]) -> None:
    from huggingface_hub import ModelCard
    from safetensors import safe_open

    folders = {name: run.folder / "outputs/whole" / name for name in ("model", "lora")}
    for name, folder in folders.items():
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert {"README.md", "samples/contact_sheet.png", "samples/comparison.mp4"} <= files
        assert {f"runs/whole/export/{name}/{file}" for file in files} <= set(stored)
        card = ModelCard.load(folder / "README.md")
        assert card.data.to_dict()["license"] == "unknown"  # the teacher's folder does not say
        assert "8 held-out clips" in card.text and "32 train" in card.text
    error = json.loads((folders["lora"] / "extraction.json").read_text())
    assert error["rank"] == LORA_RANK and 0 < error["total_error"] < 1
    manifest = json.loads(stored["runs/whole/export/manifest.json"])
    assert manifest["metrics"]["lora_total_error"] == error["total_error"]
    for file in ("pytorch_lora_weights.safetensors", "comfyui_lora.safetensors"):
        with safe_open(folders["lora"] / file, framework="np") as weights:
            downs = [name for name in weights.keys() if name.endswith("lora_A.weight")]  # noqa: SIM118
            assert {weights.get_slice(name).get_shape()[0] for name in downs} == {LORA_RANK}


def test_the_report_compares_one_step_with_the_teacher(run: Run) -> None:
    summary = json.loads((run.folder / "outputs/whole/report/summary.json").read_text())
    figures = summary["figures"]
    assert {"real", "teacher_4_steps", "teacher_1_step", "one_step"} <= set(figures)
    assert all(set(row) == set(figures["real"]) and np.isfinite(list(row.values())).all() for row in figures.values())
    assert figures["real"]["mean"] > figures["one_step"]["mean"]  # two random networks are no match for real clips
    assert summary["run"]["clips"] == 8
    assert set(summary["motion"]) == set(figures)
    assert summary["motion"]["real"]["dynamic_degree"] > 50 and summary["motion"]["real"]["still"] == 0


def test_secrets_stay_in_files_that_only_their_owner_can_read(run: Run, stored: dict[str, bytes]) -> None:
    credentials = configparser.ConfigParser(interpolation=None)
    credentials.read(run.folder / SECRETS[0])
    secrets = [value.encode() for value in credentials["pose"].values()]
    secrets.append((run.folder / SECRETS[2]).read_bytes().strip())
    assert all(len(secret) >= 20 for secret in secrets)
    for name in SECRETS:
        assert stat.S_IMODE((run.folder / name).stat().st_mode) == 0o600, name
    files = {path.relative_to(run.folder): path for path in run.folder.rglob("*") if path.is_file()}
    texts: Iterator[tuple[object, bytes]] = (
        (name, path.read_bytes()) for name, path in files.items() if str(name) not in SECRETS
    )
    for name, text in [*texts, *stored.items(), ("what it printed", "\n".join(run.printed).encode())]:
        assert not any(secret in text for secret in secrets), name
    assert {"mlflow.db", "stability_priming.log", "weed.log"} <= {path.name for path in files.values()}


def test_nothing_that_it_started_is_left_running(run: Run) -> None:
    assert run.left_processes == []


def test_the_same_command_again_skips_every_stage(
    run: Run, stored: dict[str, bytes], command: list[str], environment: dict[str, str]
) -> None:
    from mlflow.tracking import MlflowClient

    again = subprocess.run(command, cwd=run.folder, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    rows = [line.split() for line in again.stdout.splitlines()]
    assert [row[0] for row in rows if row[-1:] == ["skipped"]] == STAGES
    assert not any(row[-1:] == ["done"] for row in rows)
    client = MlflowClient(run.mlflow_uri)
    assert len(client.search_runs([client.get_experiment_by_name("pose").experiment_id])) == len(STAGES) + 1
    assert len(client.search_model_versions("name = 'tiny'")) == 1
    assert processes_of(run.folder) == []


SUITE_SETTINGS = ("vbench.ratios=[1-1, 16-9]", "evaluation.few_steps=[2]", "evaluation.batch_clips=3")
PROMPTS, SEEDS, WAYS = ("a bright square", "a dark one"), 2, 3


@pytest.fixture(scope="module")
def suite_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of two prompts, laid out as VBench's, with images of two aspect ratios."""
    folder, noise = tmp_path_factory.mktemp("suite"), np.random.default_rng(0)
    entries = [
        {"prompt_en": prompt, "image_name": f"{prompt}.jpg", "dimension": ["i2v_subject", "temporal_flickering"]}
        for prompt in PROMPTS
    ]
    (folder / "vbench2_i2v_full_info.json").write_text(json.dumps(entries))
    for ratio, (width, height) in {"1-1": (60, 60), "16-9": (96, 54)}.items():
        crops = folder / "data/crop" / ratio
        crops.mkdir(parents=True)
        for prompt in PROMPTS:
            Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(crops / f"{prompt}.jpg")
    return folder


@pytest.fixture(scope="module")
def suite_command(script: Callable[..., list[str]], suite_images: Path) -> list[str]:
    own = (f"vbench.environment_folder={suite_images / 'environment'}", f"vbench.weights_folder={suite_images / 'w'}")
    return script("evaluate", *SETTINGS, *SUITE_SETTINGS, *own, "--suite", "vbench_i2v", "--images", str(suite_images))


def suite_run(command: list[str], run: Run, environment: dict[str, str], *settings: str):
    return subprocess.run([*command, *settings], cwd=run.folder, env=environment, capture_output=True, text=True)


def test_vbench_says_which_weights_are_missing_before_it_samples(
    run: Run, suite_command: list[str], suite_images: Path, environment: dict[str, str]
) -> None:
    ended = suite_run(suite_command, run, environment, "vbench.dimensions=[i2v_subject, temporal_flickering]")
    assert ended.returncode == 2, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    place = suite_images / "w/torch/hub/checkpoints/dino_vitbase16_pretrain.pth"
    assert f"{place} for i2v_subject (https://dl.fbaipublicfiles.com/" in line and "Apache-2.0" in line
    assert not (suite_images / "environment").exists()


def test_vbenchs_own_package_scores_real_videos_and_goes_on_where_it_stopped(
    run: Run, suite_command: list[str], suite_images: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    from mlflow.tracking import MlflowClient

    chosen = ("vbench.dimensions=[temporal_flickering]",)
    total = len(PROMPTS) * 2 * WAYS
    first = suite_run(suite_command, run, environment, *chosen, "vbench.videos_per_prompt=1")
    assert first.returncode == 0, first.stderr
    ended = suite_run(suite_command, run, environment, *chosen, f"vbench.videos_per_prompt={SEEDS}")
    assert ended.returncode == 0, ended.stderr
    sampled = [line.split()[1] for line in ended.stdout.splitlines() if line.split()[:1] == ["videos"]]
    assert sampled[0] == f"{total}/{SEEDS * total}"  # those of the first seed were there

    client = MlflowClient(run.mlflow_uri)
    (experiment,) = [each for each in client.search_experiments() if each.name == "pose"]
    newest = client.search_runs([experiment.experiment_id], "tags.`pose.stage` = 'vbench_i2v'")[0]
    assert newest.data.tags["version.vbench"] == "0.1.5"
    found = Path(newest.info.artifact_uri) / "vbench_i2v"
    results = json.loads((found / "results.json").read_text())
    assert len(set(results["seeds"].values())) == len(PROMPTS) * 2 * SEEDS
    ways = ["teacher_8_nfe", "generator_1_nfe", "generator_2_nfe"]
    cells = [f"{way}, {ratio}" for way in ways for ratio in ("1-1", "16-9")]
    assert set(results["scores"]) == {*cells, *(f"{way}, mean" for way in ways)}
    assert "| POSE, 1 NFE | 91.54 |" in (found / "table.md").read_text()
    videos = {cell: sorted((found / "videos" / cell.replace(", ", "/")).glob("*.mp4")) for cell in cells}
    assert {len(files) for files in videos.values()} == {len(PROMPTS) * SEEDS}
    direct = direct_scores(
        suite_images / "environment", {cell: list(map(str, files)) for cell, files in videos.items()}
    )
    assert {cell: row["temporal_flickering"] for cell, row in results["scores"].items() if cell in cells} == (
        pytest.approx(direct, rel=1e-12)
    )
    assert len(set(direct.values())) == len(cells)


DIRECT = """
import importlib, json, runpy, sys
program = runpy.run_path(sys.argv[1])
program["import_torchvision"]()
program["stand_in_for_visualizer"]()
for name in json.loads(sys.argv[2]):
    package = "vbench2_beta_i2v" if name in ("i2v_subject", "i2v_background", "camera_motion") else "vbench"
    assert callable(getattr(importlib.import_module(f"{package}.{name}"), f"compute_{name}"))
from vbench.temporal_flickering import temporal_flickering
videos = json.loads(sys.argv[3])
print(json.dumps({cell: float(temporal_flickering(files)[0]) for cell, files in videos.items()}))
"""


def direct_scores(environments: Path, videos: dict[str, list[str]]) -> dict[str, float]:
    """What the package's own function says, called directly; and every dimension's function can be called there."""
    from pose_core.evaluation import vbench, vbench_program

    (python,) = environments.glob("*/bin/python")
    arguments = (vbench_program.__file__, json.dumps(list(vbench.NEEDED)), json.dumps(videos))
    done = subprocess.run([str(python), "-I", "-c", DIRECT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
