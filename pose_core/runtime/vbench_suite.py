"""VBench-I2V, end to end: sample the suite's prompts, score them with the vbench package, set the paper's beside."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import ray
import torch

from pose_core.errors import ConfigError, DataError
from pose_core.evaluation import vbench
from pose_core.evaluation.vbench import CROPS, INFO, Entry
from pose_core.inference.sampler import GeneratorTimes
from pose_core.result_settings import VbenchSettings
from pose_core.runtime.preparing import open_prepared
from pose_core.runtime.stage import StageRun
from pose_core.runtime.storage import Store
from pose_core.runtime.vbench_environment import environment, score_folder
from pose_core.runtime.vbench_sampling import Job, jobs, sample_suite, sizes, videos_store, ways
from pose_core.settings import Settings

SUITE, VIDEOS = "suite", "videos"


def check_suite(settings: Settings, images: Path) -> list[Entry]:
    """The suite's entries that the settings ask for, if everything on this machine is there to sample them.

    Raises:
        ConfigError, DataError: not for this model; or a list of the images that are missing (correctable in the call).
    """
    if settings.model.task != "i2v":
        raise ConfigError("VBench-I2V is for image-to-video models, model.task is t2v: leave --suite out")
    wanted = settings.vbench
    entries = vbench.read_suite(images, wanted.dimensions, settings.vbench.most_prompts)
    if missing := vbench.missing_images(images, wanted.ratios, entries):
        raise DataError("VBench-I2V's images are missing: " + "; ".join(missing), in_call=True)
    return entries


def evaluate_suite(run: StageRun, images: Path) -> None:
    """Sample and score every way and aspect ratio: ``<run>/vbench_i2v/`` and MLflow have scores, table and videos.

    Raises:
        DataError: a list of the weights that are missing, before anything is sampled (correctable in the call).
    """
    settings = run.settings
    entries = check_suite(settings, images)
    scorer = ray.remote(Scorer).options(
        num_cpus=settings.training.cpus_per_worker, num_gpus=settings.training.gpus_per_worker
    )
    # Weights and environment lie on the machine that scores; what is missing there must be known first.
    first = scorer.remote(settings.vbench)
    missing = ray.get(first.missing.remote())
    ray.kill(first)
    if missing:
        raise DataError("weights are missing: " + "; ".join(missing), in_call=True)
    wanted = jobs(settings, entries)
    out = videos_store(run, images, entries)
    null_text = open_prepared(run).null_text()
    sample_suite(run, wanted, images, out, null_text, lambda done, total: run.display.update("videos", done, total))
    _upload_suite(run, images, entries)
    run.display.note("scoring with the vbench package, in an environment of its own")
    second = scorer.remote(settings.vbench)
    found: dict[str, dict[str, Any]] = {}
    cells = [(way, ratio) for way in ways(settings) for ratio in settings.vbench.ratios]
    for done, (way, ratio) in enumerate(cells, start=1):
        chosen = [job for job in wanted if job.ratio == ratio]
        score = second.score.remote(run.artifact.child(SUITE), out.child(way), chosen, ratio)
        found[f"{way}, {ratio}"] = ray.get(score)
        run.display.update(run.name, done, len(cells))
    checksums = ray.get(second.checksums.remote())
    ray.kill(second)
    _report(run, found, wanted, checksums, out)


class Scorer:
    """The vbench package on one machine: its weights, its environment, its scores."""

    def __init__(self, settings: VbenchSettings):
        self.settings = settings
        self.weights = Path(settings.weights_folder).expanduser().absolute()

    def missing(self) -> list[str]:
        """What is not there of the weights, a line each."""
        return vbench.missing_weights(self.weights, self.settings.dimensions)

    def checksums(self) -> dict[str, str]:
        """SHA-256 of the weights."""
        return vbench.checksums(self.weights, self.settings.dimensions)

    def score(self, suite: Store, videos: Store, wanted: list[Job], ratio: str) -> dict[str, Any]:
        """Scores, details and versions of one way's videos in one aspect ratio."""
        python = environment(Path(self.settings.environment_folder))
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            suite.download_folder("", folder / SUITE)
            videos.download_folder(ratio, folder / "stored")
            (folder / VIDEOS).mkdir()
            for job in wanted:
                (folder / "stored" / Path(job.key).name).rename(folder / VIDEOS / job.name)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            return score_folder(
                python,
                folder / VIDEOS,
                folder / SUITE,
                folder / SUITE / INFO,
                self.weights,
                list(self.settings.dimensions),
                ratio,
                device,
            )


