"""Reads the syntax trees: imports point one way, libraries stay in their place, files and functions stay short."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LONGEST_FILE, LONGEST_FUNCTION = 320, 60

LEAVES = {"config", "errors", "settings", "data_settings", "method_settings", "result_settings"}
BOTTOM = {"method", "rivals", "models", "data"}
MIDDLE = {"training", "evaluation", "inference"}
MAY_IMPORT = {
    "errors": set[str](),
    "config": {"errors", "settings"},
    "section": set[str](),
    "data_settings": {"section"},
    "method_settings": {"section"},
    "result_settings": {"section"},
    "settings": {"section", "data_settings", "method_settings", "result_settings"},
    "method": {"method"},
    "rivals": {"rivals", "method"},
    "models": {"models", "errors"},
    "data": {"data", "errors"},
    **{name: {name} | BOTTOM | LEAVES for name in MIDDLE},
    "runtime": {"runtime"} | MIDDLE | BOTTOM | LEAVES,
    "pipelines": {"runtime"} | MIDDLE | BOTTOM | LEAVES,
}
"""Part of the project: the parts of ``pose_core`` it may import."""

MODELS = ("pose_core/models/",)
STORAGE = tuple(f"pose_core/runtime/{name}.py" for name in ("storage", "storage_errors", "s3_client"))
DISTRIBUTED = tuple(
    f"pose_core/training/{name}.py"
    for name in ("parallel", "checkpoint", "checkpoint_files", "checkpoint_staging", "memory")
)
AT_HOME = {
    "ray": ("pose_core/runtime/",),
    "torch.distributed": tuple(
        f"pose_core/training/{name}.py"
        for name in ("parallel", "checkpoint", "checkpoint_files", "checkpoint_staging", "memory", "collectives")
    ),
    "mlflow": ("pose_core/runtime/tracking.py",),
    "boto3": STORAGE,
    "botocore": STORAGE,
    "pyarrow.fs": STORAGE,
    "diffusers": MODELS,
    "transformers": MODELS,
    "peft": MODELS,
    "tokenizers": MODELS,
    "accelerate": MODELS,
    "huggingface_hub": (*MODELS, "pose_core/inference/"),
    "av": ("pose_core/data/",),
    "torchcodec": ("pose_core/data/",),
}
"""Library: the only folders and files that may import it."""


def sources() -> list[str]:
    """Every source file of the project, relative to its root."""
    found = [file for folder in ("pose_core", "pipelines") for file in (ROOT / folder).rglob("*.py")]
    return sorted(file.relative_to(ROOT).as_posix() for file in found)


def breaches(path: str, source: str) -> list[str]:
    """What the file ``path`` (relative to the root) breaks by what it imports, a line each."""
    found = []
    for name in sorted(imported(path, ast.parse(source))):
        found += [f"{path} imports {name}" for broken in (wrong_way, not_at_home, not_pure) if broken(path, name)]
    return found


def imported(path: str, tree: ast.Module) -> Iterator[str]:
    """Dotted names of everything a file imports, also in functions, and of libraries reached as an attribute."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if name in AT_HOME:
                yield name


def part_of(path: str) -> str:
    """The part of the project that a file belongs to: a folder of ``pose_core``, one of its modules, ``pipelines``."""
    first, *rest = path.removesuffix(".py").split("/")
    return rest[0] if first == "pose_core" and rest else first


def wrong_way(path: str, name: str) -> bool:
    top, _, rest = name.partition(".")
    if top == "pipelines":
        return True
    part = part_of(path)
    return top == "pose_core" and part in MAY_IMPORT and rest.partition(".")[0] not in MAY_IMPORT[part]


def not_at_home(path: str, name: str) -> bool:
    return any(inside(name, library) and not path.startswith(homes) for library, homes in AT_HOME.items())


def not_pure(path: str, name: str) -> bool:
    """The method imports torch and the standard library; what it may have of ours is for ``wrong_way`` to say."""
    top = name.partition(".")[0]
    allowed = {"torch", "pose_core"} | set(sys.stdlib_module_names)
    return path.startswith("pose_core/method/") and top not in allowed


def inside(name: str, library: str) -> bool:
    return name == library or name.startswith(library + ".")


