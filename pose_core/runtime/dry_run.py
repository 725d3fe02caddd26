"""``--dry-run``: everything that can be known before weights are loaded or money is spent."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import psutil
from rich.console import Console
from rich.table import Table

from pose_core.data.moving_digits import MOVING_DIGITS
from pose_core.models.folders import find_folder
from pose_core.models.video_model import ClipShapes, Shape
from pose_core.runtime import cluster, manifests
from pose_core.runtime.cli import project_version
from pose_core.runtime.object_store import find_weed
from pose_core.runtime.preflight import check_models
from pose_core.runtime.preparing import find_raw
from pose_core.runtime.session import EMBEDDED, STATE_FOLDER
from pose_core.runtime.storage import BUCKET, Store
from pose_core.settings import Settings
from pose_core.training.plan import FLOAT32_BYTES, PHASES, Plan

COLUMNS = 100
ROOMY_BYTES = 2**30
"""Free disk below which an embedded store is likely to fill it."""
WRITES = {
    "prepare_data": "train/, validation/, test/",
    "stability_priming": "generator/, checkpoints/",
    "adversarial_equilibrium": "generator/, checkpoints/",
    "evaluate": "report/",
    "export": "model/, lora/",
}
"""The folders of each stage's artifact."""
UNITS = {"webdataset": "tars", "videos": "video files", "parquet": "Parquet files of videos"}
"""What the objects are that each source reads."""
OK, WARNING, UNCHECKED = "ok", "warning", "not checked"
UNKNOWN, TO_DO, DONE = "not known", "to do", "done"


class Check(NamedTuple):
    """One thing that was looked at; what is plainly wrong is an error and ends the dry run instead."""

    thing: str
    state: str
    text: str


def dry_run(settings: Settings) -> None:
    """Check settings, teacher, storage and cluster, plan every network on the meta device, and print it all.

    Neither weights nor GPUs are needed; the network is used only for a store, a cluster or a hub model that is named.

    Raises:
        ConfigError, CheckpointError, StorageError, DataError, ClusterError: what would stop the run, with the remedy.
    """
    teacher, plan = check_models(settings)
    checks = [_teacher(settings, teacher), _judge(settings)]
    checks += [_storage(settings), _raw_data(settings), _cluster(settings), _memory(settings, plan)]
    console = Console(highlight=False, width=COLUMNS)
    title = f"POSE {project_version()}, dry run of {settings.run.name}: nothing is started or trained"
    console.print(title, markup=False)
    models = Table.grid(padding=(0, 4, 0, 0))
    models.add_row(_shapes(plan.clip), _roles(plan))
    for table in (_checks(checks), _stages(settings), models, _workers(settings, plan)):
        console.print()
        console.print(table)


def _teacher(settings: Settings, folder: Path) -> Check:
    name, revision = settings.model.teacher, settings.model.revision
    if find_folder(name) is not None:
        return Check("teacher", OK, f"{folder}, every part is there")
    if name.startswith(BUCKET):
        return Check("teacher", OK, f"{name}, every part is there; each machine copies it when the run starts")
    if revision is None:
        return Check("teacher", WARNING, f"{name} is downloaded as it will be then: pin it with model.revision=COMMIT")
    return Check("teacher", UNCHECKED, f"{name} at {revision} is downloaded when the run starts")


def _judge(settings: Settings) -> Check:
    judge = settings.evaluation.judge
    if not judge:
        return Check("judge", OK, "none: the report leaves out SA, TC and FQ")
    return Check("judge", OK, judge)


def _storage(settings: Settings) -> Check:
    uri = settings.storage.uri
    if _is_placeholder(uri):
        return Check("storage", WARNING, f"{uri} is a placeholder: set storage.uri to a bucket of yours")
    if uri != EMBEDDED:
        Store.open(uri).check()
        return Check("storage", OK, f"{uri} can be written")
    find_weed()
    free = shutil.disk_usage(Path.cwd()).free
    text = f"SeaweedFS is installed; {_size(free)} are free below {Path(STATE_FOLDER).resolve()}"
    return Check("storage", OK if free >= ROOMY_BYTES else WARNING, text)


def _raw_data(settings: Settings) -> Check:
    uri = settings.data.raw_uri
    if uri == MOVING_DIGITS:
        data = settings.data
        return Check(
            "raw data", OK, f"{data.digits_clips} + 2 x {data.digits_heldout_clips} clips of moving digits, rendered"
        )
    if _is_placeholder(uri):
        return Check("raw data", WARNING, f"{uri} is a placeholder: set data.raw_uri to your videos")
    found = Counter(unit.source for unit in find_raw(settings.data, settings.storage.retry_seconds).units)
    return Check("raw data", OK, f"{uri} holds " + ", ".join(f"{count} {UNITS[name]}" for name, count in found.items()))


