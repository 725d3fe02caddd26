"""The outside world of a run: its store, its MLflow and its Ray cluster, found or started, and stopped at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

from pose_core.models.folders import find_folder
from pose_core.runtime.cluster import connect, current_dashboard_url
from pose_core.runtime.local_ray import LocalRay
from pose_core.runtime.object_store import EmbeddedStore
from pose_core.runtime.preflight import check_models
from pose_core.runtime.progress import EVENTS_VARIABLE
from pose_core.runtime.storage import Store
from pose_core.runtime.tracking import tracking_uri
from pose_core.settings import Settings

EMBEDDED = "embedded"
STATE_FOLDER = ".pose"
"""Where the servers that a run starts keep their data, below the working folder."""


@dataclass(frozen=True)
class Session:
    """A run's settings with every location absolute, and what another process needs to reach the same places."""

    settings: Settings
    environment: dict[str, str]
    """Addresses and paths for jobs on the same cluster; never a secret."""
    places: dict[str, str]
    """What runs where, for the header."""


@contextmanager
def open_session(settings: Settings, *, driver: bool = True) -> Iterator[Session]:
    """Start what the settings ask for and nobody provides yet; everything started here is stopped at the end.

    ``driver`` connects this process to Ray, as every stage needs; submitting jobs does not.

    Raises:
        CheckpointError, StorageError, ConfigError, ClusterError: what is missing, does not fit, or cannot be reached or
            started, with the remedy.
    """
    check_models(settings)
    with ExitStack() as stack:
        home = Path(STATE_FOLDER).resolve()
        environment: dict[str, str] = {}
        places: dict[str, str] = {}
        uri = settings.storage.uri
        if uri == EMBEDDED:
            store = stack.enter_context(EmbeddedStore(home / "object_store"))
            uri = store.uri
            environment |= store.environment
            places["storage"] = f"{uri} on SeaweedFS at {store.environment['AWS_ENDPOINT_URL']}, started here"
        elif "://" not in uri:
            uri = str(Path(uri).expanduser().resolve())
        places.setdefault("storage", uri)
        Store.open(uri).check()
        resolved = _absolute(settings, uri, tracking_uri(settings.tracking.uri, home))
        places["tracking"] = resolved.tracking.uri
        if current_dashboard_url() is None:
            cluster = stack.enter_context(LocalRay(home / "ray", environment))
            places["ray"] = f"{cluster.dashboard_url}, started here"
        else:
            places["ray"] = connect().get_address()
        if driver:
            ray.init(address="auto", log_to_driver=EVENTS_VARIABLE in os.environ, logging_level="ERROR")
            stack.callback(ray.shutdown)
        yield Session(resolved, environment, places)


def _absolute(settings: Settings, storage_uri: str, tracking: str) -> Settings:
    """The settings as another process must read them: no path depends on the working folder any more."""
    raw = settings.data.raw_uri
    if Path(raw).is_dir():
        raw = str(Path(raw).resolve())
    return settings.model_copy(
        update={
            "storage": settings.storage.model_copy(update={"uri": storage_uri}),
            "tracking": settings.tracking.model_copy(update={"uri": tracking}),
            "data": settings.data.model_copy(update={"raw_uri": raw}),
            "model": settings.model.model_copy(update={"teacher": _outside(settings.model.teacher)}),
            "evaluation": settings.evaluation.model_copy(update={"judge": _outside(settings.evaluation.judge)}),
        }
    )


def _outside(name: str) -> str:
    """A folder of the user's own, made absolute; names of shipped folders stay, they are the same on every node."""
    own = Path(name).expanduser()
    return str(own.resolve()) if name and own.is_dir() and find_folder(name) == own.resolve() else name
