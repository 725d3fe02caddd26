"""Running out of memory, told in one line with the settings that would help, and by how much."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pose_core.errors import PoseError
from pose_core.runtime.planning import GIB, Rates, changes, smallest_change
from pose_core.runtime.teachers import teacher_configs
from pose_core.settings import Settings
from pose_core.training import parallel
from pose_core.training.simulation import simulate

RESERVE = 0.08
"""Share of a GPU that is left to the driver, communication and fragmentation, as ``pipelines/plan.py`` does."""
WORTHWHILE = 0.9
"""Share of the planned peak that a change must get below: the plan said that the settings fit, and they did not."""
SEARCH_SECONDS = 300.0
NODE_SECONDS = 20.0
_CPU_ALLOCATOR = re.compile(r"DefaultCPUAllocator: (can't allocate memory|not enough memory)|std::bad_alloc")
_RAY_KILLED = re.compile(r"running low on memory|memory usage threshold")


class MemoryExhausted(PoseError):
    """A worker ran out of memory. ``gibibytes`` is what its device has, 0 where it shares its machine's."""

    def __init__(self, message: str, gibibytes: float = 0.0):
        super().__init__(message)
        self.gibibytes = gibibytes

    def __reduce__(self) -> tuple[type[MemoryExhausted], tuple[str, float]]:
        return MemoryExhausted, (str(self), self.gibibytes)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's, the CPU's or Python's allocator raised ``error`` because there was not enough."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_CPU_ALLOCATOR.search(str(error)))


@contextmanager
def told(device: torch.device) -> Iterator[None]:
    """Inside, running out of memory is a ``MemoryExhausted`` that names rank and device.

    Raises:
        MemoryExhausted: instead of what an allocator raised.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        where, gibibytes = f"its machine's {psutil.virtual_memory().total / GIB:.1f} GiB", 0.0
        if device.type == "cuda":
            found = torch.cuda.get_device_properties(device)
            gibibytes = found.total_memory / GIB
            where = f"the {gibibytes:.1f} GiB of a {found.name}"
        asked = re.search(r"[Tt]ried to allocate ([\d.]+) (\w+)", str(error).replace("you tried", "tried"))
        more = "" if asked is None else f" when it asked for {_size(float(asked[1]), asked[2])} more"
        message = f"rank {parallel.rank()} of {parallel.ranks()} ran out of memory, {where},{more}"
        raise MemoryExhausted(message.rstrip(","), gibibytes) from None


def _size(number: float, unit: str) -> str:
    """As an allocator wrote it; the CPU's writes bytes."""
    return f"{number / GIB:.2f} GiB" if unit.startswith("byte") else f"{number:g} {unit}"


def of_dead_worker(failures: Iterable[BaseException], kills_before: Mapping[str, int]) -> MemoryExhausted | None:
    """What to say of ``failures`` if Ray or the kernel killed a worker because its machine had no memory left.

    ``kills_before`` are ``kernel_kills`` of the workers' nodes, by their ids, when the workers began.
    """
    texts = [" ".join(str(failure).split()) for failure in failures]
    if any(_RAY_KILLED.search(text) for text in texts):
        return MemoryExhausted("Ray killed a worker because its machine ran out of memory")
    if any(kills > kills_before[node] for node, kills in _kills_now(kills_before).items()):
        return MemoryExhausted("the kernel killed a process on a worker's machine because it ran out of memory")
    return None


def kernel_kills() -> int:
    """How many processes the kernel has killed for want of memory: of this container, or since this machine started."""
    for file, key in (("/sys/fs/cgroup/memory.events", "oom_kill"), ("/proc/vmstat", "oom_kill")):
        with suppress(OSError):
            for line in Path(file).read_text().splitlines():
                if line.split()[0] == key:
                    return int(line.split()[1])
    return 0


def _kills_now(nodes: Iterable[str]) -> dict[str, int]:
    """By node id, of those that still answer."""
    asked = {
        node: ray.remote(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))(
            kernel_kills
        ).remote()
        for node in nodes
    }
    found = {}
    for node, reference in asked.items():
        with suppress(ray.exceptions.RayError):
            found[node] = ray.get(reference, timeout=NODE_SECONDS)
    return found


def with_advice(error: MemoryExhausted, phase: str, settings: Settings) -> MemoryExhausted:
    """The error with the smallest change of settings that would help, by the planner's count of a worker's peak."""
    return MemoryExhausted(f"{error}; {_advice(error.gibibytes, phase, settings)}", error.gibibytes)


def _advice(gibibytes: float, phase: str, settings: Settings) -> str:
    try:
        teacher = teacher_configs(settings.model)
        now = simulate(phase, settings, teacher).peak_bytes / GIB
        limit = min(WORTHWHILE * now, (1 - RESERVE) * gibibytes or now)
        found = smallest_change(settings, teacher, Rates.of_memory(limit), phases=(phase,), seconds=SEARCH_SECONDS)
    except PoseError:  # a family that cannot be simulated
        tried = " or ".join(f"training.{name}={value}" for each in changes(settings) for name, value in each.items())
        return f"try {tried or 'more workers'}"
    if found is None:
        return (
            f"a worker's tensors need {now:.2f} GiB at the peak of {phase} by the plan, and no other memory settings "
            "need enough less: take more training.workers, smaller clips or a larger device"
        )
    return (
        f"{found.typed} lowers the peak of a worker's tensors in {phase} from {now:.2f} to "
        f"{found.peak_bytes / GIB:.2f} GiB by the plan"
    )
