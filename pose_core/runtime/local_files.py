"""Local files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from pathlib import Path


def partial_name(path: Path) -> Path:
    """A new name beside ``path`` for what is still being written; on the same disk, so that a rename can end it."""
    return path.with_name(f".{path.name}-{uuid.uuid4().hex}.part")


def partials_of(path: Path) -> list[Path]:
    """What ``partial_name`` named for ``path`` and a process that was killed has left."""
    return list(path.parent.glob(f".{path.name}-*.part"))


def is_partial(path: Path) -> bool:
    """Whether ``path`` has a name that ``partial_name`` makes."""
    return path.name.startswith(".") and path.suffix == ".part"


def write_whole(path: Path, data: bytes | memoryview, mode: int = 0o666) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old content or the new, never a part.

    ``mode`` is what the file allows before the umask; 0o600 keeps other users out from the first byte on.

    Raises:
        OSError: the disk is full, the folder is not writable, or the like; nothing is left behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(path)
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            # Without it, a crash of the machine can leave the new name on an empty file.
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def replace_folder(new: Path, target: Path) -> None:
    """Rename the folder ``new`` to ``target``; a folder that was there is deleted once the new one is in place.

    Raises:
        OSError: a file has that name, or the rename failed; what was there stays then.
    """
    if target.is_file():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    old = partial_name(target)
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
