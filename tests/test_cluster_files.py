"""The cluster files: accepted by Ray's and KubeRay's own schemas, scaling from zero to what the 14B preset needs."""

from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml
from jsonschema import Draft7Validator, ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config

from pose_core import config

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
LAUNCHERS = ("aws", "gcp")
CLUSTERS = ("aws", "gcp", "raycluster", "rayjob")
IMAGE = f"REGISTRY/pose:ray-{ray.__version__}"
PRESET = ROOT / "pipelines" / "configs" / "wan21_i2v_14b.yaml"
Tree = dict[str, Any]


def read(path: Path) -> Tree:
    return yaml.safe_load(path.read_text())


def launcher(name: str) -> Tree:
    return read(CLUSTER / "launcher" / f"{name}.yaml")


def manifest(name: str) -> Tree:
    return read(CLUSTER / "kuberay" / f"{name}.yaml")


def ray_cluster_spec(name: str) -> Tree:
    spec = manifest(name)["spec"]
    return spec["rayClusterSpec"] if name == "rayjob" else spec


def autoscaling_config(name: str) -> Tree:
    """What Ray's autoscaler makes of a cluster file, without talking to a cloud or to Kubernetes."""
    if name in LAUNCHERS:
        return prepare_config(launcher(name))
    return _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "pose", "namespace": "pose"}, "spec": ray_cluster_spec(name)}
    )


def planned_nodes(name: str, demands: list[Tree]) -> tuple[dict[str, int], list[Tree]]:
    """Nodes that Ray's autoscaler adds to a lone head for ``demands``, and the demands it can never serve."""
    settings = autoscaling_config(name)
    head = settings["head_node_type"]
    scorer = partial(_default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary({}))

    def score(resources: Tree, waiting: list[Tree], node_type: str) -> Any:
        return scorer(resources, waiting, node_type)

    types = settings["available_node_types"]
    nodes, unserved = get_nodes_for(types, {head: 1}, head, settings["max_workers"], demands, score)
    return dict(nodes), unserved


@cache
def crd_validator(kind: str) -> Draft7Validator:
    """KubeRay's own schema of ``rayclusters`` or ``rayjobs``, strict about unknown keys as ``kubectl`` is."""
    given = os.environ.get("KUBERAY_CRDS")
    folder = Path(given) if given else ROOT.parent / "shared" / "kuberay-crds"
    path = folder / f"ray.io_{kind}.yaml"
    if not path.is_file():
        pytest.skip(f"no KubeRay definitions: {path} is missing; set KUBERAY_CRDS to the folder that holds them")
    definition = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(version for version in definition["spec"]["versions"] if version["name"] == "v1")
    return Draft7Validator(strict(version["schema"]["openAPIV3Schema"]))


