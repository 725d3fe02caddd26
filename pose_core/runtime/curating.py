"""The first pass of ``prepare_data``: look at every raw video once, wherever it is, and list the clips it gives.

Only a few hundred bytes a clip come back. What was looked at is recorded by object and version, so that the next time
only new and changed objects are read.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray

from pose_core.data.buckets import Bucket
from pose_core.data.clip_list import Clip, clips_of, digest
from pose_core.data.curation import ContentRules
from pose_core.data.inspection import InspectionRules, inspect_video
from pose_core.data.sources import SOURCES
from pose_core.data.sources.source import Sample, Stored, Unit
from pose_core.data_settings import CurationSettings
from pose_core.errors import DataError
from pose_core.runtime.data_plans import work_through
from pose_core.runtime.guard import Guard
from pose_core.runtime.raw_files import RawFiles
from pose_core.runtime.storage import Store

INSPECTED = "inspected"
_VERSION = 1
"""Of what inspection does; another one looks at everything again."""
_UNITS_AT_ONCE = 32
_BYTES_AT_ONCE = 256 << 20
_TASKS_PER_CPU = 4
_READERS = 16


def inspection_rules(curation: CurationSettings, buckets: tuple[Bucket, ...]) -> InspectionRules:
    """The rules on a video as a whole that the settings ask for."""
    return InspectionRules(
        buckets=buckets,
        clips_per_video=curation.clips_per_video,
        shot_threshold=curation.shot_threshold,
        min_side_pixels=curation.min_side_pixels,
        min_seconds=curation.min_seconds,
        max_seconds=curation.max_seconds,
        min_source_rate=curation.min_source_rate,
        max_source_rate=curation.max_source_rate,
    )


def content_rules(curation: CurationSettings) -> ContentRules:
    """The rules on what a clip shows that the settings ask for."""
    return ContentRules(
        max_cropped_share=curation.max_cropped_share,
        max_black_share=curation.max_black_share,
        min_brightness_range=curation.min_brightness_range,
        max_frozen_share=curation.max_frozen_share,
        min_motion=curation.min_motion,
    )


@dataclass(frozen=True)
class Inspector:
    """Looks at units of work and leaves a record of each lot; travels into tasks."""

    files: RawFiles
    out: Store
    rules: InspectionRules
    max_video_bytes: int
    memory_bytes: int
    seconds: float

    @property
    def recipe(self) -> str:
        """Changes with anything that its records depend on besides the units."""
        limits = [self.max_video_bytes, self.memory_bytes, self.seconds]
        return digest([_VERSION, asdict(self.rules), limits])

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One lot of units to its record, which is written and returned."""
        units = [_unit(each) for each in json.loads(rows["item"][0])["units"]]
        clips = [clip.to_json() for unit in units for clip in self._clips(unit)]
        record = {"recipe": self.recipe, "units": [unit_id(unit) for unit in units], "clips": clips}
        self.out.write_json(f"{INSPECTED}/{digest(record['units'])}.json", record)
        return {"result": np.array([json.dumps(record)], dtype=object)}

    def _clips(self, unit: Unit) -> Iterator[Clip]:
        for sample in SOURCES[unit.source].samples(unit, self.files, self.max_video_bytes):
            yield from self._clips_of(sample)

    def _clips_of(self, sample: Sample) -> list[Clip]:
        if sample.problem:
            return clips_of(sample, None)
        guard = _guard(self.memory_bytes, self.seconds)
        try:
            return clips_of(sample, guard.call(inspect_video, sample.video, self.rules))
        except DataError as error:
            sample.problem = str(error)
            return clips_of(sample, None)


@functools.lru_cache(maxsize=1)
def _guard(memory_bytes: int, seconds: float) -> Guard:
    """One child for all the tasks that a worker process runs one after the other."""
    return Guard(memory_bytes, seconds)


def unit_id(unit: Unit) -> str:
    """Changes with the unit's content, its caption and what else it is read with."""
    return digest(asdict(unit))


def inspect(
    units: list[Unit], inspector: Inspector, cpus_per_task: float, advance: Callable[[int, int], None]
) -> list[Clip]:
    """Every clip of ``units``, those looked at before from their records; ``advance`` is told of units done, of all.

    Records of what is not in ``units`` any more, or was looked at with other rules, are deleted.
    """
    wanted = {unit_id(unit): unit for unit in units}
    clips: list[Clip] = []
    for name, record in read_records(inspector.out, INSPECTED):
        if record.get("recipe") == inspector.recipe and set(record["units"]) <= wanted.keys():
            clips += map(Clip.from_json, record["clips"])
            for done in record["units"]:
                del wanted[done]
        else:
            inspector.out.delete_prefix(name)
    lots = _lots(list(wanted.values()))
    items = [{"units": [asdict(unit) for unit in lot]} for lot in lots]
    left = len(wanted)
    for record in work_through(items, inspector, num_cpus=cpus_per_task):
        clips += map(Clip.from_json, record["clips"])
        left -= len(record["units"])
        advance(len(units) - left, len(units))
    return clips


def read_records(store: Store, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and content of every JSON record in a folder of ``store``, fetched several at a time."""
    names = [name for name in store.list(folder) if name.endswith(".json")]
    with ThreadPoolExecutor(_READERS) as pool:
        yield from zip(names, pool.map(store.read_json, names), strict=True)


def _lots(units: list[Unit]) -> list[list[Unit]]:
    """Units to be looked at in one task: few enough that all CPUs have work, and not too many bytes."""
    cpus = ray.cluster_resources().get("CPU", 1.0)
    most = min(_UNITS_AT_ONCE, max(1, math.ceil(len(units) / (cpus * _TASKS_PER_CPU))))
    lots: list[list[Unit]] = []
    size = 0
    for unit in units:
        if not lots or len(lots[-1]) == most or size + unit.stored.size > _BYTES_AT_ONCE:
            lots.append([])
            size = 0
        lots[-1].append(unit)
        size += unit.stored.size
    return lots


def _unit(value: dict[str, Any]) -> Unit:
    """Inverse of ``asdict``."""
    companion = Stored(**value["companion"]) if value["companion"] else None
    return Unit(**(value | {"stored": Stored(**value["stored"]), "companion": companion}))
