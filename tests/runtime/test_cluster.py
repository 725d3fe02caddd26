"""Finding a cluster, what it can hold, and how it gets at the project."""

from __future__ import annotations

import json
import shlex
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pose_core.errors import ClusterError, ConfigError
from pose_core.runtime import cluster
from pose_core.runtime.cluster import Capacity, capacity, connect, current_dashboard_url, locate_code, require

ROOT = Path(__file__).parents[2]
NODE = "5f0c"


@pytest.fixture(autouse=True)
def no_cluster_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)


class Client:
    """A cluster of the given nodes whose autoscaler reports these node types (None: reports nothing)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nodes: list[Any], types: dict[str, str] | None = None) -> None:
        self._types = types
        monkeypatch.setattr(cluster, "list_nodes", lambda **_: nodes)

    def get_address(self) -> str:
        return "http://head:8265"

    def _do_request(self, method: str, path: str) -> SimpleNamespace:
        assert (method, path) == ("GET", "/api/cluster_status")
        status = None if self._types is None else {"autoscalerReport": {"nodeTypeMapping": self._types}}
        return SimpleNamespace(json=lambda: {"data": {"clusterStatus": status}})


def node(cpus: float, gpus: float = 0, state: str = "ALIVE", ip: str = "10.9.8.7", **labels: str) -> SimpleNamespace:
    resources = {"CPU": cpus, "memory": 1e9} | ({"GPU": gpus} if gpus else {})
    return SimpleNamespace(resources_total=resources, labels=labels, state=state, node_ip=ip)


def test_require_accepts_what_fits_beside_the_data_tasks() -> None:
    require(Capacity(2, 0, False), workers=3, cpus_per_worker=0.5, gpus_per_worker=0)
    require(Capacity(8.5, 8, False), workers=8, cpus_per_worker=1, gpus_per_worker=1)
    require(Capacity(0.8, 0, False), workers=3, cpus_per_worker=0.1, gpus_per_worker=0)


@pytest.mark.parametrize(
    ("available", "wanted", "says"),
    [
        (Capacity(2, 0, False), (4, 0.5, 0), ["training.workers=4", "2 CPUs", "set training.workers=3 or add nodes"]),
        (Capacity(64, 4, False), (8, 4, 1), ["training.workers=8", "4 GPUs", "set training.workers=4 or add nodes"]),
        (Capacity(64, 0, False), (8, 4, 1), ["0 GPUs", "lower training.gpus_per_worker or add nodes"]),
        (Capacity(1, 8, False), (1, 4, 1), ["1 CPUs", "lower training.cpus_per_worker or add nodes"]),
    ],
)
def test_require_names_the_setting_what_the_cluster_holds_and_the_remedy(
    available: Capacity, wanted: tuple[int, float, float], says: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        require(available, *wanted)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in says), str(caught.value)


def test_a_cluster_that_grows_may_hold_any_number_of_workers() -> None:
    require(Capacity(0, 0, autoscales=True), workers=64, cpus_per_worker=8, gpus_per_worker=1)


def test_capacity_sums_the_nodes_that_are_up(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node(2), node(8, 4), node(100, 8, state="DEAD")]
    found = capacity(Client(monkeypatch, nodes, {NODE: f"node_{NODE}"}))  # type: ignore[arg-type]
    assert found == Capacity(cpus=10, gpus=4, autoscales=False)


@pytest.mark.parametrize(
    ("types", "grows"),
    [
        # As the heads of a plain `ray start`, of a launched cluster and of KubeRay report.
        ({NODE: f"node_{NODE}"}, False),
        ({NODE: "ray.head.default"}, True),
        (None, True),
    ],
)
def test_capacity_knows_clusters_that_may_grow(
    monkeypatch: pytest.MonkeyPatch, types: dict[str, str] | None, grows: bool
) -> None:
    assert capacity(Client(monkeypatch, [node(2)], types)).autoscales is grows  # type: ignore[arg-type]


def test_no_cluster_is_named() -> None:
    assert current_dashboard_url() is None
    with pytest.raises(ClusterError, match="set RAY_ADDRESS=http://HOST:8265") as caught:
        connect()
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("form", ["{}", "http://{}"])
def test_nobody_answers_at_the_named_address(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = form.format(f"127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ClusterError, match="correct RAY_ADDRESS, or unset it") as caught:
            connect()
    assert address in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("address", ["ray://head:10001", "nonsense", "127.0.0.1:port"])
def test_an_address_that_takes_no_jobs(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError) as caught:
        current_dashboard_url()
    assert address in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_cluster_that_is_this_machine_reads_the_project_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(monkeypatch, [node(2, ip="127.0.0.1")])
    code = locate_code(client)  # type: ignore[arg-type]
    assert code.runtime_env == {"env_vars": {"PYTHONPATH": str(ROOT)}}
    command = shlex.split(code.command("pipelines/export.py", "--config", "s3://bucket/a run.yaml"))
    assert command == [sys.executable, str(ROOT / "pipelines/export.py"), "--config", "s3://bucket/a run.yaml"]


@pytest.mark.parametrize("ips", [["10.9.8.7"], ["127.0.0.1", "10.9.8.7"]])
def test_to_other_machines_the_project_is_uploaded(monkeypatch: pytest.MonkeyPatch, ips: list[str]) -> None:
    code = locate_code(Client(monkeypatch, [node(2, ip=ip) for ip in ips]))  # type: ignore[arg-type]
    assert code.runtime_env["working_dir"] == str(ROOT)
    assert {".git", ".venv", ".pose", "outputs"} <= set(code.runtime_env["excludes"])
    assert code.command("pipelines/export.py") == "python pipelines/export.py"


def test_a_job_passes_on_its_own_uploaded_project(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = {"working_dir": "gcs://_ray_pkg_1.zip", "env_vars": {"A": "1"}, "_ray_commit": "x"}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": parent, "metadata": {}}))
    monkeypatch.chdir(ROOT)
    code = locate_code(Client(monkeypatch, [node(2)]))  # type: ignore[arg-type]
    assert code.runtime_env == {"working_dir": "gcs://_ray_pkg_1.zip", "env_vars": {"A": "1"}}
    assert code.command("pipelines/export.py") == f"{sys.executable} pipelines/export.py"


def test_a_job_without_upload_names_the_project_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"env_vars": {"A": "1"}}}))
    monkeypatch.chdir(tmp_path)
    code = locate_code(Client(monkeypatch, [node(2)]))  # type: ignore[arg-type]
    assert code.runtime_env == {"env_vars": {"A": "1", "PYTHONPATH": str(ROOT)}}
    assert code.command("pipelines/export.py") == f"{sys.executable} {ROOT / 'pipelines/export.py'}"
