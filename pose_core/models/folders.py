"""Where a model named in the settings lies on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from pose_core.errors import CheckpointError

SHIPPED = Path(__file__).parents[2] / "pipelines" / "configs"
"""Folders shipped with the project are named relative to the configs that use them."""
PUBLISHED = SHIPPED / "published"
"""Configs, no weights, of published models under their hub names: what a plan needs of them without a network."""


def find_folder(name: str) -> Path | None:
    """The local folder ``name`` stands for: relative to the working folder, or shipped with the project."""
    for candidate in (Path(name).expanduser(), SHIPPED / name):
        if candidate.is_dir():
            return candidate.resolve()
    return None


def local_teacher(name: str, revision: str | None, *, weights: bool = True) -> Path:
    """A diffusers folder on this machine; a hub name is downloaded into the hub's cache first.

    ``weights=False`` is content with the configs, and takes them from the project where it ships them.

    Raises:
        CheckpointError: neither a folder nor a hub name that can be had (correctable in the call).
    """
    folder = find_folder(name)
    if folder is not None:
        return folder
    published = PUBLISHED / name
    if not weights and (published / "model_index.json").is_file():
        return published
    patterns = None if weights else ["*.json", "*/*.json"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"model.teacher={name} is no folder here and no hub model that can be downloaded ({reason}): "
            "name an existing diffusers folder, or check the network and the name",
            in_call=True,
        ) from None


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """The ``config.json`` of one part of a diffusers folder.

    Raises:
        CheckpointError: when the folder lacks the part or it is not JSON (correctable in the call).
    """
    path = folder / part / "config.json"
    if not path.is_file():
        raise missing(folder, f"{part}/config.json")
    return read_json(path)


def read_index(folder: Path) -> dict[str, Any]:
    """The ``model_index.json`` of a diffusers folder: its pipeline's class, its parts and the pipeline's own settings.

    Raises:
        CheckpointError: when the folder has none or it is not JSON (correctable in the call).
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise missing(folder, path.name)
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: when the file holds none (correctable in the call).
    """
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not a JSON object ({error}): fetch the folder again", in_call=True) from None


def missing(folder: Path | str, file: str) -> CheckpointError:
    """What to say of a folder without one of its files."""
    return CheckpointError(f"{folder} has no {file}: model.teacher must name a complete diffusers folder", in_call=True)