def _is_placeholder(uri: str) -> bool:
    """Whether the bucket is written all in capitals, which no bucket's name is."""
    return uri.startswith("s3://") and uri.removeprefix("s3://").partition("/")[0].isupper()


def _cluster(settings: Settings) -> Check:
    training = settings.training
    each = f"{training.cpus_per_worker:g} CPUs and {training.gpus_per_worker:g} GPUs"
    asked = f"{training.fewest_workers} workers of {each}"
    if cluster.current_dashboard_url() is not None:
        client = cluster.connect()
        available, place = cluster.capacity(client), f"Ray at {client.get_address()}"
    elif training.gpus_per_worker or settings.data.encoder_gpus:
        return Check("cluster", UNCHECKED, f"no cluster named, set RAY_ADDRESS=http://HOST:8265: {asked} are needed")
    else:
        available, place = cluster.Capacity(os.cpu_count() or 1, 0, autoscales=False), "this machine"
    beside = cluster.data_cpus(settings)
    cluster.require(available, training.fewest_workers, training.cpus_per_worker, training.gpus_per_worker, beside)
    grows = " and may grow" if available.autoscales else ""
    return Check(
        "cluster", OK, f"{place} has {available.cpus:g} CPUs and {available.gpus:g} GPUs{grows}; {asked} are needed"
    )


def _memory(settings: Settings, plan: Plan) -> Check:
    """Where the workers share this machine's memory, whether they fit into it."""
    most = max(worker.total for worker in plan.workers.values())
    if cluster.current_dashboard_url() is not None or settings.training.gpus_per_worker:
        text = f"each worker needs {_size(most)} and room for activations"
        return Check("memory", UNCHECKED, text)
    needed, machine = settings.training.workers * most, psutil.virtual_memory().total
    text = f"{settings.training.workers} workers hold {_size(needed)} of this machine's {_size(machine)}"
    return Check("memory", OK if needed < machine else WARNING, text)


def _checks(checks: list[Check]) -> Table:
    table = Table("check", "", "", box=None, pad_edge=False)
    colours = {OK: "green", WARNING: "bold yellow", UNCHECKED: "yellow"}
    for check in checks:
        table.add_row(check.thing, f"[{colours[check.state]}]{check.state}[/]", check.text.replace("[", r"\["))
    return table


def _stages(settings: Settings) -> Table:
    table = Table("stage", "reads", f"writes to {manifests.run_prefix(settings)}/…/", "", box=None, pad_edge=False)
    for stage in manifests.STAGES.values():
        table.add_row(stage.name, ", ".join(stage.inputs) or "raw data", WRITES[stage.name], _state(settings, stage))
    return table


def _state(settings: Settings, stage: manifests.Stage) -> str:
    uri = settings.storage.uri
    if uri == EMBEDDED:
        # Its content can only be asked for while it runs.
        return UNKNOWN if (Path(STATE_FOLDER) / "object_store" / "data").exists() else TO_DO
    if _is_placeholder(uri):
        return TO_DO
    return DONE if manifests.is_done(Store.open(uri).child(manifests.run_prefix(settings)), stage, settings) else TO_DO


def _shapes(clip: ClipShapes) -> Table:
    table = Table("a clip", "shape", box=None, pad_edge=False)
    for name, shape in (
        ("pixels (C F H W)", clip.pixels),
        ("latents (C T h w)", clip.latents),
        ("prompt (L D)", clip.text),
        ("first frame (N D)", clip.image),
        ("first frame (C T h w)", clip.first_frame),
    ):
        if shape is not None:
            table.add_row(name, _product(shape))
    table.add_row("tokens", f"{clip.tokens:,}")
    return table


def _product(shape: Shape) -> str:
    return " x ".join(map(str, shape))


def _roles(plan: Plan) -> Table:
    table = Table("network", box=None, pad_edge=False)
    table.add_column("parameters", justify="right")
    table.add_column("in float32", justify="right")
    for role, parameters in plan.parameters.items():
        table.add_row(role, f"{parameters:,}", _size(FLOAT32_BYTES * parameters))
    return table


def _workers(settings: Settings, plan: Plan) -> Table:
    table = Table(f"each of {settings.training.workers} workers holds", box=None, pad_edge=False)
    for phase in PHASES:
        table.add_column(phase, justify="right")
    phases = [plan.workers[phase] for phase in PHASES]
    for name, values in {
        "its shard of the weights": [each.weights for each in phases],
        "gradients": [each.gradients for each in phases],
        "the optimisers' moments": [each.moments for each in phases],
        "running average": [each.average for each in phases],
    }.items():
        table.add_row(name, *map(_size, values))
    table.add_row("[bold]total between two steps[/]", *(f"[bold]{_size(each.total)}[/]" for each in phases))
    table.add_row("what a step makes on top", *["see pipelines/plan.py"] * len(phases))
    return table


def _size(count: int) -> str:
    """Bytes in the binary unit a person would choose."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count} bytes"
