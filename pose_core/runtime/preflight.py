"""What can be known to be wrong with a run's models before anything is started or spent."""

from __future__ import annotations

from pathlib import Path

from pose_core.errors import CheckpointError
from pose_core.models.folders import find_folder
from pose_core.runtime.teachers import teacher_configs
from pose_core.settings import Settings
from pose_core.training.plan import Plan, plan_run


def check_models(settings: Settings) -> tuple[Path, Plan]:
    """The teacher's folder and the plan of the run: every part is there and the settings fit it.

    Of a hub name only the configs are had; its weights are checked when they are downloaded. Takes about a second.

    Raises:
        CheckpointError, ConfigError: (exit code 2) names the part that is missing or the setting that does not fit.
    """
    judge = settings.evaluation.judge
    folder = teacher_configs(settings.model)
    if judge and find_folder(judge) is None:
        raise CheckpointError(f"evaluation.judge={judge} is no folder: name one, or leave it empty", in_call=True)
    return folder, plan_run(settings, folder)
