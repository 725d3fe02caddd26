"""Shared by the end-to-end tests: a tiny random teacher, and the real scripts in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PIPELINES = Path(__file__).parents[2] / "pipelines"

Script = Callable[..., list[str]]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random image-to-video folder, one head and two layers, that knows the words of every moving-digits prompt."""
    import torch

    from pose_core.data.moving_digits import DIGIT_NAMES, DIRECTIONS
    from pose_core.models import small

    prompts = [f"a an {name} moving {direction}" for name in DIGIT_NAMES for direction in DIRECTIONS]
    pipeline = small.build_pipeline(prompts, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pipeline.transformer = small.build_transformer(heads=1, layers=2)
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """This process's variables without those that would send a run to somebody's store, cluster or MLflow."""
    outside = (
        "AWS_ACCESS",
        "AWS_SECRET",
        "AWS_SESSION",
        "AWS_PROFILE",
        "AWS_SHARED",
        "AWS_ENDPOINT",
        "RAY_",
        "MLFLOW_",
    )
    return {name: value for name, value in os.environ.items() if not name.startswith((*outside, "POSE_"))}


@pytest.fixture(scope="session")
def script(teacher: Path) -> Script:
    """``script(name, *arguments)``: the command line of ``pipelines/<name>.py`` with the tiny teacher's settings."""

    def command(name: str, *arguments: str) -> list[str]:
        settings = (f"model.teacher={teacher}", "equilibrium.feature_blocks=[0,1]")
        return [sys.executable, str(PIPELINES / f"{name}.py"), *settings, *arguments]

    return command


@pytest.fixture(scope="session")
def refusal() -> Callable[[subprocess.CompletedProcess[str]], str]:
    """The line with which a program at last told its user what to correct: exit code 2 and no traceback."""

    def line(ended: subprocess.CompletedProcess[str]) -> str:
        assert ended.returncode == 2, ended.stderr
        assert "Traceback" not in ended.stdout + ended.stderr
        lines = ended.stderr.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
        return lines[-1]

    return line
