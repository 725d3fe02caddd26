"""What ``export`` does: assemble the diffusers folder, store it and register it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pose_core.inference.export import export_folder, model_card
from pose_core.runtime.stage import StageRun
from pose_core.runtime.teachers import teacher_folder
from pose_core.runtime.tracking import register_model

MODEL = "model"


def export_generator(run: StageRun) -> None:
    """Write ``<run>/export/model`` and register it in MLflow under ``export.registered_model`` with its alias."""
    settings = run.settings
    teacher = teacher_folder(settings.model)
    figures = run.artifact_of("evaluate").read_json("report/summary.json")["figures"]["one_step"]
    data = settings.data
    card = model_card(settings.run.name, settings.model.teacher, data.frames, data.height, data.width, figures)
    with tempfile.TemporaryDirectory() as scratch:
        generator, out = Path(scratch) / "generator", Path(scratch) / MODEL
        run.artifact_of("adversarial_equilibrium").download_folder("generator", generator)
        run.display.update(run.name, 1, 3)
        export_folder(teacher, generator / "transformer", out, card, settings.model.task)
        run.artifact.upload_folder(out, MODEL)
        run.display.update(run.name, 2, 3)
        run.tracker.log_folder(out, MODEL)
    export = settings.export
    version = register_model(run.tracker.uri, run.tracker.run_id, MODEL, export.registered_model, export.alias)
    run.metrics["registered_version"] = version
    run.display.update(run.name, 3, 3)
