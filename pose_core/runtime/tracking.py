"""MLflow: runs, curves, files and registered models. The only file that imports mlflow.

mlflow takes over a second to import and brings pandas along, by whatever path it is entered, so it is imported where a
client is first made and a program that only asks for ``--help`` or a location never waits for it.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pose_core.errors import ConfigError, PoseError, StorageError
from pose_core.runtime.metric_queue import MetricQueue, Point

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

_REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"}
"""What MLflow answers to a call that will not succeed later either."""

# A training must not hang for minutes on a server that went away: the queue of metrics retries on its own.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def tracking_uri(configured: str, folder: Path) -> str:
    """The MLflow store in use: ``configured``, else ``MLFLOW_TRACKING_URI``, else SQLite in ``folder``.

    SQLite paths come back absolute, because every job works in another folder.
    """
    uri = configured or os.environ.get("MLFLOW_TRACKING_URI", "") or f"sqlite:///{folder}/mlflow.db"
    file = _sqlite_file(uri)
    return uri if file is None else f"sqlite:///{file}"


def view_command(uri: str) -> str:
    """The shell command that shows the runs logged at ``uri`` in a browser; never holds a password."""
    if uri.startswith(("http://", "https://")):
        return f"python -m webbrowser {_without_secrets(uri)}"
    program = "mlflow" if shutil.which("mlflow") else Path(sys.executable).with_name("mlflow")
    store = uri if uri == _without_secrets(uri) else "$MLFLOW_TRACKING_URI"
    # As it comes, MLflow's view starts fifteen processes of 2.6 GB in all; so it is two of 0.5 GB.
    return f'MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {program} ui --workers 1 --backend-store-uri "{store}"'


class Tracker:
    """One MLflow run, logged from one process; pickles as the description (uri, experiment, run id) of that run.

    Metrics go out in batches from a background thread, so that a training step never waits for the database; files and
    settings go out at once. A store that fails in mid-run costs one warning, never the training: the newest metrics are
    kept and sent again, a file or setting that could not be logged is left out. ``flush`` or ``close`` before exiting.
    """

    def __init__(self, uri: str, experiment: str, run_id: str):
        self.uri, self.experiment, self.run_id = uri, experiment, run_id
        self._mlflow: MlflowClient | None = None
        self._queue = MetricQueue(self._send)
        self._nonfinite = 0
        self._warned = False

    def __reduce__(self) -> tuple[type[Tracker], tuple[str, str, str]]:
        return Tracker, (self.uri, self.experiment, self.run_id)

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        """Queue one point a name at ``step``.

        NaN and infinity would ruin the axes of a curve, so they are left out and counted in the curve ``nonfinite``.
        """
        now = int(time.time() * 1000)
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        if len(finite) < len(values):
            self._nonfinite += len(values) - len(finite)
            finite["nonfinite"] = float(self._nonfinite)
        self._queue.add(Point(name, value, now, step) for name, value in finite.items())

    def log_settings(self, settings: dict[str, Any]) -> None:
        """Log nested settings as parameters with dotted names; passwords inside URIs are masked, long values are cut.

        MLflow never changes a parameter. Logging again what is there does nothing; a value that differs from the one
        logged first (a run resumed with other settings) goes to the tag ``changed.<name>``.
        """
        flat = {name: _without_secrets(str(value)) for name, value in _flatten(settings)}

        def act(client: MlflowClient) -> None:
            from mlflow.entities import Param
            from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

            known = client.get_run(self.run_id).data.params
            cut = {name: value[:MAX_PARAM_VAL_LENGTH] for name, value in flat.items()}
            new = iter([Param(name, value) for name, value in cut.items() if name not in known])
            while batch := list(itertools.islice(new, MAX_PARAMS_TAGS_PER_BATCH)):
                client.log_batch(self.run_id, params=batch)
            for name in cut.keys() & known.keys():
                if cut[name] != known[name]:
                    client.set_tag(self.run_id, f"changed.{name}", cut[name])

        self._attempt(act)

    def log_text(self, text: str, path: str) -> None:
        """Store ``text`` as the artifact ``path``, relative to the run's artifacts."""
        self._attempt(lambda client: client.log_text(self.run_id, text, path))

    def log_file(self, local: Path, artifact_folder: str | None = None) -> None:
        """Copy one local file into ``artifact_folder`` of the run; returns when it is stored."""
        self._attempt(lambda client: client.log_artifact(self.run_id, str(local), artifact_folder))

    def log_folder(self, local: Path, artifact_folder: str | None = None) -> None:
        """Copy what a local folder holds into ``artifact_folder`` of the run; returns when it is stored."""
        self._attempt(lambda client: client.log_artifacts(self.run_id, str(local), artifact_folder))

    def set_tags(self, tags: dict[str, str]) -> None:
        """Set or replace tags."""
        self._attempt(lambda client: [client.set_tag(self.run_id, name, value) for name, value in tags.items()])

    def flush(self) -> None:
        """Send the queued metrics now; what a failing store does not take stays queued."""
        self._queue.flush()

    def close(self, status: Status) -> None:
        """Send the queued metrics and end the run with ``status``."""
        if lost := self._queue.close():
            logger.warning("%d points of MLflow run %s were not logged: its store did not come back", lost, self.run_id)
        self._attempt(lambda client: client.set_terminated(self.run_id, status))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the run as the block ended."""
        # Ray ends a job's driver with SystemExit when the job is stopped.
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        self.close("FINISHED" if kind is None else "KILLED" if stopped else "FAILED")

    def _send(self, points: list[Point]) -> bool:
        def act(client: MlflowClient) -> None:
            from mlflow.entities import Metric

            # Safe to repeat after a failure: a point keeps its time, and MLflow stores equal points once.
            client.log_batch(self.run_id, metrics=[Metric(*point) for point in points])

        error = self._attempt(act)
        # A refusal (the run was deleted, say) stays one: keeping its batch would block all later ones.
        return error is None or getattr(error, "error_code", "") in _REFUSALS

    def _attempt(self, act: Callable[[MlflowClient], Any]) -> Exception | None:
        """Do ``act`` and return what went wrong, after one warning for each outage."""
        try:
            if self._mlflow is None:
                file = _sqlite_file(self.uri)
                if file is not None and not file.exists():  # MLflow would quietly start an empty database
                    raise StorageError(f"{file} is not on this machine; workers elsewhere need a tracking server")
                self._mlflow = _client(self.uri)
            act(self._mlflow)
        except Exception as error:  # MLflow, SQLAlchemy, drivers, urllib3: no common base, and none may end a training
            if not self._warned:
                reason = _reason(error)
                logger.warning("MLflow run %s at %s: %s; going on", self.run_id, _without_secrets(self.uri), reason)
            self._warned = True
            return error
        self._warned = False
        return None


def start_parent(uri: str, experiment: str, run_name: str, tags: dict[str, str]) -> Tracker:
    """The run that holds the stages of ``run_name``: the one an earlier submit left, else a new one.

    Raises ConfigError if the store cannot be used or the experiment was deleted.
    """
    tracker = _start_run(uri, experiment, run_name, {"pose.run": run_name})
    tracker.set_tags(tags)
    return tracker


def start_child(parent: Tracker, stage: str) -> Tracker:
    """A run nested in ``parent`` for one stage; a stage tried again goes on with the run it did not finish.

    Raises ConfigError if the store cannot be used.
    """
    own = {"mlflow.parentRunId": parent.run_id, "pose.stage": stage}
    return _start_run(parent.uri, parent.experiment, stage, own, "status != 'FINISHED'")


def register_model(uri: str, run_id: str, artifact_path: str, name: str, alias: str) -> int:
    """Register a folder of a run's artifacts as a version of model ``name`` that ``models:/name@alias`` leads to.

    Returns the version; the same folder of the same run keeps the version it has.
    Raises StorageError if the run has no such folder, the registry does not answer or does not allow the names.
    """
    try:
        client = _client(uri)
        if not client.list_artifacts(run_id, artifact_path):
            raise StorageError(f"MLflow run {run_id} holds no artifact {artifact_path!r} to register; log it first")
        source = f"{client.get_run(run_id).info.artifact_uri}/{artifact_path}"
        versions = client.search_model_versions(f"run_id = '{run_id}'")
        version = next((found for found in versions if found.name == name and found.source == source), None)
        if version is None:
            if not client.search_registered_models(f"name = '{name}'"):
                client.create_registered_model(name)
            version = client.create_model_version(name, source, run_id)
        client.set_registered_model_alias(name, alias, str(version.version))
        return int(version.version)
    except PoseError:
        raise
    except Exception as error:  # as in Tracker._attempt: no common base
        refused = getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE"
        remedy = "set other names" if refused else "run the export again when MLflow answers"
        names = f"export.registered_model={name} with export.alias={alias}"
        raise StorageError(f"MLflow did not register {names}: {_reason(error)}; {remedy}", in_call=refused) from None


def _client(uri: str) -> MlflowClient:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # prints tracebacks of what it then raises
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _check(uri: str) -> None:
    """Ask the store for something cheap. MLflow tries a failing database for minutes, so that is opened directly."""
    if file := _sqlite_file(uri):
        file.parent.mkdir(parents=True, exist_ok=True)
    if "://" in uri and not uri.startswith(("http:", "https:")):
        import sqlalchemy

        engine = sqlalchemy.create_engine(uri)
        sqlalchemy.inspect(engine)
        engine.dispose()
    _client(uri).search_experiments(max_results=1)


def _start_run(uri: str, experiment: str, name: str, own_tags: dict[str, str], *conditions: str) -> Tracker:
    """Set the oldest run with ``own_tags`` that meets ``conditions`` running again, or create one with those tags."""
    query = " and ".join([*(f"tags.`{tag}` = '{value}'" for tag, value in own_tags.items()), *conditions])
    try:
        _check(uri)
        client = _client(uri)
        experiment_id = _experiment_id(client, uri, experiment)
        found = client.search_runs([experiment_id], query, max_results=1, order_by=["start_time ASC"])
        run = found[0] if found else client.create_run(experiment_id, run_name=name, tags=own_tags)
        client.update_run(run.info.run_id, status="RUNNING")
    except PoseError:
        raise
    except Exception as error:  # as in Tracker._attempt: no common base
        raise ConfigError(
            f"MLflow cannot use tracking.uri={_without_secrets(uri)}: {_reason(error)}; name a tracking server that"
            " answers or sqlite:///FILE there or in MLFLOW_TRACKING_URI, or leave both empty"
        ) from None  # the original may spell out a password
    return Tracker(uri, experiment, run.info.run_id)


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        file = _sqlite_file(uri)
        # Without a location of its own, an experiment's files land in ./mlruns of whatever job comes first.
        return client.create_experiment(name, artifact_location=str(file.parent / "mlartifacts") if file else None)
    if found.lifecycle_stage != "active":
        raise ConfigError(f"MLflow experiment {name!r} was deleted; restore it or set another tracking.experiment")
    return found.experiment_id


def _sqlite_file(uri: str) -> Path | None:
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).absolute() if uri.startswith(prefix) else None


def _flatten(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _without_secrets(text: str) -> str:
    return re.sub(r"(?<=://)[^/\s]+(?=@)|(?<=password=)[^&\s]+", "***", text)


def _reason(error: BaseException) -> str:
    """One line on ``error``: the system's own words where a system call is at its root, else its first line."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.strerror:
            return _without_secrets(str(link.strerror))
        link = link.__cause__ or link.__context__
    return _without_secrets((str(error).splitlines() or [""])[0] or type(error).__name__)[:300].rstrip(".")
