"""What every benchmark hands out: one JSON line a figure, and with ``--record`` an entry in ``results/<name>.json``
that says when, on which machine, with which versions and from which commit it was measured.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from pose_core.errors import ConfigError

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
LIBRARIES = ("torch", "diffusers", "transformers")


@dataclass(frozen=True)
class Figure:
    """One measured number.

    figure  its name
    value   in ``unit``; kept to four significant digits
    unit    ``x`` for a ratio, ``s`` for seconds, ``B`` for bytes, ``1/s`` for a rate
    bar     the least that is good enough, of a cost the most; None where nothing is asked
    n       measurements the value is the median of
    """

    figure: str
    value: float
    unit: str
    bar: float | None
    n: int

    def row(self) -> dict[str, Any]:
        """The figure as JSON, its value rounded."""
        return asdict(self) | {"value": float(f"{self.value:.4g}")}


def show(figures: Sequence[Figure]) -> None:
    """Print one JSON line a figure to the standard output."""
    for figure in figures:
        print(json.dumps(figure.row()), flush=True)


def record(name: str, figures: Sequence[Figure], conditions: Mapping[str, Any], load_average: float) -> Path:
    """Append an entry to ``results/<name>.json`` and return that file.

    ``conditions`` is what was measured, in JSON; ``load_average`` the machine's own load before it was measured.

    Raises:
        ConfigError: when the file that is there is not a list of entries.
    """
    path = RESULTS / f"{name}.json"
    entry = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine() | {"load_average_before": round(load_average, 2)},
        "versions": {"python": platform.python_version()} | {library: version(library) for library in LIBRARIES},
        "commit": commit(),
        "conditions": dict(conditions),
        "figures": [figure.row() for figure in figures],
    }
    entries = [*_earlier(path), entry]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(entries, indent=2) + "\n")
    partial.replace(path)
    return path


def machine() -> dict[str, Any]:
    """Model and number of processors, and memory in GiB, as the operating system names them."""
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "memory_gib": round(psutil.virtual_memory().total / 2**30, 1)}


def commit() -> str | None:
    """The checkout's commit, with ``-dirty`` behind it where tracked files were changed; None outside of git."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(describe, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _earlier(path: Path) -> list[Any]:
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text())
    except ValueError:
        entries = None
    if not isinstance(entries, list):
        raise ConfigError(f"{path} is not a JSON list of earlier results: move it away, or leave out --record")
    return entries