def strict(schema: Any) -> Any:
    """An OpenAPI v3 schema of Kubernetes as JSON Schema: unknown keys refused, int-or-string and nullable spelt out."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string") is True:
        result.pop("type", None)
        result.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    if schema.get("nullable") is True and isinstance(schema.get("type"), str):
        result["type"] = [schema["type"], "null"]
    return result


def pod_specs(tree: Any) -> list[Tree]:
    """Every pod specification in a manifest."""
    if isinstance(tree, list):
        return [pod for item in tree for pod in pod_specs(item)]
    if not isinstance(tree, dict):
        return []
    here = [tree] if "containers" in tree else []
    return here + [pod for value in tree.values() for pod in pod_specs(value)]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_accepts_the_launcher_file(name: str) -> None:
    validate_config(prepare_config(launcher(name)))


@pytest.mark.parametrize(
    "misspell",
    [
        lambda tree: tree.update(idle_timeout_minute=5),
        lambda tree: tree["available_node_types"]["training-gpu"].update(min_worker=0),
        lambda tree: tree["docker"].update(images="x"),
        lambda tree: tree["available_node_types"]["training-gpu"]["resources"].update(GPU="eight"),
    ],
)
@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_refuses_a_misspelt_launcher_file(name: str, misspell: Callable[[Tree], None]) -> None:
    tree = launcher(name)
    misspell(tree)
    with pytest.raises(ValidationError):
        validate_config(prepare_config(tree))


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_kuberay_accepts_the_manifest(name: str) -> None:
    errors = [f"{error.json_path}: {error.message}" for error in crd_validator(f"{name}s").iter_errors(manifest(name))]
    assert errors == []


@pytest.mark.parametrize(
    "misspell",
    [
        lambda spec: spec.update(enableInTreeAutoscalling=True),
        lambda spec: spec["authOptions"].update(mode="tokens"),
        lambda spec: spec["workerGroupSpecs"][1].update(minReplica=0),
        lambda spec: spec["workerGroupSpecs"][1].pop("maxReplicas"),
        lambda spec: spec["workerGroupSpecs"][0].update(replicas="four"),
        lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda spec: spec["headGroupSpec"]["template"]["spec"]["containers"][0].update(imagePulPolicy="Always"),
        lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"].update(limit={}),
    ],
)
@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_kuberay_refuses_a_misspelt_manifest(name: str, misspell: Callable[[Tree], None]) -> None:
    tree = copy.deepcopy(manifest(name))
    misspell(tree["spec"]["rayClusterSpec"] if name == "rayjob" else tree["spec"])
    assert not crd_validator(f"{name}s").is_valid(tree)


def test_the_job_runs_on_the_same_cluster_as_the_one_that_stays_up() -> None:
    assert ray_cluster_spec("rayjob") == ray_cluster_spec("raycluster")


@pytest.mark.parametrize("name", CLUSTERS)
def test_an_idle_cluster_is_one_head_that_takes_no_work(name: str) -> None:
    settings = autoscaling_config(name)
    types = settings["available_node_types"]
    head = types.pop(settings["head_node_type"])
    assert head["resources"]["CPU"] == 0 and "GPU" not in head["resources"]
    assert {kind: node["min_workers"] for kind, node in types.items()} == {"data-cpu": 0, "training-gpu": 0}
    assert types["training-gpu"]["resources"]["GPU"] == 8
    assert "GPU" not in types["data-cpu"]["resources"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_14b_preset_brings_its_gpu_nodes_and_only_those(name: str) -> None:
    training = config.load(PRESET.read_text(), source=PRESET.name).training
    worker = {"CPU": training.cpus_per_worker, "GPU": training.gpus_per_worker}
    nodes, unserved = planned_nodes(name, [worker] * training.workers)
    assert unserved == []
    assert nodes == {"training-gpu": training.workers * training.gpus_per_worker / 8}


@pytest.mark.parametrize("name", CLUSTERS)
def test_data_work_brings_cpu_nodes_and_no_gpu_node(name: str) -> None:
    nodes, unserved = planned_nodes(name, [{"CPU": 1}] * 100)
    assert unserved == [] and set(nodes) == {"data-cpu"}


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_worker_beyond_the_last_gpu_is_refused(name: str) -> None:
    assert planned_nodes(name, [{"GPU": 1}] * 33)[1] == [{"GPU": 1}]


def test_launched_workers_are_spot_and_the_head_is_not() -> None:
    aws, gcp = (launcher(name)["available_node_types"] for name in LAUNCHERS)
    for kind in ("data-cpu", "training-gpu"):
        assert aws[kind]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert gcp[kind]["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    assert "InstanceMarketOptions" not in aws["head"]["node_config"]
    assert "scheduling" not in gcp["head"]["node_config"]


def test_worker_pods_prefer_spot_nodes_and_the_head_does_not() -> None:
    spec = ray_cluster_spec("raycluster")
    for group in spec["workerGroupSpecs"]:
        preferred = group["template"]["spec"]["affinity"]["nodeAffinity"]
        labels = {
            (expression["key"], *expression["values"])
            for term in preferred["preferredDuringSchedulingIgnoredDuringExecution"]
            for expression in term["preference"]["matchExpressions"]
        }
        assert ("cloud.google.com/gke-spot", "true") in labels and ("eks.amazonaws.com/capacityType", "SPOT") in labels
    assert "affinity" not in spec["headGroupSpec"]["template"]["spec"]


def test_every_node_runs_one_image_of_the_installed_ray() -> None:
    base = re.search(r"^FROM (\S+)$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert base and base[1] == f"rayproject/ray:{ray.__version__}-py311-gpu"
    assert ray_cluster_spec("raycluster")["rayVersion"] == ray.__version__
    mlflow = list(yaml.safe_load_all((CLUSTER / "kuberay" / "mlflow.yaml").read_text()))
    pods = pod_specs([manifest("raycluster"), manifest("rayjob"), mlflow])
    images = [container["image"] for pod in pods for container in pod["containers"]]
    assert images + [launcher(name)["docker"]["image"] for name in LAUNCHERS] == [IMAGE] * 9
    assert IMAGE in (CLUSTER / "README.md").read_text()


def test_token_authentication_is_on_everywhere() -> None:
    assert ray_cluster_spec("raycluster")["authOptions"] == {"mode": "token", "secretName": "pose-ray-token"}
    for name in LAUNCHERS:
        tree = launcher(name)
        assert "--env RAY_AUTH_MODE=token" in tree["docker"]["run_options"]
        token = next(option for option in tree["docker"]["run_options"] if "RAY_AUTH_TOKEN_PATH" in option)
        assert Path(token.partition("=")[2]).parent.as_posix() in tree["file_mounts"]
        head = " ".join(prepare_config(tree)["head_start_ray_commands"])
        assert "--dashboard-host=127.0.0.1" in head and "--autoscaling-config" in head


def test_every_pod_gets_the_store_from_the_secret_and_knows_mlflow() -> None:
    for pod in pod_specs(manifest("raycluster")):
        (container,) = pod["containers"]
        assert {"secretRef": {"name": "pose-store"}} in container["envFrom"]
        assert "MLFLOW_TRACKING_URI" in [variable["name"] for variable in container["env"]]


def test_no_file_holds_a_credential() -> None:
    known_shapes = r"AKIA[0-9A-Z]{12,}|hf_[A-Za-z0-9]{16,}|-----BEGIN|\b[0-9a-f]{40,}\b|//[^/\s:]+:[^/\s@]+@"
    assignment = r"(?:ACCESS_KEY_ID|SECRET_ACCESS_KEY|TOKEN|PASSWORD)[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9/+]{8,}"
    for path in (path for path in CLUSTER.rglob("*") if path.is_file()):
        text = path.read_text()
        assert re.findall(known_shapes, text) == [], path.name
        assert re.findall(assignment, text) == [], path.name
    for pod in pod_specs([manifest("raycluster"), manifest("rayjob")]):
        for variable in pod["containers"][0]["env"]:
            assert "value" not in variable or not re.search("KEY|SECRET|TOKEN|PASSWORD", variable["name"])


def test_the_job_starts_a_script_that_exists_with_settings_it_knows() -> None:
    python, script, flag, preset, *overrides = shlex.split(manifest("rayjob")["spec"]["entrypoint"])
    assert (python, flag) == ("python", "--config")
    assert (ROOT / script).is_file() and (ROOT / preset) == PRESET
    settings = config.load(PRESET.read_text(), overrides, source=preset)
    assert (settings.storage.uri, settings.data.raw_uri) == ("s3://BUCKET/pose", "s3://BUCKET/raw")


def test_the_readme_names_only_files_and_settings_that_exist() -> None:
    text = (CLUSTER / "README.md").read_text()
    for name in re.findall(r"`((?:kuberay|launcher)/\w+\.yaml)`", text):
        assert (CLUSTER / name).is_file(), name
    for name in re.findall(r"\bcluster/\w+/\w+\.yaml|tests/\w+\.py", text):
        assert (ROOT / name).is_file(), name
    groups = config.Settings().model_dump()
    for section, key in re.findall(r"[`\s](\w+)\.([a-z_]+)(?==|`)", text):
        assert section not in groups or key in groups[section], f"{section}.{key}"


def test_a_gpu_pod_that_must_go_tells_its_train_workers_first(monkeypatch: pytest.MonkeyPatch) -> None:
    (group,) = [each for each in ray_cluster_spec("raycluster")["workerGroupSpecs"] if "gpu" in each["groupName"]]
    (container,) = group["template"]["spec"]["containers"]
    python, option, code = container["lifecycle"]["preStop"]["exec"]["command"]
    assert (python, option) == ("python", "-c")
    names = ["ray::RayTrainWorker", "ray::IDLE"]
    started = [subprocess.Popen(["bash", "-c", f"exec -a {name} sleep 60"]) for name in names]
    try:
        monkeypatch.setattr(psutil, "process_iter", lambda attributes: map(partial(_seen, attributes), started))
        while any(psutil.Process(each.pid).name() != "sleep" for each in started):
            time.sleep(0.05)
        exec(code)
        assert [each.poll() is None for each in started] == [False, True]
    finally:
        for each in started:
            each.kill()
            each.wait()


def _seen(attributes: list[str], process: subprocess.Popen[bytes]) -> psutil.Process:
    """As ``psutil.process_iter`` gives a process."""
    found = psutil.Process(process.pid)
    found.info = found.as_dict(attributes)
    return found
