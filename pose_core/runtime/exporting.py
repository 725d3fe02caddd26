"""What ``export`` does: assemble the diffusers folder and the LoRA files with their cards, store and register them."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from pose_core.evaluation.report import figures_table
from pose_core.inference.card import SAMPLES, Facts, folder_card, lora_card, teacher_licence
from pose_core.inference.export import export_folder
from pose_core.inference.sampler import GeneratorTimes, teacher_evaluations
from pose_core.models import families
from pose_core.models.folders import SHIPPED, find_folder, read_config
from pose_core.models.lora import ADAPTER_FILE
from pose_core.models.lora_file import DOWN, Extraction, Lora, extract_lora, linear_layers, trained_lora, write_lora
from pose_core.models.weights import Weights
from pose_core.runtime import manifests
from pose_core.runtime.stage import StageRun
from pose_core.runtime.storage import BUCKET
from pose_core.runtime.teachers import teacher_folder
from pose_core.runtime.tracking import register_model

MODEL, LORA = "model", "lora"
SHIPPED_LICENCE = "apache-2.0"
"""Of the teachers that come with the project, as of the project."""
PICTURES = ("contact_sheet.png", "comparison.mp4")


def export_generator(run: StageRun) -> None:
    """Write ``<run>/export/model`` and ``<run>/export/lora`` and register the former in MLflow.

    It becomes a version of ``export.registered_model`` with its alias.
    """
    settings = run.settings
    teacher = teacher_folder(settings.model)
    facts = _facts(run, teacher)
    with tempfile.TemporaryDirectory() as scratch:
        generator, report, out = Path(scratch) / "generator", Path(scratch) / "report", Path(scratch) / MODEL
        run.artifact_of("adversarial_equilibrium").download_folder("generator", generator)
        run.artifact_of("evaluate").download_folder("report", report)
        run.display.update(run.name, 1, 4)
        export_folder(teacher, generator / "transformer", out, settings.model.task, settings.method.conditioning_time)
        _store(run, out, folder_card(facts), report)
        run.display.update(run.name, 2, 4)
        found = _lora(run, teacher, generator)
        if found is not None:
            lora, extraction = found
            files = Path(scratch) / LORA
            write_lora(lora, files, read_config(teacher, "transformer")["_class_name"], extraction)
            rank = next(len(value) for name, value in lora.items() if name.endswith(DOWN))
            _store(run, files, lora_card(facts, rank, extraction), report)
        run.display.update(run.name, 3, 4)
    export = settings.export
    version = register_model(run.tracker.uri, run.tracker.run_id, MODEL, export.registered_model, export.alias)
    run.metrics["registered_version"] = version
    run.display.update(run.name, 4, 4)


def _store(run: StageRun, folder: Path, card: str, report: Path) -> None:
    """Put the card and the report's pictures into ``folder``, and the folder into the artifact and MLflow."""
    (folder / "README.md").write_text(card)
    (folder / SAMPLES).mkdir()
    for name in PICTURES:
        shutil.copy(report / name, folder / SAMPLES / name)
    run.artifact.upload_folder(folder, folder.name)
    run.tracker.log_folder(folder, folder.name)


def _lora(run: StageRun, teacher: Path, generator: Path) -> tuple[Lora, Extraction | None] | None:
    """The adapter that was trained, or one extracted with its error; None where none is asked for."""
    adapter, rank = generator / ADAPTER_FILE, run.settings.export.lora_rank
    if adapter.is_file():
        return trained_lora(adapter), None
    if not rank:
        return None
    run.display.note(f"extracting a LoRA of rank {rank}")
    untrained = families.of(teacher).load_generator(teacher, teacher, meta=True)
    lora, extraction = extract_lora(Weights(teacher), Weights(generator), linear_layers(untrained.module), rank)
    run.metrics |= {
        "lora_matrices_error": extraction.matrices_error,
        "lora_total_error": extraction.total_error,
    }
    return lora, extraction


def _facts(run: StageRun, teacher: Path) -> Facts:
    settings, data = run.settings, run.settings.data
    summary = run.artifact_of("evaluate").read_json("report/summary.json")
    name = settings.model.teacher
    published = find_folder(name) is None and not name.startswith(BUCKET)
    if not published and (Path(name).is_absolute() or name.startswith(BUCKET)):
        name = Path(name).name  # where it lies is nobody's business
    shipped = SHIPPED_LICENCE if teacher.is_relative_to(SHIPPED.resolve()) else ""
    return Facts(
        name=settings.run.name,
        teacher=name,
        published=published,
        pipeline=families.of(teacher).pipelines[settings.model.task],
        method=settings.method.name,
        licence=teacher_licence(teacher, settings.export.licence or shipped),
        size=(data.frames, data.height, data.width),
        data=_data(run),
        settings=_settings(run),
        figures=summary["figures"]["one_step"],
        table=figures_table(summary["figures"]),
        conditions=_conditions(run, summary["run"]["clips"]),
        conditioning_time=run.settings.method.conditioning_time,
    )


def _data(run: StageRun) -> dict[str, str]:
    data = run.settings.data
    metrics = run.artifact_of("prepare_data").read_json(manifests.MANIFEST)["metrics"]
    counts = {name.removesuffix("_clips"): count for name, count in metrics.items() if name.endswith("_clips")}
    return {
        "source": manifests.without_passwords(data.raw_uri),
        "clips": ", ".join(f"{count:g} {split}" for split, count in counts.items()),
        "a clip": f"{data.frames} frames of {data.width} x {data.height} at {data.frames_per_second:g} a second",
    }


def _settings(run: StageRun) -> dict[str, Any]:
    """The sections that shaped the weights."""
    rival = {"rivals"} if run.settings.method.name != "pose" else set()
    sections = {"method", "training", "priming", "equilibrium", *rival}
    return {"run": {"seed": run.settings.run.seed}} | run.settings.model_dump(mode="json", include=sections)


def _conditions(run: StageRun, clips: int) -> tuple[str, ...]:
    evaluation, shift = run.settings.evaluation, run.settings.model.timestep_shift
    steps, judge = evaluation.teacher_steps, evaluation.judge
    evaluations = teacher_evaluations(steps, evaluation.guidance)
    return (
        f"{clips} held-out clips, one sample each, all from the same noise, seed {run.settings.run.seed}.",
        f"Teacher: {steps} Euler steps with guidance {evaluation.guidance:g} and timestep shift {shift:g}, "
        f"{evaluations} network evaluations; the generator: one evaluation a step, "
        f"no guidance, {GeneratorTimes.of(run.settings)}.",
        f"SA, TC and FQ are measured by the judge `{judge}` of the embedded domain; they are not VBench's."
        if judge
        else "No judge: only what needs no network was measured.",
    )
