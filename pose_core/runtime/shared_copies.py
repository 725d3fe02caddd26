"""A folder of the store on this machine, copied once for all of its processes that need it at the same time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from pose_core.data.sources.source import Stored
from pose_core.errors import StorageError
from pose_core.runtime.local_files import partials_of
from pose_core.runtime.storage import BUCKET, Store
from pose_core.runtime.storage_errors import in_one_line

CACHE = Path(tempfile.gettempdir()) / f"pose-shared-{os.getuid()}"
"""What processes that were killed leave here is used by the next that need it, and then removed."""


@contextlib.contextmanager
def shared_copy(store: Store) -> Iterator[Path]:
    """Inside, all that ``store`` holds as a folder: itself if it is one, else a copy that the last to leave removes.

    Raises:
        StorageError: the store cannot be read, or the folder for copies not be used.
    """
    if not store.uri.startswith(BUCKET):
        yield Path(store.uri)
        return
    copy = CACHE / name_of(store.stored())
    with in_one_line(str(CACHE)):
        CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
        if CACHE.stat().st_uid != os.getuid():  # anybody may have made it in /tmp, and put other weights there
            raise StorageError(f"{CACHE} belongs to another user; have it removed or set TMPDIR")
        lock = copy.with_suffix(".lock").open("w")
    with lock:
        _enter(lock.fileno(), store, copy)
        try:
            yield copy
        finally:
            with contextlib.suppress(BlockingIOError):  # somebody else is inside
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(copy, ignore_errors=True)


def name_of(files: Iterable[Stored]) -> str:
    """A name for what a folder of the store holds, from paths, sizes and versions of its files."""
    told = sorted((stored.key, stored.size, stored.version) for stored in files)
    return hashlib.sha256(repr(told).encode()).hexdigest()[:32]


def _enter(lock: int, store: Store, copy: Path) -> None:
    while True:
        fcntl.flock(lock, fcntl.LOCK_SH)
        if copy.is_dir():  # and nobody removes it while we have the lock
            return
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not copy.is_dir():
            for left in partials_of(copy):
                shutil.rmtree(left, ignore_errors=True)
            store.download_folder("", copy)
