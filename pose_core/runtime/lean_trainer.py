"""Ray Train with as few processes beside the training as can be, and workers that wait in peace.

Each process of Ray's that runs an actor looks a hundred times a second whether it has been interrupted. Where ranks
leave no core free that is time of theirs, and in a rank's own process it takes the interpreter away from the training
thread. So the controller runs in the driver, whose end is the phase's end anyway; nobody asks an autoscaler for what
the workers' placement group asks it for already; and a worker that is asked how it is answers when its training has
ended, or after a while.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import ray
from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.context import TrainRunContext, get_train_context
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupPollStatus
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker as _RayTrainWorker
from ray.train.v2._internal.execution.worker_group.worker import Worker, WorkerStatus

ANSWER_SECONDS = 2.0
"""After so long a worker says that it is still training: the controller would ask as often."""


class RayTrainWorker(_RayTrainWorker):
    """Ends its answer with the training, or after ``ANSWER_SECONDS``; by its own name it is found among processes."""

    def poll_status(self) -> WorkerStatus:
        """As of the end of the wait, in which the main thread sleeps: nothing else of this actor needs it meanwhile."""
        context = get_train_context().execution_context
        # Reports wait for this answer, too; ours go to MLflow and the board.
        if (thread := context.training_thread_runner._thread) is not None and context.result_queue.empty():
            thread.join(ANSWER_SECONDS)
        return super().poll_status()


class _Workers(WorkerGroup):
    _worker_cls = RayTrainWorker

    def _init_train_context_on_workers(
        self, workers: list[Worker], sync_actor: ray.actor.ActorHandle, train_context_args: dict[str, list[Any]]
    ) -> None:
        """As it is there, but for two actors that workers could ask.

        One is the controller, which is none here, for reported checkpoints. The other one carries objects between
        workers, which torch does for ours.
        """
        ray.kill(sync_actor)
        common = {
            "train_run_context": self._train_run_context,
            "synchronization_actor": None,
            "storage_context": self._storage_context,
            "worker_callbacks": self._worker_callbacks_to_propagate,
            "controller_actor": None,
        }
        begun = []
        for index, worker in enumerate(workers):
            own = {name: values[index] for name, values in train_context_args.items()}
            begun.append(
                worker.actor.init_train_context.remote(distributed_context=worker.distributed_context, **common, **own)
            )
        ray.get(begun)
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):
    worker_group_cls = _Workers

    async def _poll_workers(self) -> WorkerGroupPollStatus:
        """All workers' answers, without a pause before: they are not quick to answer."""
        workers = self.get_worker_group()
        assert workers is not None
        # One that is late is asked no second time, but waited for again; after ten minutes it counts as dead.
        return workers.poll_status(timeout=2 * ANSWER_SECONDS)


class _FixedSize(FixedScalingPolicy):
    """Tells no coordinator of the workers: an autoscaler sees their placement group."""

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class LeanTrainer(TorchTrainer):
    """Runs the controller itself, and without two helpers of Ray Train's.

    One deals out datasets that a trainer was given; ours is given none. The other frees the workers' places should the
    controller's process be killed; that is the driver, with which Ray frees them.
    """

    def _create_default_callbacks(self) -> list[Any]:
        spared = DatasetsCallback, PlacementGroupCleanerCallback
        return [each for each in super()._create_default_callbacks() if not isinstance(each, spared)]

    def _initialize_and_run_controller(self, **parts: Any) -> Result:
        if not self.scaling_config.elasticity_enabled:
            parts["scaling_policy"] = _FixedSize(self.scaling_config)
        controller, loop = _Controller(**parts), asyncio.new_event_loop()
        try:
            # Not asyncio.run, which keeps an interrupt from what waits for Ray in the middle of a coroutine.
            loop.run_until_complete(controller.run())
        except BaseException:
            # With a head that is gone this fails, too; the first reason is the one to tell.
            with suppress(Exception):
                if workers := controller.get_worker_group():
                    workers.abort()
            raise
        finally:
            loop.close()
        return controller.get_result()
