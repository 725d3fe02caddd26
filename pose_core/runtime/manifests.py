"""The stages of a run and their manifests: what was made, from what, and whether it still stands for the settings.

A stage's artifact is the folder ``runs/<run>/<stage>/`` of the storage. Its ``manifest.json`` is written last: without
one that matches the settings there is no artifact. ``run`` below is always the store at ``runs/<run>``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pose_core.data.moving_digits import EDITION, MOVING_DIGITS
from pose_core.errors import ConfigError
from pose_core.runtime.cli import project_version
from pose_core.runtime.storage import Store
from pose_core.settings import Settings


@dataclass(frozen=True)
class Stage:
    """One step of the chain: the stages whose artifacts it reads, and the sections of settings its result depends on.

    Of ``run`` only the seed counts: name and folders say where results lie, not what they are.
    """

    name: str
    inputs: tuple[str, ...]
    settings: tuple[str, ...]
    incremental: bool = False
    """It knows by itself what of its folder still stands for the settings, and makes only the rest."""

    @property
    def script(self) -> str:
        """Path of the stage's own script, relative to the project's root."""
        return f"pipelines/{self.name}.py"


PHASE = ("run", "model", "data", "method", "training", "alarms")
STAGES: Mapping[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("prepare_data", (), ("run", "model", "data", "curation"), incremental=True),
        Stage("stability_priming", ("prepare_data",), (*PHASE, "priming")),
        Stage(
            "adversarial_equilibrium",
            ("prepare_data", "stability_priming"),
            (*PHASE, "equilibrium"),
        ),
        Stage(
            "evaluate",
            ("prepare_data", "stability_priming", "adversarial_equilibrium"),
            ("run", "model", "data", "evaluation"),
        ),
        Stage("export", ("adversarial_equilibrium", "evaluate"), ("run", "model", "data", "export")),
    )
}
"""The chain, in its order."""
SUITES: Mapping[str, Stage] = {
    "vbench_i2v": Stage("vbench_i2v", ("adversarial_equilibrium",), ("run", "model", "data", "evaluation", "vbench"))
}
"""What a finished run can be put through besides, by itself."""

_HOW_NOT_WHAT: Mapping[str, frozenset[str]] = {
    "run": frozenset({"name", "output_folder"}),
    "data": frozenset({"encoder_actors", "encoder_batch_clips", "encoder_cpus", "encoder_gpus"}),
    "curation": frozenset({"examples_per_rule", "decoder_cpus"}),
    "training": frozenset(
        {"cpus_per_worker", "gpus_per_worker", "threads_per_worker", "activation_checkpointing", "max_failures"}
        | {"compile_blocks", "accumulation"}
        # Each clip comes once an epoch whatever their number, so a run may go on with other workers.
        | {"workers", "min_workers", "elastic_check_seconds", "preemption_grace_seconds"}
        | {"raw_chunks_ahead", "raw_decode_cpus", "log_clips"}
        | {"checkpoint_every_steps", "keep_checkpoints", "sample_every_steps", "sample_clips"}
        | {"slow_step_factor", "slow_step_seconds", "longest_pause_seconds"}
    ),
    "evaluation": frozenset({"workers", "batch_clips"}),
    "vbench": frozenset({"weights_folder", "environment_folder"}),
    "alarms": frozenset({"every_steps", "clips", "non_finite_steps"}),
}
"""Settings that change how a result is computed or watched and not what it is: who tunes them keeps what is done."""

MANIFEST, _STARTED = "manifest.json", "started"
_PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)|(?<=password=)[^&\s]+|(?<=token=)[^&\s]+", re.IGNORECASE)


class Manifest(BaseModel):
    """What a finished stage says about its artifact; it holds no secrets."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: str
    fingerprint: str
    """Identity of the result: the same settings and inputs give the same one."""
    inputs: dict[str, str]
    """Fingerprints of the artifacts it was made from."""
    settings: dict[str, Any]
    """All settings of the run, passwords in addresses blotted out."""
    code_version: str
    metrics: dict[str, float | None]
    """None stands for a figure that was not finite."""
    mlflow_run_id: str
    seconds: float


def run_prefix(settings: Settings) -> str:
    """Where a run lies below the storage's root: ``runs/<run>``."""
    return f"runs/{settings.run.name}"


