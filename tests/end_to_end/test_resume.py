"""A phase whose driver is killed and that goes on with another number of workers trains on each clip once an epoch."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from pose_core.runtime.storage import Store

pytestmark = pytest.mark.integration

CLIPS, STEPS, CHECKPOINT_EVERY = 44, 18, 2
SETTINGS = (
    *("run.name=resumed", f"data.digits_clips={CLIPS}", "data.digits_heldout_clips=8", "data.digits_clips_per_tar=12"),
    *("data.clips_per_shard=8", "data.encoder_actors=1", "training.batch_per_worker=2", "training.sample_clips=1"),
    *(f"priming.steps={STEPS}", f"training.checkpoint_every_steps={CHECKPOINT_EVERY}", "training.log_clips=true"),
    *("tracking.log_every_steps=1", "alarms.every_steps=0", "evaluation.judge=", "evaluation.teacher_steps=1"),
    *("training.shuffle_shards=2", "training.shuffle_clips=5", "training.max_failures=0", "storage.uri=store"),
)


def train(command: list[str], folder: Path, environment: dict[str, str], until: int) -> int:
    """Run until step ``until`` has been said, then kill everything that the command started; its exit code."""
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    lines = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            words = line.split()
            if words[:1] == ["stability_priming"] and "/" in words[1] and int(words[1].split("/")[0]) >= until:
                os.killpg(process.pid, signal.SIGKILL)
    finally:
        process.wait()
    assert until <= STEPS or process.returncode == 0, "".join(lines)
    return process.returncode


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
    # A checkpoint is certain to be there once the next one but one is due.
    stops = [rng.randint(5, 6), rng.randint(13, 15)][: len(workers) - 1] + [STEPS + 1]
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
