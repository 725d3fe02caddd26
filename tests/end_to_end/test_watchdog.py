"""A rank that hangs in a collective ends the attempt with the stacks of both in the log; the retry finishes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

HANGS_AFTER, STEPS, CHECKPOINT_EVERY = 7, 10, 4
SETTINGS = (
    *("run.name=hung", "data.digits_clips=16", "data.digits_heldout_clips=4", "data.digits_clips_per_tar=12"),
    *("data.clips_per_shard=8", "data.encoder_actors=1", "training.batch_per_worker=2", "training.sample_clips=1"),
    *(f"priming.steps={STEPS}", f"training.checkpoint_every_steps={CHECKPOINT_EVERY}", "evaluation.judge="),
    *("tracking.log_every_steps=1", "alarms.every_steps=0", "evaluation.teacher_steps=1", "training.max_failures=1"),
    *("training.shuffle_shards=2", "training.shuffle_clips=5", "storage.uri=store", "training.workers=2"),
    # Nothing slower than this is slow: only what never ends.
    *("training.slow_step_seconds=20", "training.longest_pause_seconds=300", "storage.retry_seconds=0"),
)


def test_a_hung_collective_ends_the_attempt_with_all_stacks_and_the_retry_finishes(
    script: Callable[..., list[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    subprocess.run(script("prepare_data", *SETTINGS), check=True, **run)  # type: ignore[call-overload]
    python, _, *settings = script("stability_priming", *SETTINGS, "tracking.profile_steps=[3,4]")
    hanging = [python, str(Path(__file__).with_name("hang_once.py")), "hung", str(HANGS_AFTER), *settings]
    ended = subprocess.run(hanging, **run)  # type: ignore[call-overload]
    assert (tmp_path / "hung").exists()
    assert ended.returncode == 0, ended.stdout + ended.stderr
    stacks = ended.stdout.split("\nrank ")[1:]
    told = {int(text[0]): text for text in stacks}
    assert sorted(told) == [0, 1]
    assert "time.sleep(3600)" in told[1] and "all_reduce" in told[0]
    assert len(re.findall("ended by the watchdog, rank [01]: ", ended.stdout)) == 2
    (resumed,) = re.findall(r"goes on from step (\d+)", ended.stdout)
    assert int(resumed) == HANGS_AFTER // CHECKPOINT_EVERY * CHECKPOINT_EVERY
    assert f"{STEPS}/{STEPS}" in ended.stdout
    assert sys.executable == python
    (trace,) = (tmp_path / "store/runs/hung/stability_priming/traces").iterdir()
    assert trace.name == "steps-0000003-0000004.json.gz"
