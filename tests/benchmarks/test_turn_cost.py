"""The cost benchmark prints a figure a turn and one a way to hold the generator, and they order as they must."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "turn_cost.py"
TURNS = {"turn_fake", "turn_priming_generator", "turn_discriminator", "turn_equilibrium_generator"}


def test_it_prints_every_turn_and_every_way_to_hold_the_generator() -> None:
    command = [sys.executable, SCRIPT, "--heads", "1", "--layers", "2", "--batch", "4", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {row["figure"]: row for row in map(json.loads, done.stdout.splitlines())}
    ways = {
        f"bytes_per_parameter_{phase}_{way}"
        for phase in ("priming", "equilibrium")
        for way in ("full", "lora", "one_base")
    }
    assert rows.keys() == TURNS | ways
    assert all(row["value"] > 0 for row in rows.values())
    for phase in ("priming", "equilibrium"):
        full, lora, one_base = (rows[f"bytes_per_parameter_{phase}_{way}"] for way in ("full", "lora", "one_base"))
        # float32 generator with gradient and two moments, average and teacher: 24 bytes, and the light parts.
        assert 24 < full["value"] < 25
        # Two bfloat16 bases, or one, and adapters.
        assert 4 < lora["value"] < 4.6
        assert 2 < one_base["value"] <= one_base["bar"] == 2.5
