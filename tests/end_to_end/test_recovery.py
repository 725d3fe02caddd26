"""Whatever is killed, and whenever: a phase ends with the weights that it would have ended with undisturbed.

Here a few kills are tried; ``pytest tests/end_to_end/test_recovery.py --kills 10`` tries ten of each kind and phase.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
from stage_runs import Ground

pytestmark = pytest.mark.integration

STEPS, CHECKPOINT_EVERY, WORKERS = 60, 4, 2
PHASES = ("stability_priming", "adversarial_equilibrium")
KINDS = ("worker", "job")
FEW = (("worker", PHASES[0], 0), ("job", PHASES[1], 0))
SETTINGS = (
    *("data.digits_clips=32", "data.digits_heldout_clips=8", "data.digits_clips_per_tar=16", "data.clips_per_shard=8"),
    *("data.encoder_actors=1", "training.batch_per_worker=1", "training.sample_clips=1", "evaluation.judge="),
    *(f"priming.steps={STEPS}", f"equilibrium.steps={STEPS}", f"training.checkpoint_every_steps={CHECKPOINT_EVERY}"),
    *("tracking.log_every_steps=1", "alarms.every_steps=0", "evaluation.teacher_steps=1"),
    *("training.shuffle_shards=2", "training.shuffle_clips=8", "training.log_clips=true"),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kill" in metafunc.fixturenames:
        many = metafunc.config.getoption("--kills")
        every = [(kind, phase, seed) for phase in PHASES for kind in KINDS for seed in range(many)]
        metafunc.parametrize("kill", every if many else FEW, ids=lambda kill: "-".join(map(str, kill)))


@pytest.fixture(scope="module")
def ground(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], script: Callable[..., list[str]]
) -> Iterator[Ground]:
    """An undisturbed run of both phases, on a store and a Ray that stay."""
    folder = tmp_path_factory.mktemp("recovery")
    with Ground.opened(folder, environment, script, STEPS, SETTINGS) as ground:
        for stage in ("prepare_data", *PHASES):
            ground.run("undisturbed", stage).end()
        yield ground


def test_a_killed_phase_ends_with_the_same_bits(ground: Ground, kill: tuple[str, str, int]) -> None:
    kind, phase, seed = kill
    name, rng = "-".join(map(str, kill)).replace("_", "-"), random.Random(f"{kill}")
    ground.copy(name, ("prepare_data", *PHASES[: PHASES.index(phase)]))
    attempt = ground.run(name, phase)
    # A step is shown a second late, and the kill comes up to another one later: there must still be something to kill.
    killed_at = attempt.until(rng.randrange(1, STEPS // 2))
    time.sleep(rng.uniform(0, 1))
    if kind == "worker":
        rng.choice(ground.workers()[-WORKERS:]).kill()
        attempt.end()
        print(f"{name}: killed at step {killed_at}, went on from {attempt.resumed_at()}")
    else:
        attempt.process.kill()
        assert attempt.process.wait() == -signal.SIGKILL  # it had not ended before
        attempt = ground.run(name, phase)
        attempt.end()
        print(f"{name}: killed at step {killed_at}, the same command went on from {attempt.resumed_at()}")
    undisturbed, disturbed = ground.state("undisturbed", phase), ground.state(name, phase)
    assert undisturbed.keys() == disturbed.keys()
    assert [key for key in undisturbed if undisturbed[key] != disturbed[key]] == []


def test_a_worker_that_gets_sigterm_stores_its_step_before_it_ends(ground: Ground) -> None:
    """As a cloud does some seconds before it takes a machine back; no step is lost."""
    phase = PHASES[0]
    ground.copy("preempted", ("prepare_data",))
    # Without checkpoints but the last, what it goes on from can only be what the notice made.
    attempt = ground.run("preempted", phase, f"training.checkpoint_every_steps={STEPS}")
    attempt.until(5)
    ground.workers()[-1].send_signal(signal.SIGTERM)
    attempt.end()
    (stored,) = [int(line.split()[-3]) for line in attempt.lines if "is about to be taken away" in line]
    assert attempt.resumed_at() == [stored] and 5 <= stored < STEPS
    assert ground.state("undisturbed", phase) == ground.state("preempted", phase)


def test_a_store_that_is_away_during_an_upload_changes_nothing(ground: Ground) -> None:
    """It answers nothing for some seconds, in the middle of several checkpoints."""
    phase = PHASES[0]
    ground.copy("away", ("prepare_data",))
    attempt = ground.run("away", phase)
    attempt.until(CHECKPOINT_EVERY - 1)
    (server,) = [
        process
        for process in psutil.Process(os.getpid()).children(recursive=True)
        if "weed" in process.name() and str(ground.folder) in process.cwd()
    ]
    server.suspend()
    time.sleep(10)
    server.resume()
    attempt.end()
    assert attempt.resumed_at() == []
    assert ground.state("undisturbed", phase) == ground.state("away", phase)