def _upload_suite(run: StageRun, images: Path, entries: list[Entry]) -> None:
    """The entries and images that are scored, where the scoring machine gets at them."""
    store = run.artifact.child(SUITE)
    info = [{"prompt_en": e.prompt, "image_name": e.image, "dimension": list(e.dimensions)} for e in entries]
    store.write_bytes(INFO, json.dumps(info).encode())
    for ratio in run.settings.vbench.ratios:
        for name in sorted({entry.image for entry in entries}):
            store.write_bytes(f"{CROPS}/{ratio}/{name}", (images / CROPS / ratio / name).read_bytes())


def _report(
    run: StageRun, found: dict[str, dict[str, Any]], wanted: list[Job], checksums: dict[str, str], out: Store
) -> None:
    settings = run.settings
    scores = {cell: result["scores"] for cell, result in found.items()}
    for way in ways(settings):
        rows = [scores[f"{way}, {ratio}"] for ratio in settings.vbench.ratios]
        scores[f"{way}, mean"] = {name: fmean(row[name] for row in rows) for name in rows[0]}
    results = {
        "scores": scores,
        "versions": next(iter(found.values()))["versions"],
        "weights_sha256": checksums,
        "generator_sha256": _generator_checksums(run),
        "sizes": sizes(settings),
        "seeds": {f"{job.ratio}/{job.name}": job.seed for job in wanted},
        "settings": settings.model_dump(mode="json", include={"run": {"seed"}, "vbench": True, "evaluation": True}),
        "prompts": [asdict(entry) for entry in dict.fromkeys(job.entry for job in wanted)],
    }
    text = vbench.table(scores, _conditions(settings, results, wanted))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / run.name
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        details = {cell: result["details"] for cell, result in found.items()}
        (folder / "details.json").write_text(json.dumps(details) + "\n")
        (folder / "table.md").write_text(text)
        run.artifact.upload_folder(folder, "report")
        out.download_folder("", folder / VIDEOS)
        run.tracker.log_folder(folder, run.name)
    run.tracker.set_tags({f"version.{name}": version for name, version in results["versions"].items()})
    run.metrics |= {
        f"{cell.replace(', ', '/')}/{name}": value for cell, row in scores.items() for name, value in row.items()
    }
    run.display.note(text)


def _generator_checksums(run: StageRun) -> dict[str, str]:
    store = run.artifact_of("adversarial_equilibrium")
    names = [key for key in store.list("generator") if key.endswith(".safetensors")]
    return {name: hashlib.sha256(store.read_bytes(name)).hexdigest() for name in names}


def _conditions(settings: Settings, results: dict[str, Any], wanted: list[Job]) -> list[str]:
    chosen, evaluation, data = settings.vbench, settings.evaluation, settings.data
    shapes = ", ".join(f"{ratio} {h} x {w}" for ratio, (h, w) in results["sizes"].items())
    prompts = len(results["prompts"])
    lines = [
        f"Ours: {settings.model.teacher}, {data.frames} frames at {data.frames_per_second:g} a second, height x width "
        f"{shapes}; the mean is over these aspect ratios. VBench asks for one, the model's own.",
        f"Ours: {prompts} prompts, {chosen.videos_per_prompt} seeds each, noise from run.seed={settings.run.seed}; "
        "every way to sample starts from the same noise.",
        f"Ours: the teacher by {evaluation.teacher_steps} Euler steps, guidance {evaluation.guidance:g}, shift "
        f"{settings.model.timestep_shift:g}; the generator {GeneratorTimes.of(settings)}.",
        "Ours: " + ", ".join(f"{name} {version}" for name, version in results["versions"].items()) + ".",
    ]
    left_out = [name for name in vbench.NEEDED if name not in chosen.dimensions]
    if left_out:
        lines.append(f"Ours leaves out {', '.join(left_out)}.")
    if chosen.most_prompts or chosen.videos_per_prompt < 5:
        lines.append("Ours is a part of the suite only: the scores compare with nobody's.")
    return lines
