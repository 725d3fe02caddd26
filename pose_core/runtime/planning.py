"""Before money is spent: what each number of GPUs would hold, how long it would take, and what would make it fit."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from pose_core.errors import CheckpointError, ConfigError
from pose_core.models.parts import clip_shapes
from pose_core.runtime.teachers import teacher_configs
from pose_core.settings import Settings
from pose_core.training.local import steps_by_phase
from pose_core.training.memory import ROLES
from pose_core.training.plan import check_fit
from pose_core.training.simulation import Step, simulate

GIB = 2**30
COLUMNS = 160
MOST_FRAMES_A_LATENT = 64


@dataclass(frozen=True)
class Rates:
    """What a GPU holds, does and costs.

    memory       GiB of one GPU, of which the share ``reserve`` is left to the driver, communication and fragmentation
    teraflops    of one GPU at the precision of computation, of which the share ``utilisation`` is reached
    gigabytes    a second that one GPU receives from the others
    price        of one GPU for an hour
    """

    memory: float
    reserve: float
    teraflops: float
    utilisation: float
    gigabytes: float
    price: float

    @classmethod
    def of_memory(cls, gibibytes: float) -> Rates:
        """Where only this much memory, all of it, is of interest."""
        return cls(memory=gibibytes, reserve=0.0, teraflops=1.0, utilisation=1.0, gigabytes=1.0, price=0.0)

    def fits(self, step: Step) -> bool:
        return step.peak_bytes <= self.memory * (1 - self.reserve) * GIB

    def seconds(self, step: Step) -> float:
        """A step's time if what is sent hides behind what is computed, as sharding arranges it, or the reverse."""
        computing = step.flops / (self.teraflops * 1e12 * self.utilisation)
        return max(computing, step.sent / (self.gigabytes * 1e9))


def plan(settings: Settings, counts: Sequence[int], rates: Rates, *, suggest: bool) -> bool:
    """Print what each of ``counts`` GPUs would hold and cost, and with ``suggest`` what would make a misfit fit.

    Whether the first count that was asked for, or any, fits.

    Raises:
        ConfigError, CheckpointError: (correctable in the call) settings that do not fit the teacher or each other.
    """
    teacher = teacher_configs(settings.model)
    runs = {count: change(settings, {"workers": count}) for count in counts}
    for run in runs.values():
        check(run, teacher)
    console = Console(highlight=False, width=COLUMNS)
    console.print(_title(settings, teacher), markup=False)
    steps = {}
    for count, run in runs.items():
        with console.status(f"simulating {count} GPUs"):
            steps[count] = {phase: simulate(phase, run, teacher) for phase in steps_by_phase(run)}
    console.print(_table(settings, steps, rates))
    console.print(_assumptions(settings, rates), markup=False)
    fitting = [count for count, found in steps.items() if all(map(rates.fits, found.values()))]
    for count in [each for each in counts if each not in fitting] if suggest else []:
        with console.status(f"looking for what makes {count} GPUs enough"):
            found = smallest_change(runs[count], teacher, rates, phases=list(steps_by_phase(settings)))
        said = "no change of memory settings is enough: take more GPUs"
        if found is not None:
            said = f"{found.typed} makes it fit, {found.peak_bytes / GIB:.1f} GiB at the peak"
        console.print(f"{count} GPUs: {said}", markup=False)
    return bool(fitting)


def change(settings: Settings, updates: dict[str, object]) -> Settings:
    """The settings with other ones in ``training``, checked as if they had been typed.

    Raises:
        ConfigError: they do not fit each other.
    """
    tree = settings.model_dump()
    tree["training"] |= updates
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"training.{error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def check(settings: Settings, teacher: Path) -> int:
    """Tokens of a clip, once the settings fit the teacher.

    Raises:
        ConfigError, CheckpointError: they do not.
    """
    return check_fit(settings, teacher).tokens


class Change(NamedTuple):
    """Settings as they are typed, and the highest peak of the phases with them."""

    typed: str
    peak_bytes: int


def smallest_change(
    settings: Settings, teacher: Path, rates: Rates, *, phases: Sequence[str], seconds: float = math.inf
) -> Change | None:
    """The first single change, else the first pair, in the order of ``changes``, with which every phase fits.

    None where there is none, or none was found in so many seconds.
    """
    single, give_up = list(changes(settings)), time.monotonic() + seconds
    for updates in [*([each] for each in single), *combinations(single, 2)]:
        merged = {name: value for each in updates for name, value in each.items()}
        if len(merged) < sum(map(len, updates)):
            continue
        try:
            changed = change(settings, merged)
            check(changed, teacher)
        except ConfigError:
            continue
        found = [simulate(phase, changed, teacher) for phase in phases]
        if all(map(rates.fits, found)):
            typed = " ".join(f"training.{name}={value}" for name, value in merged.items())
            return Change(typed, max(step.peak_bytes for step in found))
        if time.monotonic() > give_up:
            break
    return None


