"""Find the Ray cluster that the environment names, and say what it holds and how it gets at this project."""

from __future__ import annotations

import json
import math
import os
import shlex
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ray.dashboard.utils import get_address_for_submission_client
from ray.exceptions import RayError
from ray.job_submission import JobSubmissionClient
from ray.util.state import list_nodes

from pose_core.errors import ClusterError, ConfigError
from pose_core.settings import Settings

DATA_CPUS = 0.5
"""CPUs that training leaves to the tasks that feed it."""
FIXED_SIZE_LABEL = "pose.fixed-size"
"""Label of nodes whose cluster never grows."""

_ROOT = Path(__file__).resolve().parents[2]
_NOT_UPLOADED = [".git", ".venv", ".pose", "outputs", "tests"]
_PARENT_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_API_SERVER, _ADDRESS = "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"
_PROBE_SECONDS = 5.0


def current_dashboard_url() -> str | None:
    """The dashboard of the cluster that ``RAY_API_SERVER_ADDRESS`` or ``RAY_ADDRESS`` names; None if neither is set.

    A Ray job finds its own cluster this way. No driver is started for it.

    Raises:
        ClusterError: (exit code 2) nothing answers there, or the address is of a kind that takes no jobs.
    """
    named = os.environ.get(_API_SERVER) or os.environ.get(_ADDRESS)
    if not named:
        return None
    if named.startswith("ray://"):
        raise ClusterError(f"{_ADDRESS}={named} takes no jobs; use the dashboard, http://HOST:8265", in_call=True)
    try:
        if "://" not in named and named != "auto":
            host, _, port = named.rpartition(":")
            # Ray itself would try for 40 s.
            socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS).close()
        return str(get_address_for_submission_client(None))
    except (OSError, RuntimeError, ValueError, RayError):
        raise _unreachable(named) from None


def connect() -> JobSubmissionClient:
    """A client for the jobs of the cluster that the environment names.

    Raises:
        ClusterError: (exit code 2) no cluster is named, none answers, or it refuses our token.
    """
    url = current_dashboard_url()
    if url is None:
        raise ClusterError(f"no Ray cluster is named; set {_ADDRESS}=http://HOST:8265", in_call=True)
    try:
        return JobSubmissionClient(url)
    except RayError:
        message = f"Ray at {url} refuses the token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to its token file"
        raise ClusterError(message, in_call=True) from None
    except (OSError, RuntimeError, ValueError):
        raise _unreachable(url) from None


def _unreachable(address: str) -> ClusterError:
    remedy = f"start it, correct {_ADDRESS}, or unset it to run on this machine"
    return ClusterError(f"no Ray cluster answers at {address}; {remedy}", in_call=True)


def on_this_machine(client: JobSubmissionClient) -> bool:
    """Whether every node of the cluster is this machine, so that its workers see our files."""
    ours = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    return all(node.node_ip in ours for node in _nodes(client))


@dataclass(frozen=True)
class Capacity:
    """CPUs and GPUs of the nodes that are up, and whether more may come."""

    cpus: float
    gpus: float
    autoscales: bool


def capacity(client: JobSubmissionClient) -> Capacity:
    """What the cluster holds now. No autoscaler of Ray's own publishes how far it may go, so its end is unknown."""
    nodes = _nodes(client)
    totals = [node.resources_total or {} for node in nodes]
    fixed = bool(nodes) and all(FIXED_SIZE_LABEL in (node.labels or {}) for node in nodes)
    return Capacity(
        cpus=sum(total.get("CPU", 0.0) for total in totals),
        gpus=sum(total.get("GPU", 0.0) for total in totals),
        autoscales=not fixed and _may_grow(client),
    )


def _nodes(client: JobSubmissionClient) -> list[Any]:
    try:
        return [node for node in list_nodes(address=client.get_address(), limit=10_000) if node.state == "ALIVE"]
    except (OSError, RuntimeError, RayError):
        raise _unreachable(client.get_address()) from None


