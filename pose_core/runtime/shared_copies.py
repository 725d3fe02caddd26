"""A folder of the store on this machine, copied once for all of its processes that need it at the same time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from pose_core.runtime.local_files import partials_of
from pose_core.runtime.storage import Store
from pose_core.runtime.teachers import BUCKET

CACHE = Path("~/.cache/pose/shared")
"""What processes that were killed leave here is used by the next that need it, and then removed."""


@contextlib.contextmanager
def shared_copy(store: Store) -> Iterator[Path]:
    """Inside, all that ``store`` holds as a folder: itself if it is one, else a copy that the last to leave removes.

    Raises:
        StorageError: the store cannot be read.
    """
    if not store.uri.startswith(BUCKET):
        yield Path(store.uri)
        return
    files = sorted((stored.key, stored.size, stored.version) for stored in store.stored())
    copy = CACHE.expanduser() / hashlib.sha256(repr((store.uri, files)).encode()).hexdigest()[:32]
    copy.parent.mkdir(parents=True, exist_ok=True)
    with copy.with_suffix(".lock").open("w") as lock:
        _enter(lock.fileno(), store, copy)
        try:
            yield copy
        finally:
            with contextlib.suppress(BlockingIOError):  # somebody else is inside
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(copy, ignore_errors=True)


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
