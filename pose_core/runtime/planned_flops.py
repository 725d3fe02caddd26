"""What a step computes by the planner's count, found in a process of its own while training goes on."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pose_core.data.buckets import Bucket
from pose_core.errors import PoseError
from pose_core.runtime.planning import change
from pose_core.runtime.teachers import teacher_configs
from pose_core.settings import Settings
from pose_core.training.simulation import simulate


def count_flops(phase: str, settings: Settings, bucket: Bucket) -> int | None:
    """Multiplications and additions of one rank's step on clips of ``bucket``; None where they cannot be counted.

    Those of the model: what activation checkpointing computes again is not in it.
    """
    size = {"frames": bucket.frames, "height": bucket.height, "width": bucket.width}
    changed = change(settings, {"activation_checkpointing": "none"})
    changed = changed.model_copy(update={"data": changed.data.model_copy(update=size)})
    try:
        return simulate(phase, changed, teacher_configs(settings.model)).flops
    except PoseError:
        return None


def start_counting(phase: str, settings: Settings, bucket: Bucket) -> Any:
    """A reference to what ``count_flops`` finds, on this machine, which has the teacher's configs."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    task = ray.remote(num_cpus=0, scheduling_strategy=here, max_retries=0)(count_flops)
    return task.remote(phase, settings, bucket)
