"""When a process that trains looks for cyclic garbage: between steps, and through all it has made at checkpoints.

Left to itself, Python holds all threads of a process for a tenth to a third of a second each time it has made some ten
thousands of new objects, as a checkpoint does, and every rank at another step, so that all ranks wait for each.
"""

from __future__ import annotations

import gc
from typing import Self

_SETTLING_CHECKPOINTS = 2
"""After so many, plans of checkpoints and whatever was imported for them are there, and stay."""


class Garbage:
    """Use it as a context around the steps; what is there on entering, or was made by the first checkpoints, stays."""

    def __init__(self) -> None:
        self._checkpoints = 0

    def __enter__(self) -> Self:
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def __exit__(self, *error: object) -> None:
        gc.enable()
        gc.unfreeze()

    def end_step(self) -> None:
        """Look through what was made since the last call; takes a tenth of a millisecond."""
        gc.collect(1)

    def before_checkpoint(self) -> None:
        """Look through what was made since entering, or since the first checkpoints."""
        gc.collect()
        if self._checkpoints < _SETTLING_CHECKPOINTS:
            self._checkpoints += 1
            gc.freeze()
