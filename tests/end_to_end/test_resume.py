"""A phase whose driver is killed and that goes on with another number of workers trains on each clip once an epoch."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from pose_core.runtime.storage import Store

pytestmark = pytest.mark.integration

CLIPS, STEPS, CHECKPOINT_EVERY = 88, 40, 2
SETTINGS = (
    *("run.name=resumed", f"data.digits_clips={CLIPS}", "data.digits_heldout_clips=8", "data.digits_clips_per_tar=12"),
    *("data.clips_per_shard=8", "data.encoder_actors=1", "training.batch_per_worker=2", "training.sample_clips=1"),
    *(f"priming.steps={STEPS}", f"training.checkpoint_every_steps={CHECKPOINT_EVERY}", "training.log_clips=true"),
    *("tracking.log_every_steps=1", "alarms.every_steps=0", "evaluation.judge=", "evaluation.teacher_steps=1"),
    *("training.shuffle_shards=2", "training.shuffle_clips=5", "training.max_failures=0", "storage.uri=store"),
)


def train(command: list[str], folder: Path, environment: dict[str, str], until: int | None) -> None:
    """Run to the end, or until a checkpoint of step ``until`` or later is whole, and kill all that was started."""
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    reader = threading.Thread(target=(lines := []).extend, args=(process.stdout,))
    reader.start()
    while until and process.poll() is None:
        # The store is looked at, for steps of so small a model are done faster than lines are shown.
        whole = folder.glob("store/runs/resumed/stability_priming/checkpoints/step-*/manifest.json")
        if any(int(manifest.parent.name.split("-")[1]) >= until for manifest in whole):
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.01)
    process.wait()
    reader.join()
    assert process.returncode == (-signal.SIGKILL if until else 0), "".join(lines)


@pytest.mark.parametrize(("train_from", "workers"), [("prepared", (2, 1, 2)), ("raw", (1, 2))])
def test_each_clip_comes_once_an_epoch_although_workers_come_and_go(
    script: Callable[..., list[str]],
    environment: dict[str, str],
    tmp_path: Path,
    train_from: str,
    workers: tuple[int, ...],
) -> None:
    own = (*SETTINGS, f"data.train_from={train_from}")
    subprocess.run(script("prepare_data", *own), cwd=tmp_path, env=environment, check=True, capture_output=True)
    rng = random.Random(train_from)
    stops = [rng.randint(3, 8), rng.randint(14, 20)][: len(workers) - 1] + [None]
    for count, until in zip(workers, stops, strict=True):
        train(script("stability_priming", *own, f"training.workers={count}"), tmp_path, environment, until)
    phase = Store.open(str(tmp_path / "store/runs/resumed/stability_priming"))
    lines = [json.loads(line) for key in phase.list("clips") for line in phase.read_text(key).splitlines()]
    steps = {line["step"]: line["clips"] for line in lines}
    assert sorted(steps) == list(range(1, STEPS + 1))
    assert {len(clips) for clips in steps.values()} == {2, 4}  # one worker, and two
    seen = Counter(clip for step in sorted(steps) for clip in steps[step])
    assert max(seen.values()) == 1
    first_epoch = [clip for clip in seen if clip.startswith("0:")]
    assert len(first_epoch) == CLIPS and len(seen) > CLIPS
