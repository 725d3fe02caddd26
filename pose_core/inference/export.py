"""Writes the folder that stock diffusers loads: the teacher's parts around the one-step transformer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pose_core.models import families
from pose_core.models.folders import missing, read_index, read_json
from pose_core.models.parts import stock_class

SCHEDULER_CLASS, SCHEDULER = "FlowMatchEulerDiscreteScheduler", "scheduler/scheduler_config.json"


def one_step_scheduler(conditioning_time: float) -> dict[str, float | int]:
    """Arguments of a ``FlowMatchEulerDiscreteScheduler`` whose single step is the one-step map.

    It tells a model ``num_train_timesteps`` times the noise level, which is 1 there, so their number is the time in
    thousandths.
    """
    whole = round(1000 * conditioning_time)
    return {"shift": 1.0} if whole == 1000 else {"num_train_timesteps": whole, "shift": 1.0}


def exported_conditioning_time(folder: Path) -> float:
    """What ``one_step_scheduler`` was given for the scheduler of ``folder``; the schedulers of teachers have 1.

    Raises:
        CheckpointError: there is no scheduler (correctable in the call).
    """
    path = folder / SCHEDULER
    if not path.is_file():
        raise missing(folder, SCHEDULER)
    return float(read_json(path).get("num_train_timesteps", 1000)) / 1000


def export_folder(
    teacher: Path, generator: Path, out: Path, task: str | None = None, conditioning_time: float = 1.0
) -> None:
    """Assemble ``out`` from the teacher's folder, the generator's transformer folder and a one-step scheduler.

    One Euler step from noise to data is exactly the one-step map, so the stock pipeline needs no code of ours. ``task``
    is what a model that can do several was distilled for; ``conditioning_time`` what the generator is told of noise.
    """
    family = families.of(teacher)
    left_out = ("transformer", "transformer_2", "scheduler", "README.md", ".*")
    shutil.copytree(teacher, out, ignore=shutil.ignore_patterns(*left_out))
    shutil.copytree(generator, out / "transformer")
    stock_class(SCHEDULER_CLASS)(**one_step_scheduler(conditioning_time)).save_pretrained(out / "scheduler")
    index = family.one_step_index(read_index(teacher), task or family.tasks(teacher)[0])
    index["scheduler"] = ["diffusers", SCHEDULER_CLASS]
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    family.finish_export(out)
