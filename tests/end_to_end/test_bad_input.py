"""What a person can get wrong in the call: one line that names it, exit code 2, before anything is started."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from pose_core.runtime.object_store import EmbeddedStore

pytestmark = pytest.mark.integration

CASES: dict[str, tuple[str, ...]] = {
    "unknown setting": ("priming.step=3", "did you mean priming.steps?"),
    "out of range": ("priming.learning_rate=-1", "priming.learning_rate=-1", "greater than 0"),
    "missing config": ("--config=nowhere.yaml", "nowhere.yaml", "pipelines/configs"),
    "missing bucket": ("storage.uri=s3://absent/pose", "s3://absent", "create it or correct storage.uri"),
    "wrong credentials": ("storage.uri=s3://pose", "s3://pose", "AWS_ACCESS_KEY_ID"),
    "unreachable store": ("storage.uri=s3://pose", "s3://pose", "AWS_ENDPOINT_URL"),
    "teacher without a part": ("model.teacher=teacher", "text_encoder", "model.teacher"),
    "setting that does not fit the teacher": (
        "equilibrium.feature_blocks=[0,2]",
        "equilibrium.feature_blocks",
        "0 to 1",
    ),
}
"""What is typed, and then what the line must say."""


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[dict[str, dict]]:
    """The variables of the cases that talk to an S3 store."""
    with EmbeddedStore(tmp_path_factory.mktemp("store")) as store, socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # not listening: connections are refused
        right = environment | store.environment
        keys = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "else", "AWS_PROFILE": ""}
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
        yield {
            "missing bucket": right,
            "wrong credentials": {name: value for name, value in (right | keys).items() if value},
            "unreachable store": right | {"AWS_ENDPOINT_URL": nowhere, "AWS_ENDPOINT_URL_S3": nowhere},
        }


@pytest.fixture(scope="module")
def ended(
    tmp_path_factory: pytest.TempPathFactory,
    script: Callable[..., list[str]],
    teacher: Path,
    environment: dict[str, str],
    environments: dict[str, dict],
) -> Iterator[dict[str, Future]]:
    """All cases, each in its own folder, two at a time: most of their time goes into imports."""

    def start(case: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
        folder = tmp_path_factory.mktemp("bad")
        if case == "teacher without a part":
            shutil.copytree(teacher, folder / "teacher", ignore=shutil.ignore_patterns("text_encoder"))
        command = script("full_distill", CASES[case][0])
        variables = environments.get(case, environment)
        return folder, subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)

    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {case: pool.submit(start, case) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_it_is_named_in_one_line_before_anything_starts(
    case: str, ended: dict[str, Future], refusal: Callable[[subprocess.CompletedProcess[str]], str]
) -> None:
    folder, process = ended[case].result()
    line = refusal(process)
    assert all(words in line for words in CASES[case][1:]), line
    assert process.stdout == "" and process.stderr.splitlines() == [line]
    assert not list(folder.rglob("ray_token")) and not list(folder.rglob("weed.log"))