def changes(settings: Settings) -> Iterator[dict[str, object]]:
    """Changes that save memory, from those that leave the result as it is to those that change what learns."""
    training = settings.training
    if training.activation_checkpointing == "none":
        yield {"activation_checkpointing": "selective"}
    if training.activation_checkpointing != "full":
        yield {"activation_checkpointing": "full"}
    if training.accumulation < training.batch_per_worker:
        yield {"accumulation": training.batch_per_worker}
    for ranks in (2, 4, 8):
        if ranks > training.context_workers:
            yield {"context_workers": ranks}
    if training.replicas > 1:
        yield {"replicas": 1}
    if training.precision == "float32":
        yield {"precision": "bfloat16"}
    if training.generator == "full":
        yield {"generator": "lora"}
    if training.generator != "one_base":
        yield {"generator": "one_base"}


def longest_clip(settings: Settings, rates: Rates) -> None:
    """Print the most frames, at the height and width of the settings, with which every phase fits.

    Raises:
        ConfigError, CheckpointError: (correctable in the call) settings that do not fit the teacher or each other.
    """
    teacher = teacher_configs(settings.model)
    factor = _frames_a_latent(settings, teacher)

    def peak(latents: int) -> float:
        data = settings.data.model_copy(update={"frames": factor * (latents - 1) + 1})
        longer = settings.model_copy(update={"data": data})
        check(longer, teacher)
        return max(simulate(phase, longer, teacher).peak_bytes for phase in steps_by_phase(longer))

    limit, data = rates.memory * (1 - rates.reserve) * GIB, settings.data
    # What a step holds grows evenly with the tokens: two points tell where the limit is, its neighbours decide.
    few, many = peak(4), peak(12)
    found = max(int(4 + (limit - few) / (many - few) * 8), 0)
    while found and peak(found) > limit:
        found -= 1
    while found and peak(found + 1) <= limit:
        found += 1
    frames = factor * (found - 1) + 1
    text = f"the longest clip of {data.height} x {data.width} has {frames} frames" if found else "no clip fits"
    training = settings.training
    print(f"{training.workers} GPUs of {rates.memory:g} GiB, training.generator={training.generator}: {text}")


def _frames_a_latent(settings: Settings, teacher: Path) -> int:
    """Frames that each latent frame but the first stands for: with so many and one more, a clip has its second size."""
    data = settings.data
    for frames in range(1, MOST_FRAMES_A_LATENT):
        try:
            clip_shapes(
                teacher,
                frames=frames + 1,
                height=data.height,
                width=data.width,
                text_tokens=data.text_tokens,
                task=settings.model.task,
            )
        except CheckpointError:
            continue
        return frames
    return check(settings, teacher)  # which says what does not fit


def _title(settings: Settings, teacher: Path) -> str:
    data, training = settings.data, settings.training
    return (
        f"{settings.model.teacher}, {settings.method.name}, training.generator={training.generator}: clips of "
        f"{data.frames} x {data.height} x {data.width} ({check(settings, teacher):,} tokens), "
        f"{training.batch_per_worker} a worker, recomputed activations: {training.activation_checkpointing}, "
        f"workers a clip: {training.context_workers}, replicas: {training.replicas}"
    )


def _table(settings: Settings, steps: dict[int, dict[str, Step]], rates: Rates) -> Table:
    table = Table(
        "GPUs", "phase", *ROLES, "peak GiB", "fits", "PFLOP", "sent GB", "s a step", "hours", "price", box=None
    )
    for column in (*table.columns[2 : len(ROLES) + 3], *table.columns[-5:]):
        column.justify = "right"
    for count, phases in steps.items():
        for phase, step in phases.items():
            hours = steps_by_phase(settings)[phase] * rates.seconds(step) / 3600
            table.add_row(
                str(count),
                phase,
                *(f"{step.peak[role] / GIB:.1f}" for role in ROLES),
                f"{step.peak_bytes / GIB:.1f}",
                "yes" if rates.fits(step) else "no",
                f"{step.flops / 1e15:.1f}",
                f"{step.sent / 1e9:.0f}",
                f"{rates.seconds(step):.1f}",
                f"{hours:.1f}",
                f"{hours * count * rates.price:,.0f}",
            )
    return table


def _assumptions(settings: Settings, rates: Rates) -> str:
    return (
        f"A GPU has {rates.memory:g} GiB, {rates.reserve:.0%} of it kept free; {rates.teraflops:g} TFLOP/s at a "
        f"utilisation of {rates.utilisation:g}; receives {rates.gigabytes:g} GB/s; costs {rates.price:g} an hour. "
        "Bytes, PFLOP and GB are one GPU's. Encoding, samples, alarms and checkpoints are not in the hours."
    )
