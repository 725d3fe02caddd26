"""A run's chain of jobs, opened: its config in the store, its MLflow run, its logs and its results on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pose_core import config
from pose_core.runtime import cluster, manifests
from pose_core.runtime.jobs import Chain
from pose_core.runtime.progress import EVENTS_VARIABLE, display, replay
from pose_core.runtime.session import Session
from pose_core.runtime.stage import parent_run
from pose_core.runtime.storage import Store
from pose_core.settings import Settings

CONFIG = "config.yaml"


@contextmanager
def open_chain(session: Session, *, debug: bool) -> Iterator[Chain]:
    """The chain of ``session``'s run; when it ends well, report and model are copied to the run's output folder.

    The resolved config is stored beside the artifacts, so that ``pipelines/<stage>.py --config <that>`` repeats any
    stage alone.

    Raises:
        ConfigError: the cluster can never hold the workers that the settings ask for.
    """
    settings = session.settings
    run = Store.open(settings.storage.uri).child(manifests.run_prefix(settings))
    client = cluster.connect()
    training = settings.training
    if manifests.pending(run, settings):
        available = cluster.capacity(client)
        beside = cluster.data_cpus(settings)
        cluster.require(available, training.fewest_workers, training.cpus_per_worker, training.gpus_per_worker, beside)
    run.write_bytes(CONFIG, config.dump(settings).encode())
    tracker = parent_run(settings)
    tracker.log_settings(settings.model_dump(mode="json"))
    shown = display()

    def on_line(line: str) -> None:
        if not replay(line, shown) and debug:
            shown.note(line)

    chain = Chain(
        client,
        run,
        settings,
        run.url(CONFIG),
        session.environment | {EVENTS_VARIABLE: "1"},
        log_folder=output_folder(settings) / "logs",
        on_line=on_line,
    )
    try:
        with tracker:
            yield chain
            fetch_results(run, settings)
            tracker.log_folder(output_folder(settings) / "report", "report")
    finally:
        shown.close()


def output_folder(settings: Settings) -> Path:
    """Where a person finds what a run made: ``<run.output_folder>/<run.name>``."""
    return Path(settings.run.output_folder).expanduser().resolve() / settings.run.name


def fetch_results(run: Store, settings: Settings) -> None:
    """Copy report, exported model and LoRA files out of the store, which may be stopped when the run ends."""
    folder = output_folder(settings)
    folder.mkdir(parents=True, exist_ok=True)
    run.download_folder("evaluate/report", folder / "report")
    run.download_folder("export/model", folder / "model")
    if run.list("export/lora"):
        run.download_folder("export/lora", folder / "lora")
