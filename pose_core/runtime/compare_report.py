"""What is written of a comparison: every row and the summary as JSON, tables, a contact sheet and loss curves."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from pose_core.evaluation.comparison import markdown, summarise
from pose_core.evaluation.curves import loss_picture
from pose_core.evaluation.pictures import contact_sheet
from pose_core.runtime.compare_clips import read_heldout
from pose_core.runtime.compare_row import POSE, TEACHER, RowJob
from pose_core.runtime.local_files import write_whole
from pose_core.settings import Settings

SECTIONS = {"model", "data", "training", "priming", "equilibrium", "method", "rivals", "evaluation"}
"""What of the settings decides results, and is told with them; none of it holds a secret."""


def write_results(
    out: Path, name: str, settings: Settings, rows: list[dict[str, Any]], jobs: Sequence[RowJob]
) -> list[Path]:
    """Write ``<name>.json``, ``.md``, ``.png`` (videos of ``jobs``) and ``-curves.png`` below ``out``; their paths."""
    summary, split = summarise(rows), jobs[0].split
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "split": split,
        "settings": settings.model_dump(mode="json", include=SECTIONS),
        "rows": rows,
        "summary": summary,
    }
    files = [out / f"{name}{ending}" for ending in (".json", ".md", ".png", "-curves.png")]
    write_whole(files[0], (json.dumps(document, indent=1) + "\n").encode())
    title = f"# {name}: {settings.evaluation.clips} {split} clips, mean over seeds ± half of the 95 % interval"
    write_whole(files[1], f"{title}\n\n{markdown(summary)}".encode())
    _write_sheet(files[2], settings, jobs)
    trained = [job for job in jobs if job.table != "reference"]
    if not trained:
        return files[:3]
    methods = dict.fromkeys(job.method for job in trained)
    loss_picture({name: [read_curves(job) for job in trained if job.method == name] for name in methods}, files[3])
    return files


def read_curves(job: RowJob) -> list[tuple[int, dict[str, float]]]:
    """Losses after so many generator updates, of a finished row; of a reference, none."""
    if job.table == "reference":
        return []
    return json.loads((job.trained / "training.json").read_text())["curves"]


def _write_sheet(file: Path, settings: Settings, jobs: Sequence[RowJob]) -> None:
    """Real clips, the teacher at its most steps and at one, and one step of every method, of the first seed."""
    evaluation = settings.evaluation
    lines: list[tuple[str, list[np.ndarray]]] = []
    for job in (job for job in jobs if job.settings.run.seed == settings.run.seed):
        with np.load(job.videos) as made:
            names = list(made)
            shown = {TEACHER: [names[0], names[-1]], POSE: names[:1]}.get(job.method, names)
            lines += [(_label(job.method, name), list(made[name])) for name in shown]
    prompts = read_heldout(jobs[0].folder, jobs[0].split, evaluation.clips).prompts[: evaluation.sheet_clips]
    if lines:
        contact_sheet(lines, prompts).save(file)


def _label(method: str, videos: str) -> str:
    """``dmd2``, ``teacher, 100 NFE``: the evaluations only where they are not one."""
    evaluations = videos.removeprefix("nfe_")
    return f"{method}, {evaluations} NFE" if method == TEACHER else method


def machine() -> dict[str, Any]:
    """The processor as the system names it, its cores, memory in GiB, and the versions that decide speed."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
