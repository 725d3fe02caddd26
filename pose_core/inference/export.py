"""Writes the folder that stock diffusers loads: the teacher's parts around the one-step transformer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler


def export_folder(teacher: Path, generator: Path, out: Path) -> None:
    """Assemble ``out`` from the teacher's folder, the generator's transformer folder and a one-step scheduler.

    One Euler step from noise to data is exactly the one-step map, so the stock pipeline needs no code of ours.
    """
    shutil.copytree(teacher, out, ignore=shutil.ignore_patterns("transformer", "scheduler", "README.md", ".*"))
    shutil.copytree(generator, out / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(out / "scheduler")
    index = json.loads((out / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