def long_functions(path: str, source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LONGEST_FUNCTION:
                found.append(f"{path}:{node.lineno} {node.name} has {lines} lines")
    return found


def test_imports_keep_the_rules() -> None:
    assert [line for path in sources() for line in breaches(path, (ROOT / path).read_text())] == []


def test_every_part_of_the_project_has_a_rule() -> None:
    parts = {part_of(path) for path in sources()} - {"__init__"}
    assert parts <= MAY_IMPORT.keys()
    assert {"method", "models", "data", "training", "runtime", "pipelines"} <= parts


def test_functions_and_files_stay_short() -> None:
    texts = {path: (ROOT / path).read_text() for path in sources()}
    assert [line for path, text in texts.items() for line in long_functions(path, text)] == []
    lengths = {path: text.count("\n") for path, text in texts.items()}
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST_FILE} == {}


@pytest.mark.parametrize(
    ("path", "source", "name"),
    [
        ("pose_core/method/flow.py", "import numpy as np", "numpy"),
        ("pose_core/method/flow.py", "from pose_core.errors import PoseError", "pose_core.errors.PoseError"),
        ("pose_core/method/flow.py", "from pose_core.models import wan", "pose_core.models.wan"),
        ("pose_core/models/wan.py", "from pose_core.method.flow import euler", "pose_core.method.flow.euler"),
        ("pose_core/data/clips.py", "import pose_core.models.codec", "pose_core.models.codec"),
        ("pose_core/data/clips.py", "from ..models import codec", "pose_core.models.codec"),
        ("pose_core/data/clips.py", "from .. import models", "pose_core.models"),
        ("pose_core/training/loop.py", "from pose_core.runtime import cli", "pose_core.runtime.cli"),
        ("pose_core/training/loop.py", "from pose_core.evaluation import judge", "pose_core.evaluation.judge"),
        ("pose_core/errors.py", "from pose_core import config", "pose_core.config"),
        ("pose_core/config.py", "from pose_core.data import shards", "pose_core.data.shards"),
        ("pose_core/runtime/cli.py", "import pipelines.full_distill", "pipelines.full_distill"),
        ("pose_core/data/shards.py", "import ray.data", "ray.data"),
        ("pose_core/training/loop.py", "def f():\n    import ray", "ray"),
        ("pose_core/training/loop.py", "if TYPE_CHECKING:\n    import ray", "ray"),
        ("pose_core/training/ema.py", "from torch import distributed", "torch.distributed"),
        ("pose_core/training/ema.py", "import torch\ntorch.distributed.barrier()", "torch.distributed"),
        ("pose_core/runtime/phases.py", "import mlflow", "mlflow"),
        ("pose_core/runtime/jobs.py", "from pyarrow import fs", "pyarrow.fs"),
        ("pose_core/runtime/object_store.py", "import boto3", "boto3"),
        ("pose_core/evaluation/report.py", "import av", "av"),
        ("pose_core/training/build.py", "from diffusers.models import x", "diffusers.models.x"),
        ("pipelines/prepare_data.py", "import transformers", "transformers"),
        ("pipelines/prepare_data.py", "import ray", "ray"),
    ],
)
def test_the_reader_of_these_trees_sees_a_breach(path: str, source: str, name: str) -> None:
    assert breaches(path, source)[:1] == [f"{path} imports {name}"]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("pose_core/method/flow.py", "from collections.abc import Callable\nimport torch.nn.functional as F"),
        ("pose_core/method/x.py", "from pose_core.method.flow import euler\nfrom .flow import add_noise"),
        ("pose_core/training/parallel.py", "import torch.distributed as dist"),
        ("pose_core/data/shards.py", "import pyarrow.parquet as pq\nfrom pose_core.errors import DataError"),
        ("pose_core/inference/sampler.py", "from pose_core.models import wan\nimport huggingface_hub"),
        ("pose_core/runtime/worker.py", "import ray.train\nfrom pose_core.training import loop"),
        ("pose_core/data/clips.py", "import rayon\nimport average"),
        ("pipelines/export.py", "from pose_core.runtime import cli\nfrom pose_core.data import shards"),
    ],
)
def test_the_reader_of_these_trees_lets_good_imports_pass(path: str, source: str) -> None:
    assert breaches(path, source) == []


def test_the_reader_of_these_trees_sees_a_long_function() -> None:
    def function(lines: int) -> str:
        return "class A:\n    def f(self):\n" + (lines - 1) * "        pass\n"

    assert long_functions("a.py", function(LONGEST_FUNCTION)) == []
    assert long_functions("a.py", function(LONGEST_FUNCTION + 1)) == ["a.py:2 f has 61 lines"]