def fingerprint(stage: Stage, settings: Settings) -> str:
    """SHA-256 (hex) over the settings that decide the stage's result and, through its inputs', theirs.

    The code's version is not part of it: a run goes on after an update of the code. The edition of the embedded domain
    is, where its clips are asked for.
    """
    sections = set(stage.settings)
    if "method" in sections and settings.method.name != "pose":
        # A rival's phases read what is theirs, and of both of POSE's phases what they share with them.
        sections |= {"rivals", "priming", "equilibrium"}
    values = settings.model_dump(mode="json", include=sections)
    for section, keys in _HOW_NOT_WHAT.items():
        for key in keys & values.get(section, {}).keys():
            del values[section][key]
    if values.get("data", {}).get("raw_uri") == MOVING_DIGITS:
        values["data"]["raw_uri"] = f"{MOVING_DIGITS}-{EDITION}"
    inputs = {name: fingerprint(STAGES[name], settings) for name in stage.inputs}
    document = {"stage": stage.name, "settings": values, "inputs": inputs}
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(run: Store, stage: Stage) -> Manifest | None:
    """The stage's manifest; None if there is none or it is not whole."""
    key = f"{stage.name}/{MANIFEST}"
    if not run.exists(key):
        return None
    try:
        return Manifest.model_validate_json(run.read_bytes(key))
    except ValueError:
        return None


def is_done(run: Store, stage: Stage, settings: Settings) -> bool:
    """Whether the stage's artifact is complete and is what these settings ask for."""
    manifest = read_manifest(run, stage)
    return manifest is not None and (manifest.stage, manifest.fingerprint) == (stage.name, fingerprint(stage, settings))


def pending(run: Store, settings: Settings) -> list[Stage]:
    """The stages that are still to be run, in order."""
    return [stage for stage in STAGES.values() if not is_done(run, stage, settings)]


def begin(run: Store, stage: Stage, settings: Settings) -> Store:
    """Make the stage's folder ready to be written and return it; from here on it holds no artifact.

    What an interrupted attempt with the same settings left, such as checkpoints, stays; all other content is deleted,
    unless the stage is ``incremental``.

    Raises:
        ConfigError: an input is missing or was made with other settings; the message names the script to run first.
    """
    for name in stage.inputs:
        if not is_done(run, STAGES[name], settings):
            raise ConfigError(
                f"{stage.name} needs what {name} makes with these settings, and {run.url(name)} does not hold it; "
                f"run {STAGES[name].script} with the same config first, or pipelines/full_distill.py for all stages"
            )
    folder, identity = run.child(stage.name), fingerprint(stage, settings)
    finished = folder.exists(MANIFEST)
    if finished or not folder.exists(_STARTED) or folder.read_text(_STARTED) != identity:
        if finished:
            # Deleting takes many requests: should it be cut off, the rest must not pass for an artifact.
            folder.write_bytes(MANIFEST, b"")
        if not stage.incremental:
            run.delete_prefix(stage.name)
        folder.write_bytes(_STARTED, identity.encode())
    return folder


def write_manifest(
    run: Store,
    stage: Stage,
    settings: Settings,
    *,
    metrics: Mapping[str, float],
    mlflow_run_id: str,
    seconds: float,
) -> Manifest:
    """Declare the stage's artifact complete. Call it last, when everything else is written."""
    manifest = Manifest(
        stage=stage.name,
        fingerprint=fingerprint(stage, settings),
        inputs={name: fingerprint(STAGES[name], settings) for name in stage.inputs},
        settings=without_passwords(settings.model_dump(mode="json")),
        code_version=_code_version(),
        metrics={name: value if math.isfinite(value) else None for name, value in metrics.items()},
        mlflow_run_id=mlflow_run_id,
        seconds=round(seconds, 3),
    )
    run.write_json(f"{stage.name}/{MANIFEST}", manifest.model_dump())
    return manifest


def without_passwords(value: Any) -> Any:
    """``value``, text or nested settings, with passwords in addresses blotted out."""
    if isinstance(value, dict):
        return {key: without_passwords(each) for key, each in value.items()}
    return _PASSWORD.sub("***", value) if isinstance(value, str) else value


def _code_version() -> str:
    """The project's version, and the commit where the code is a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return project_version()
    return f"{project_version()} ({commit})"
