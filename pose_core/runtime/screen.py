"""What a person reads before and after a run: the header and the table of results."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from pose_core.runtime.chain import output_folder
from pose_core.runtime.cli import project_version
from pose_core.runtime.jobs import Result
from pose_core.runtime.session import Session
from pose_core.runtime.tracking import view_command


def header(session: Session) -> None:
    """What will run, and where."""
    settings, console = session.settings, _console()
    model, data, training = settings.model, settings.data, settings.training
    lines = {
        "run": f"{settings.run.name}, seed {settings.run.seed}",
        "teacher": f"{model.teacher} ({model.family}, {model.task})",
        "data": f"{data.raw_uri}, {data.frames} frames of {data.width} x {data.height}",
        "phases": f"{settings.priming.steps} steps of priming, {settings.equilibrium.steps} of equilibrium, on "
        f"{training.workers} workers x {training.batch_per_worker} clips",
        **session.places,
    }
    console.print(f"POSE {project_version()}", markup=False)
    for name, text in lines.items():
        console.print(f"  {name:<9} {text}", markup=False)
    console.print()


def results(session: Session, outcomes: Sequence[Result]) -> None:
    """One table (stage, seconds, result), the report's figures, and where everything is."""
    console, folder = _console(), output_folder(session.settings)
    table = Table("stage", "seconds", "result", box=None, pad_edge=False)
    for outcome in outcomes:
        table.add_row(outcome.stage, f"{outcome.seconds:.0f}", outcome.outcome)
    table.add_row("total", f"{sum(outcome.seconds for outcome in outcomes):.0f}", "")
    console.print()
    console.print(table)
    console.print()
    console.print(_figures(json.loads((folder / "report" / "summary.json").read_text())["figures"]))
    console.print()
    for name, text in (
        ("report", folder / "report" / "summary.json"),
        ("pictures", folder / "report" / "contact_sheet.png"),
        ("model", folder / "model"),
        *([("LoRA", folder / "lora")] if (folder / "lora").is_dir() else []),
        ("browse", view_command(session.settings.tracking.uri)),
    ):
        console.print(f"  {name:<9} {text}", markup=False)


def _figures(figures: dict[str, dict[str, float]]) -> Table:
    names = list(dict.fromkeys(name for row in figures.values() for name in row))
    table = Table("", *names, box=None, pad_edge=False)
    for label, row in figures.items():
        table.add_row(label.replace("_", " "), *(f"{row[name]:.2f}" if name in row else "" for name in names))
    return table


def _console() -> Console:
    return Console(soft_wrap=True, highlight=False)
