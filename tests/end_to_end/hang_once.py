"""``pipelines/stability_priming.py``, but once rank 1 does not come to a collective: it sleeps in its place."""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path
from typing import Any

from pose_core.runtime import phases
from pose_core.runtime.worker import run_phase

PIPELINES = Path(__file__).parents[2] / "pipelines"


def hang_once(config: dict[str, Any], mark: str, steps: int) -> dict[str, float]:
    """A worker's function, which hangs in the step behind ``steps`` others; the file ``mark`` says that it has."""
    import torch.distributed as dist

    from pose_core.training import loop

    reduce, train = dist.all_reduce, loop.train

    def train_marked(*args: Any, after_step: Any, **kwargs: Any) -> None:
        def note(step: int, values: Any) -> Any:
            ends = after_step(step, values)
            done.append(step)
            return ends

        train(*args, after_step=note, **kwargs)

    def sleep_once(*args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == 1 and len(done) >= steps and not Path(mark).exists():
            Path(mark).touch()
            time.sleep(3600)
        return reduce(*args, **kwargs)

    done: list[int] = []
    loop.train, dist.all_reduce = train_marked, sleep_once
    return run_phase(config)


if __name__ == "__main__":
    found, steps = str(Path(sys.argv.pop(1)).resolve()), int(sys.argv.pop(1))

    def worker(config: dict[str, Any]) -> dict[str, float]:
        """Travels to the workers by value, since it is of the main module."""
        sys.path.insert(0, str(Path(__file__).parent))
        from hang_once import hang_once

        return hang_once(config, found, steps)

    phases.run_phase = worker
    runpy.run_path(str(PIPELINES / "stability_priming.py"), run_name="__main__")
