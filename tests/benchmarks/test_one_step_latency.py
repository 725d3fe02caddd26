"""The latency benchmark prints figures that fit together, and records them without losing earlier ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PARTS = {
    "text_and_image_encoding_seconds",
    "first_frame_latents_seconds",
    "one_step_denoising_seconds",
    "teacher_denoising_seconds",
    "decode_seconds",
    "one_step_end_to_end_seconds",
    "teacher_end_to_end_seconds",
}
EARLIER = {"date": "2026-01-01T00:00:00+00:00"}


def run(scripts: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, scripts / "one_step_latency.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the benchmarks, so that recording leaves the project's own results alone; one result is there."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for script in BENCHMARKS.glob("*.py"):
        shutil.copy(script, folder)
    (folder / "results").mkdir()
    (folder / "results" / "one_step_latency.json").write_text(json.dumps([EARLIER]))
    return folder


@pytest.fixture(scope="module")
def printed(scripts: Path, tiny_folder: Path) -> list[dict]:
    """The figures that one recorded run printed."""
    done = run(scripts, "--teacher", tiny_folder, "--repeats", "1", "--record")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_figure_is_one_json_line(printed: list[dict]) -> None:
    units = {row["figure"]: row["unit"] for row in printed}
    assert units == {"denoise_ratio": "x", "end_to_end_ratio": "x"} | dict.fromkeys(PARTS, "s")
    for row in printed:
        assert list(row) == ["figure", "value", "unit", "bar", "n"]
        assert row["value"] > 0
        assert row["bar"] == (95 if row["figure"] == "denoise_ratio" else None)
        assert row["n"] == 1


def test_the_ratios_are_those_of_the_printed_seconds(printed: list[dict]) -> None:
    value = {row["figure"]: row["value"] for row in printed}
    for part, ratio in (("denoising", "denoise_ratio"), ("end_to_end", "end_to_end_ratio")):
        expected = value[f"teacher_{part}_seconds"] / value[f"one_step_{part}_seconds"]
        assert value[ratio] == pytest.approx(expected, rel=2e-3)
    assert value["teacher_end_to_end_seconds"] > value["teacher_denoising_seconds"] + value["decode_seconds"] * 0.99


def test_recording_appends_to_what_was_measured_before(scripts: Path, printed: list[dict]) -> None:
    earlier, entry = json.loads((scripts / "results" / "one_step_latency.json").read_text())
    assert earlier == EARLIER
    assert entry["figures"] == printed
    assert entry["date"] > EARLIER["date"]
    assert entry["conditions"]["torch_threads"] == 1
    assert entry["machine"]["cores"] >= 1 and entry["machine"]["memory_gib"] > 0 and entry["machine"]["cpu"]
    assert entry["versions"]["torch"] and "commit" in entry


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--teacher", "teachers/absent"], "--teacher teachers/absent"),
        (["--repeats", "0"], "--repeats: 0"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(scripts: Path, arguments: list[str], named: str) -> None:
    done = run(scripts, *arguments)
    assert done.returncode == 2
    assert named in done.stderr.splitlines()[-1]
    assert not done.stdout and "Traceback" not in done.stderr


def test_a_clip_that_does_not_fit_names_the_option(scripts: Path, tiny_folder: Path) -> None:
    done = run(scripts, "--teacher", tiny_folder, "--frames", "8")
    assert done.returncode == 2
    assert "--frames=8 does not fit" in done.stderr.splitlines()[-1]
