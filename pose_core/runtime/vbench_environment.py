"""A Python environment of its own for the vbench package, built once a machine, and its program run in it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pose_core.errors import ClusterError, DataError
from pose_core.evaluation import vbench_program

REQUIREMENTS = Path(__file__).parents[2] / "pipelines" / "configs" / "vbench" / "requirements.txt"
PROGRAM = Path(vbench_program.__file__)
_COMPLETE = "complete"


def environment(folder: Path) -> Path:
    """The interpreter of an environment below ``folder`` with ``REQUIREMENTS``; built if it is not there yet.

    Processes that ask at the same time wait for the first. Needs about 2 GB and, without a GPU's wheels, two minutes.

    Raises:
        ClusterError: pip could not install the packages; the message has its last line.
    """
    key = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()[:12]
    home = folder.expanduser().absolute() / key
    folder.expanduser().mkdir(parents=True, exist_ok=True)
    python = home / "bin" / "python"
    with open(home.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / _COMPLETE).exists():
            shutil.rmtree(home, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(home)])
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            # torch brings what its build needs; of the others the file names everything.
            _run([*pip, "--constraint", str(REQUIREMENTS), "torch", "torchvision"])
            _run([*pip, "--no-deps", "--requirement", str(REQUIREMENTS)])
            (home / _COMPLETE).touch()
    return python


def score_folder(
    python: Path, videos: Path, suite: Path, info: Path, weights: Path, dimensions: list[str], ratio: str, device: str
) -> dict[str, Any]:
    """``scores``, ``details`` and ``versions`` from the vbench package, see ``evaluation/vbench_program.py``.

    ``videos`` holds ``<prompt>-<index>.mp4`` and nothing else, ``suite`` the images below ``data/crop/<ratio>``.

    Raises:
        DataError: the package failed; the message has its last line.
    """
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        (work / "vbench2_beta_i2v").symlink_to(suite.absolute())
        (work / "models").symlink_to(weights / "dreamsim")
        # The package asks for this file by another name than the one it then loads.
        checkpoint = weights / "torch/hub/checkpoints/dino_vitbase16_pretrain.pth"
        link = weights / "dino_model" / checkpoint.name
        if checkpoint.exists() and not link.exists():
            link.symlink_to(checkpoint)
        request = {
            **{"videos": str(videos.absolute()), "info": str(info.absolute()), "dimensions": dimensions},
            **{"ratio": ratio, "device": device},
        }
        (work / "request.json").write_text(json.dumps(request))
        # Nothing of this project, and none of its packages, may leak into the other environment.
        outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        variables = {"VBENCH_CACHE_DIR": str(weights), "TORCH_HOME": str(weights / "torch"), "HF_HUB_OFFLINE": "1"}
        command = [str(python), "-I", str(PROGRAM), "request.json", "result.json"]
        done = subprocess.run(command, cwd=work, env=outside | variables, capture_output=True, text=True)
        if done.returncode:
            raise DataError(f"vbench failed on {', '.join(dimensions)}: {_last_line(done.stderr)}")
        return json.loads((work / "result.json").read_text())


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(
            f"the environment of vbench cannot be built: {_last_line(done.stderr or done.stdout)}; "
            f"{REQUIREMENTS} says what it needs"
        )


def _last_line(text: str) -> str:
    return next(reversed([line.strip() for line in text.splitlines() if line.strip()]), "it gave no reason")
