"""Rows of a comparison, one a method, number of evaluations and seed, become means with intervals and a table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scipy.stats import t as student_t

FIGURES = {
    "SA": 1,
    "TC": 1,
    "FQ": 1,
    "mean": 1,
    "motion": 3,
    "first_frame_psnr": 1,
    "diversity": 2,
    "updates": 0,
    "cpu_seconds": 0,
}
"""What is averaged over seeds, and the decimals that a table shows of it."""
TITLES = {"equal_updates": "Equal generator updates", "equal_time": "Equal CPU time"}
HEADINGS = {"method": "method", "nfe": "NFE", "first_frame_psnr": "first-frame PSNR (dB)", "cpu_seconds": "CPU s"}

Row = Mapping[str, Any]
"""``table``, ``method``, ``nfe``, ``seed`` and a number, or None where it does not apply, for each of ``FIGURES``."""


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of ``values`` and half the width of its 95 % confidence interval (Student's t); None for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    spread = statistics.stdev(values) / len(values) ** 0.5
    return mean, float(student_t.ppf(0.975, len(values) - 1)) * spread


def summarise(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One entry a table, method and NFE, in the rows' order: ``seeds``, the number of rows, and for each figure
    ``{"mean": …, "interval": …}``, the interval as half its width, or None where it does not apply to every row.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["table"], row["method"], row["nfe"]), []).append(row)
    return [
        {"table": table, "method": method, "nfe": nfe, "seeds": len(group)}
        | {name: _over_seeds([row[name] for row in group]) for name in FIGURES}
        for (table, method, nfe), group in groups.items()
    ]


def _over_seeds(values: Sequence[float | None]) -> dict[str, float | None] | None:
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return None
    mean, half = interval(numbers)
    return {"mean": mean, "interval": half}


def markdown(summary: Sequence[Mapping[str, Any]]) -> str:
    """The tables as Markdown, one heading a table and one line a method and NFE: mean ± half of the 95 % interval."""
    parts = []
    for table in dict.fromkeys(entry["table"] for entry in summary):
        entries = [entry for entry in summary if entry["table"] == table]
        columns = ["method", "nfe", "seeds", *FIGURES]
        lines = [f"## {TITLES.get(table, table)}", "", _line(HEADINGS.get(name, name) for name in columns)]
        lines += ["|---" * len(columns) + "|", *(_line(_cells(entry)) for entry in entries)]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(entry: Mapping[str, Any]) -> list[str]:
    nfe = "" if entry["nfe"] is None else str(entry["nfe"])
    figures = [_cell(entry[name], decimals) for name, decimals in FIGURES.items()]
    return [entry["method"], nfe, str(entry["seeds"]), *figures]


def _cell(figure: Mapping[str, float | None] | None, decimals: int) -> str:
    if figure is None:
        return ""
    half = figure["interval"]
    # A figure that no seed changes (the updates of a table of equal updates) needs no interval.
    return f"{figure['mean']:.{decimals}f}" + (f" ± {half:.{decimals}f}" if half else "")
