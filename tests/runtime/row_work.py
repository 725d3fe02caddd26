"""What the processes of ``test_comparing.py`` do; a module of its own, because a new process imports it by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from pose_core.errors import DataError


def work(job: tuple[str, str], advance: Callable[[float], None]) -> None:
    """``(what, folder)``: leaves the file ``folder/what``, or ends as its name says."""
    what, folder = job
    advance(0.5)
    if what == "refuses":
        raise DataError("no clips here: add some")
    if what == "breaks":
        raise ValueError("a bug")
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "endless":
        while True:
            time.sleep(60)
    Path(folder, what).write_text(str(os.getpid()))
