"""One stage from its input artifacts to its own: what is there before it starts, and the manifest it ends with."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pose_core.runtime import manifests
from pose_core.runtime.progress import Display, display
from pose_core.runtime.storage import Store
from pose_core.runtime.tracking import Tracker, start_child, start_parent
from pose_core.settings import Settings


@dataclass
class StageRun:
    """What a stage works with. ``metrics`` ends up in its manifest and in MLflow."""

    name: str
    settings: Settings
    root: Store
    """The storage root, ``storage.uri``."""
    fingerprint: str
    tracker: Tracker
    display: Display
    metrics: dict[str, float] = field(default_factory=dict)

    def artifact_of(self, stage: str) -> Store:
        """The artifact folder of a stage of this run."""
        return self.root.child(manifests.run_prefix(self.settings)).child(stage)

    @property
    def artifact(self) -> Store:
        """This stage's own artifact folder."""
        return self.artifact_of(self.name)


@contextmanager
def stage_run(name: str, settings: Settings) -> Iterator[StageRun]:
    """Open a stage; leaving the block normally writes its manifest, an error leaves none.

    Raises:
        ConfigError: an earlier stage has no artifact that fits these settings.
    """
    stage = {**manifests.STAGES, **manifests.SUITES}[name]
    root = Store.open(settings.storage.uri)
    store = root.child(manifests.run_prefix(settings))
    manifests.begin(store, stage, settings)
    tracker = start_child(parent_run(settings), name)
    tracker.log_settings({section: getattr(settings, section).model_dump(mode="json") for section in stage.settings})
    run = StageRun(name, settings, root, manifests.fingerprint(stage, settings), tracker, display())
    started = time.monotonic()
    try:
        with tracker:
            yield run
            seconds = time.monotonic() - started
            result = {f"result/{key}": value for key, value in run.metrics.items()}
            tracker.log_metrics(0, result | {"seconds": seconds})
            manifests.write_manifest(
                store, stage, settings, metrics=run.metrics, mlflow_run_id=tracker.run_id, seconds=seconds
            )
    finally:
        run.display.close()


def parent_run(settings: Settings) -> Tracker:
    """The MLflow run that holds a child for every stage."""
    tracking, name = settings.tracking, settings.run.name
    return start_parent(tracking.uri, tracking.experiment, name, {"pose.run": name})
