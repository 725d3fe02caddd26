"""Where the time and the memory of training steps go, told from outside: nothing here changes what a step computes.

The loop says what it does (``Record``); collectives are wrapped where they are called. On the CPU a clock is read; on a
GPU an event is put into the stream that computes, and its time is read a step later, when the loop has waited for the
device anyway: no step waits for its telemetry.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from pose_core.training.state import Networks

PARTS = ("data", "forward", "backward", "optimiser", "communication", "checkpoint", "validation", "trace", "other")
"""What the time of a step is split into, without overlap.

data           waiting for the next batch, and bringing it to the device
forward        losses, with every network they ask
backward       gradients, with what is computed again for them
optimiser      gradient norm and clipping, AdamW and Muon, the running average
communication  waiting for other ranks and their data, taken out of the part in which it falls. On the CPU: the blocking
               time of every collective. On a GPU: how long the stream that computes stands still until weights are
               gathered (and unpacked), gradients are reduced at the end of a backward pass, and tokens are exchanged;
               what hides behind computation is not in it, nor is waiting for a free buffer within a backward pass
checkpoint     writing training state, as far as training waits for it
validation     samples and the figures of alarms
trace          storing a profiler's trace
other          the rest: reporting, say
"""
NOT_TRAINING = ("checkpoint", "validation", "trace")
MEMORY_ROLES = ("weights", "gradients", "optimiser", "average", "activations")
"""The planner's, with gathered weights and what is being sent counted among the activations."""

Record = Callable[[str], AbstractContextManager[Any]]
"""``with record(part):`` says what is done inside."""


def unrecorded(_part: str) -> AbstractContextManager[Any]:
    """Keeps no record."""
    return nullcontext()


class Clock(Protocol):
    """Marks moments."""

    def mark(self) -> Any:
        """This moment."""
        ...

    def passed(self, mark: Any) -> bool:
        """Whether the moment's time can be read, which is found out without waiting."""
        ...

    def seconds(self, first: Any, second: Any) -> float:
        """Between two moments that have passed."""
        ...


class HostClock:
    """Moments as this process reaches them."""

    def mark(self) -> float:
        return time.perf_counter()

    def passed(self, mark: float) -> bool:
        return True

    def seconds(self, first: float, second: float) -> float:
        return second - first


class StreamClock:
    """Moments as the GPU's computing stream reaches them."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.current_stream(device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return event

    def passed(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def seconds(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        return first.elapsed_time(second) / 1000


def clock_of(device: torch.device) -> Clock:
    return StreamClock(device) if device.type == "cuda" else HostClock()


class StepTimes:
    """Splits the time from its making on into ``PARTS``; a part within another interrupts it."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.seconds = dict.fromkeys(PARTS, 0.0)
        """By part, of the steps whose times are known and were not taken yet."""
        self.steps = 0
        self._thread = threading.current_thread()
        self._open = ["other"]
        self._marks: list[tuple[Any, str]] = [(clock.mark(), "other")]
        self._ended: deque[list[tuple[Any, str]]] = deque()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A ``Record``. What other threads of this process do beside the steps, checkpoints say, is not told."""
        if not self._of_a_step():
            yield
            return
        self._open.append(name)
        self._marks.append((self.clock.mark(), name))
        try:
            yield
        finally:
            self._open.pop()
            self._marks.append((self.clock.mark(), self._open[-1]))

    def _of_a_step(self) -> bool:
        """Whether this thread made the record, or is one of torch's own, in which gradients are computed on a GPU."""
        thread = threading.current_thread()
        return thread is self._thread or isinstance(thread, threading._DummyThread)

    def end_step(self) -> None:
        """A step ends and the next begins; reads the times of all ended steps that the device has finished."""
        last = self.clock.mark(), self._open[-1]
        self._ended.append([*self._marks, last])
        self._marks = [last]
        while self._ended and self.clock.passed(self._ended[0][-1][0]):
            marks = self._ended.popleft()
            for (first, name), (second, _) in zip(marks, marks[1:], strict=False):
                self.seconds[name] += self.clock.seconds(first, second)
            self.steps += 1

    def take(self) -> tuple[int, dict[str, float]]:
        """The steps since the last call whose times are known, and their seconds by part, all together."""
        taken = self.steps, self.seconds
        self.steps, self.seconds = 0, dict.fromkeys(PARTS, 0.0)
        return taken


class Memory:
    """What this rank's networks hold by role, in bytes, and the highest peak of a step since it was made.

    ``activations`` is the peak less all other roles: on a GPU of what torch has allocated there; on the CPU of the
    process's resident size, which counts everything that the process has touched since. ``gradients`` are those of the
    turn that has most.
    """

    def __init__(
        self,
        networks: Networks,
        optimizers: dict[str, torch.optim.Optimizer],
        trained: Sequence[Sequence[nn.Parameter]],
        device: torch.device,
    ):
        average = [_local(each) for each in networks.average.weights().values()]
        every = [_local(each) for module in networks.modules() for each in [*module.parameters(), *module.buffers()]]
        self._optimizers, self._device = optimizers, device
        self._held = {"average": _bytes(average), "gradients": max(_bytes(map(_local, each)) for each in trained)}
        self._held["weights"] = _bytes(every) - self._held["average"]
        self._outside = self._peak = 0
        if device.type != "cuda":
            self._outside = _resident("VmRSS") - self._held["weights"] - self._held["average"] - self._moments()

    def begin_step(self) -> None:
        """What came before, samples say, is not a step's."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark begins anew

    def end_step(self) -> None:
        """Look at the peak since ``begin_step``."""
        on_gpu = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) if on_gpu else _resident("VmHWM") - self._outside
        self._peak = max(self._peak, peak)

    def roles(self) -> dict[str, int]:
        """Bytes by ``MEMORY_ROLES``."""
        held = self._held | {"optimiser": self._moments()}
        return held | {"activations": max(self._peak - sum(held.values()), 0)}

    def _moments(self) -> int:
        states = [state for each in self._optimizers.values() for state in each.state.values()]
        return _bytes(_local(each) for state in states for each in state.values() if isinstance(each, torch.Tensor))


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(each.nbytes for each in tensors)


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
