"""Writes the folder that stock diffusers loads: the teacher's parts around the one-step transformer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler

from pose_core.models import families
from pose_core.models.folders import read_index


def export_folder(teacher: Path, generator: Path, out: Path, task: str | None = None) -> None:
    """Assemble ``out`` from the teacher's folder, the generator's transformer folder and a one-step scheduler.

    One Euler step from noise to data is exactly the one-step map, so the stock pipeline needs no code of ours. ``task``
    is what a model that can do several was distilled for.
    """
    family = families.of(teacher)
    left_out = ("transformer", "transformer_2", "scheduler", "README.md", ".*")
    shutil.copytree(teacher, out, ignore=shutil.ignore_patterns(*left_out))
    shutil.copytree(generator, out / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(out / "scheduler")
    index = family.one_step_index(read_index(teacher), task or family.tasks(teacher)[0])
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    family.finish_export(out)
