"""Ray Train run from the driver: results, failures and interrupts arrive, and little stands beside the workers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import ray.train
from ray.util.state import list_actors

from pose_core.runtime.lean_trainer import LeanTrainer
from pose_core.runtime.local_ray import LocalRay

pytestmark = pytest.mark.integration

WORKERS = 2


@pytest.fixture(scope="module", autouse=True)
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with LocalRay(tmp_path_factory.mktemp("ray")) as local:
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
        yield local.gcs_address
        ray.shutdown()


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., LeanTrainer]:
    def build(loop: Callable[[dict[str, Any]], Any], **config: Any) -> LeanTrainer:
        return LeanTrainer(
            loop,
            train_loop_config=config | {"folder": str(tmp_path)},
            scaling_config=ray.train.ScalingConfig(num_workers=WORKERS, resources_per_worker={"CPU": 0.5}),
            run_config=ray.train.RunConfig(
                storage_path=str(tmp_path),
                failure_config=ray.train.FailureConfig(max_failures=1),
                logging_config=ray.train.LoggingConfig("CRITICAL"),
            ),
        )

    return build


def living(address: str) -> list[str]:
    return sorted(actor.class_name for actor in list_actors(address, filters=[("state", "=", "ALIVE")]))


def answering() -> bool:
    """Whether this worker's main thread gets to answer how it is, and is busy with that."""
    deadline = time.monotonic() + 30
    while "poll_status" not in "".join(psutil.Process().cmdline()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return "poll_status" in "".join(psutil.Process().cmdline())


def all_end(address: str) -> bool:
    """Whether no actor lives, now or soon: Ray hears of ends a moment later."""
    deadline = time.monotonic() + 30
    while living(address) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not living(address)


def test_the_first_workers_result_comes_back_and_beside_the_workers_stands_little(
    trainer: Callable[..., LeanTrainer], address: str
) -> None:
    def loop(config: dict[str, Any]) -> Any:
        rank = ray.train.get_context().get_world_rank()
        return rank, answering(), living(config["address"]) if rank == 0 else None

    ended = trainer(loop, address=address).fit()
    assert ended.return_value == (0, True, ["RayTrainWorker"] * WORKERS)
    assert all_end(address)


def test_workers_start_again_once_and_then_the_cause_is_raised(trainer: Callable[..., LeanTrainer]) -> None:
    def loop(config: dict[str, Any]) -> None:
        if ray.train.get_context().get_world_rank() == 1:
            with open(f"{config['folder']}/attempts", "a") as file:
                file.write("1")
            time.sleep(3)  # Ray Train's own start is over
            if config["by_signal"]:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("no such weights")
        time.sleep(3600)

    for by_signal, cause in ((False, "no such weights"), (True, "died")):
        broken = trainer(loop, by_signal=by_signal)
        with pytest.raises(ray.train.WorkerGroupError) as caught:
            broken.fit()
        (failure,) = caught.value.worker_failures.values()
        assert cause in str(failure)
        attempts = Path(broken.train_loop_config["folder"], "attempts")  # type: ignore[index]
        assert attempts.read_text() == "11"
        attempts.unlink()


def test_an_interrupt_ends_the_workers_at_once(
    trainer: Callable[..., LeanTrainer], tmp_path: Path, address: str
) -> None:
    def loop(config: dict[str, Any]) -> None:
        if answering():  # the driver has begun to ask
            Path(config["folder"], f"pid-{os.getpid()}").touch()
        time.sleep(3600)

    def interrupt() -> None:
        while len(list(tmp_path.glob("pid-*"))) < WORKERS:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    # What starts the tests in the background may have them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer(loop).fit()
    finally:
        signal.signal(signal.SIGINT, before)
    assert all_end(address)
    pids = [int(file.name.split("-")[1]) for file in tmp_path.glob("pid-*")]
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=30)
    assert alive == []