def _may_grow(client: JobSubmissionClient) -> bool:
    answer = client._do_request("GET", "/api/cluster_status").json()
    report = (answer["data"].get("clusterStatus") or {}).get("autoscalerReport") or {}
    types = report.get("nodeTypeMapping")
    # Without an autoscaler every node is reported as a type of its own. No report at all may mean KubeRay's autoscaler,
    # which does not report here.
    return types is None or any(name != f"node_{node}" for node, name in types.items())


def data_cpus(settings: Settings) -> float:
    """CPUs that must be left beside the train workers for whatever feeds them."""
    if settings.data.train_from == "prepared":
        return DATA_CPUS
    return settings.data.encoder_cpus + settings.training.raw_decode_cpus


def raw_encoders(available: Capacity, settings: Settings) -> int:
    """How many encoders of raw clips fit beside train workers and decoding; up to ``data.encoder_actors``, at least 1.

    More would take the place of the tasks that they wait for.
    """
    data, training = settings.data, settings.training
    if available.autoscales:
        return data.encoder_actors
    cpus = available.cpus - training.workers * training.cpus_per_worker - training.raw_decode_cpus
    fit = math.floor(cpus / data.encoder_cpus + 1e-9)
    if data.encoder_gpus:
        gpus = available.gpus - training.workers * training.gpus_per_worker
        fit = min(fit, math.floor(gpus / data.encoder_gpus + 1e-9))
    return max(1, min(fit, data.encoder_actors))


def require(
    available: Capacity,
    workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    data_cpus: float = DATA_CPUS,
) -> None:
    """Check that the train workers, and beside them the tasks that feed them, can ever run at once.

    Raises:
        ConfigError: names ``training.workers``, what the cluster holds at most, and what to set.
    """
    by_cpu = math.floor((available.cpus - data_cpus) / cpus_per_worker + 1e-9)
    by_gpu = math.floor(available.gpus / gpus_per_worker + 1e-9) if gpus_per_worker else by_cpu
    most = max(0, min(by_cpu, by_gpu))
    if available.autoscales or workers <= most:
        return
    each = f"{cpus_per_worker:g} CPUs" + (f" and {gpus_per_worker:g} GPUs" if gpus_per_worker else "")
    holds = f"{available.cpus:g} CPUs ({data_cpus:g} of them for data tasks) and {available.gpus:g} GPUs"
    scarce = "gpus_per_worker" if by_gpu < by_cpu else "cpus_per_worker"
    remedy = f"set training.workers={most}" if most else f"lower training.{scarce}"
    raise ConfigError(
        f"training.workers={workers} with {each} each is more than this cluster can ever hold: {holds} make {most} "
        f"such workers; {remedy} or add nodes"
    )


@dataclass(frozen=True)
class Code:
    """Where the project lies for the cluster's nodes, and which Python runs it."""

    root: str
    """Absolute, or empty where jobs start in it."""
    python: str
    runtime_env: Mapping[str, Any]

    def command(self, script: str, *arguments: str) -> str:
        """The shell command that runs one of the project's scripts."""
        return shlex.join([self.python, str(Path(self.root) / script), *arguments])


def inside_job() -> bool:
    """Whether this process is the driver of a Ray job."""
    return _PARENT_JOB in os.environ


def locate_code(client: JobSubmissionClient) -> Code:
    """How jobs on this cluster get at the project.

    The job we are in passes on its own runtime environment. A cluster that is this machine reads our files. To any
    other the project is uploaded.
    """
    python_path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))
    in_place = Code(str(_ROOT), sys.executable, {"env_vars": {"PYTHONPATH": python_path}})
    if inside_job():
        described = json.loads(os.environ[_PARENT_JOB]).get("runtime_env") or {}
        ours = {key: value for key, value in described.items() if not key.startswith("_")}
        if "working_dir" in ours and Path.cwd().resolve() == _ROOT:
            return Code("", sys.executable, ours)
        variables = ours.get("env_vars", {}) | in_place.runtime_env["env_vars"]
        return Code(in_place.root, in_place.python, ours | {"env_vars": variables})
    if on_this_machine(client):
        return in_place
    return Code("", "python", {"working_dir": str(_ROOT), "excludes": _NOT_UPLOADED})
