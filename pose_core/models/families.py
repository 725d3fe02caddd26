"""The families of models by name, and which of them a diffusers folder belongs to.

A family is one file: its ``FAMILY`` meets ``Family`` of ``video_model.py``. Files are imported when they are asked for,
so that a run loads the classes of one family only.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, cast

from pose_core.errors import CheckpointError
from pose_core.models.folders import read_index
from pose_core.models.video_model import Family

WAN = ("WanPipeline", "WanImageToVideoPipeline")
FILES = {
    "wan": ("wan", WAN),
    "wan22_ti2v": ("wan22_ti2v", WAN),
    "wan22_a14b": ("wan22_a14b", WAN),
    "ltx": ("ltx", ("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline")),
    "hunyuan15": ("hunyuan15", ("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline")),
}
"""Family: its file here, and the stock pipelines whose folders are its own."""


def get(name: str) -> Family:
    """The family that ``model.family`` calls ``name``."""
    return cast(Family, import_module(f"pose_core.models.{FILES[name][0]}").FAMILY)


def of(folder: Path) -> Family:
    """The family of a diffusers folder, by its ``model_index.json``.

    Raises:
        CheckpointError: there is none, or it is of a pipeline that no family here takes (correctable in the call).
    """
    index = read_index(folder)
    pipeline = index.get("_class_name")
    found = [name for name, (_file, pipelines) in FILES.items() if pipeline in pipelines]
    if not found:
        known = sorted({name for _file, pipelines in FILES.values() for name in pipelines})
        raise CheckpointError(
            f"{folder} is a {pipeline}, which no family here takes: name a folder of {', '.join(known)}", in_call=True
        )
    return get(_which_wan(index) if pipeline in WAN else found[0])


def _which_wan(index: dict[str, Any]) -> str:
    """The Wan models share their pipelines; what tells them apart are the pipeline's own settings."""
    if index.get("expand_timesteps"):
        return "wan22_ti2v"
    return "wan" if index.get("boundary_ratio") is None else "wan22_a14b"
