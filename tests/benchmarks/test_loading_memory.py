"""The loading benchmark measures two ranks and finds their shards to be the files'."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "loading_memory.py"


def test_two_ranks_hold_half_each_and_what_the_files_say() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--layers", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {row["figure"]: row["value"] for row in map(json.loads, done.stdout.splitlines())}
    assert rows["differing_weights"] == 0
    assert rows["libraries_a_rank"] > 100
    assert 0.4 * rows["folder_size"] < rows["loading_alone_a_rank"] < 0.6 * rows["folder_size"] + 100
