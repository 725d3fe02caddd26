"""A node is lost in the middle of a phase and comes back: elastic training goes on without it, any other waits."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from ray._private.utils import get_num_cpus
from stage_runs import Ground

pytestmark = pytest.mark.integration

PHASE = "stability_priming"
CLIPS, STEPS, CHECKPOINT_EVERY, MORE_STEPS = 24, 60, 5, 150
RAY_LOOKS_AT_NODES_SECONDS = 20
CPUS = get_num_cpus()
SETTINGS = (
    *(f"data.digits_clips={CLIPS}", "data.digits_heldout_clips=8", "data.digits_clips_per_tar=16"),
    *("data.clips_per_shard=8", "data.encoder_actors=1", "evaluation.judge=", "evaluation.teacher_steps=1"),
    *(f"priming.steps={STEPS}", f"training.checkpoint_every_steps={CHECKPOINT_EVERY}", "alarms.every_steps=0"),
    *("training.batch_per_worker=1", "training.sample_clips=1", "training.sample_every_steps=1000"),
    *("training.shuffle_shards=2", "training.shuffle_clips=8", "training.log_clips=true", "training.max_failures=1"),
    # A node has room for one of the two.
    *("tracking.log_every_steps=1", f"training.cpus_per_worker={0.75 * CPUS}"),
)


class SecondNode:
    """A node beside the head, with as many CPUs, that can be lost and come back."""

    def __init__(self, environment: dict[str, str]):
        self._environment = environment
        self.start()

    def start(self) -> None:
        """Start it and wait until it has joined."""
        command = [sys.executable, str(Path(__file__).with_name("second_node.py")), str(CPUS)]
        self._process = subprocess.Popen(command, env=self._environment, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None and self._process.stdout.readline().strip()

    def lose(self) -> None:
        """Kill all that runs on it, at once."""
        for process in self._all():
            process.kill()
        self._process.wait()

    def kill_raylet(self) -> None:
        """Kill its raylet alone; the rest must find out, and end."""
        running = self._all()
        (raylet,) = [process for process in running if process.name() == "raylet"]
        raylet.kill()
        _, alive = psutil.wait_procs(running, timeout=60)
        assert alive == []

    def _all(self) -> list[psutil.Process]:
        own = psutil.Process(self._process.pid)
        return [own, *own.children(recursive=True)]


@pytest.fixture(scope="module")
def ground(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], script: Callable[..., list[str]]
) -> Iterator[Ground]:
    """Prepared data in a store, and the head of a Ray."""
    folder = tmp_path_factory.mktemp("nodes")
    with Ground.opened(folder, environment, script, STEPS, SETTINGS) as ground:
        ground.run("undisturbed", "prepare_data").end()
        yield ground


@pytest.fixture
def node(ground: Ground) -> Iterator[SecondNode]:
    """One that is there at the beginning of a test, and at its end."""
    node = SecondNode(ground.environment)
    yield node
    node.lose()


def test_elastic_training_goes_on_without_a_lost_node_and_grows_back(ground: Ground, node: SecondNode) -> None:
    ground.copy("elastic", ("prepare_data",))
    elastic = ("training.min_workers=1", "training.elastic_check_seconds=1", f"priming.steps={MORE_STEPS}")
    # Of a node that Ray has not seen it would know nothing: it would begin alone and grow before its first step.
    time.sleep(RAY_LOOKS_AT_NODES_SECONDS)
    attempt = ground.run("elastic", PHASE, *elastic)
    # Only here is its first checkpoint surely whole: the second waits for it.
    lost_at = attempt.until(2 * CHECKPOINT_EVERY + 1)
    node.lose()
    went_on_from = int(attempt.until_told("goes on from step").split()[-1])
    # Enlarged earlier it might have none of its own to go on from; its second is begun once the first is kept.
    attempt.until(went_on_from + 2 * CHECKPOINT_EVERY + 1)
    node.start()
    # It must not come to its end before Ray sees the node.
    with contextlib.suppress(psutil.NoSuchProcess):
        (alone,) = ground.workers()
        alone.suspend()
        time.sleep(RAY_LOOKS_AT_NODES_SECONDS)
        alone.resume()
    attempt.end()
    shrunk, grown = attempt.resumed_at()
    assert 0 < shrunk < grown < MORE_STEPS and shrunk >= lost_at - 2 * CHECKPOINT_EVERY
    clips = _clips(ground, "elastic")
    workers = {step: len(names) for step, names in clips.items()}
    assert workers == {step: 1 if shrunk < step <= grown else 2 for step in range(1, MORE_STEPS + 1)}
    seen = Counter(name for names in clips.values() for name in names)
    *epochs, last = Counter(int(name.split(":")[0]) for name in seen).items()
    assert max(seen.values()) == 1
    assert dict(epochs) == dict.fromkeys(range(last[0]), CLIPS) and last[0] > 0


def test_training_of_fixed_size_waits_for_a_lost_node_and_ends_with_the_same_bits(
    ground: Ground, node: SecondNode
) -> None:
    ground.run("undisturbed", PHASE).end()
    ground.copy("disturbed", ("prepare_data",))
    attempt = ground.run("disturbed", PHASE)
    attempt.until(2 * CHECKPOINT_EVERY)
    node.kill_raylet()
    node.start()
    attempt.end()
    assert len(attempt.resumed_at()) == 1
    assert ground.state("undisturbed", PHASE) == ground.state("disturbed", PHASE)


def _clips(ground: Ground, run: str) -> dict[int, list[str]]:
    """Which clips each step trained on, in the order of steps."""
    phase = ground.store.child(f"runs/{run}/{PHASE}")
    lines = [json.loads(line) for key in phase.list("clips") for line in phase.read_text(key).splitlines()]
    return {line["step"]: line["clips"] for line in sorted(lines, key=lambda line: line["step"])}
