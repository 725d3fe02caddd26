"""Where a run's teacher lies on this machine: a folder, the hub's cache, or a copy of a bucket's folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pose_core.errors import CheckpointError
from pose_core.models.folders import find_folder, local_teacher
from pose_core.models.parts import check_parts
from pose_core.runtime.shared_copies import name_of
from pose_core.runtime.storage import BUCKET, Store
from pose_core.settings import ModelSettings

CACHE = Path("~/.cache/pose/teachers")
"""Copies of folders in buckets, one a content: a folder that is published anew is copied anew."""


def teacher_folder(model: ModelSettings) -> Path:
    """The teacher's diffusers folder on this machine; what lies elsewhere is copied once, whichever process asks first.

    Raises:
        CheckpointError: there is no such folder, or one that is incomplete (correctable in the call).
        StorageError: the bucket cannot be read.
    """
    if not model.teacher.startswith(BUCKET):
        return local_teacher(model.teacher, model.revision)
    store, content = Store.open(model.teacher), _content(model.teacher)
    folder = CACHE.expanduser() / content
    with _alone(folder.with_suffix(".lock")):
        if not folder.is_dir():
            store.download_folder("", folder)
    return folder


def teacher_configs(model: ModelSettings) -> Path:
    """A folder with the teacher's configs at least, checked to be complete as far as that needs no download of weights.

    Raises:
        CheckpointError, StorageError: as ``teacher_folder``; a part or a file of weights that is missing is named.
    """
    if not model.teacher.startswith(BUCKET):
        folder = local_teacher(model.teacher, model.revision, weights=False)
        check_parts(folder, weights=find_folder(model.teacher) is not None)
        return folder
    store, content = Store.open(model.teacher), _content(model.teacher)
    folder = CACHE.expanduser() / f"{content}-configs"
    keys = store.list()
    with _alone(folder.with_suffix(".lock")):
        for key in keys:
            if key.endswith(".json") and not (folder / key).is_file():
                (folder / key).parent.mkdir(parents=True, exist_ok=True)
                (folder / key).write_bytes(store.read_bytes(key))
    check_parts(folder, weights=True, files=set(keys), name=model.teacher)
    return folder


def _content(uri: str) -> str:
    """A name for what a bucket's folder holds now.

    Raises:
        CheckpointError: it holds nothing (correctable in the call).
        StorageError: it cannot be read.
    """
    files = Store.open(uri).stored()
    if not files:
        raise CheckpointError(f"model.teacher={uri} holds no file: name a diffusers folder in a bucket", in_call=True)
    return name_of(files)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Inside, no other process of this machine is; ranks of one machine ask at the same time."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
