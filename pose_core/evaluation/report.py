"""The report of a run: figures of each way to sample, a summary a program can read, and pictures for a person."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pose_core.data.clips import encode_mp4
from pose_core.evaluation.pictures import contact_sheet, side_by_side

Videos = dict[str, np.ndarray]
"""Videos ``[N, T, H, W, 3]`` uint8 by how they were made, in the order shown."""


def summarise(figures: dict[str, dict[str, float]], run: dict[str, Any]) -> dict[str, Any]:
    """What ``summary.json`` holds: all figures, and whether one step beats the teacher's own one step on each."""
    quality = [name for name in ("SA", "TC", "FQ", "mean") if name in figures.get("one_step", {})]
    mine, teacher = figures["one_step"], figures["teacher_1_step"]
    return {
        "run": run,
        "figures": figures,
        "one_step_beats_teacher_one_step": {name: mine[name] > teacher[name] for name in quality},
    }


def write_report(
    folder: Path, summary: dict[str, Any], videos: Videos, prompts: list[str], clips: int, frames_per_second: float
) -> None:
    """Write ``summary.json``, ``figures.md``, ``motion.md``, ``contact_sheet.png`` and ``comparison.mp4``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "figures.md").write_text(figures_table(summary["figures"]))
    (folder / "motion.md").write_text(figures_table(summary["motion"]))
    shown = {label: list(made[:clips]) for label, made in videos.items()}
    labels = {label: label.replace("_", " ") for label in shown}
    contact_sheet([(labels[label], made) for label, made in shown.items()], prompts[:clips]).save(
        folder / "contact_sheet.png"
    )
    rows = [side_by_side([made[index] for made in shown.values()]) for index in range(min(clips, len(prompts)))]
    (folder / "comparison.mp4").write_bytes(encode_mp4(np.concatenate(rows), frames_per_second))


def figures_table(figures: dict[str, dict[str, float]], decimals: int = 2) -> str:
    """A Markdown table, one row a way to sample."""
    names = list(dict.fromkeys(name for row in figures.values() for name in row))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for label, row in figures.items():
        cells = (f"{row[name]:.{decimals}f}" if name in row else "" for name in names)
        lines.append(f"| {label.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
