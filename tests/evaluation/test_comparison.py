"""Means and intervals in numbers that a person can check, and a table that says no more than was measured."""

from __future__ import annotations

import pytest

from pose_core.evaluation.comparison import FIGURES, interval, markdown, summarise


def row(method: str, seed: int | None, table: str = "equal_updates", nfe: int | None = 1, **figures: float) -> dict:
    return {"table": table, "method": method, "nfe": nfe, "seed": seed} | dict.fromkeys(FIGURES) | figures


def test_the_interval_of_three_values_is_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    # t(97.5 %, 2 degrees of freedom) = 4.302653, standard error 1 / sqrt(3).
    assert (mean, half) == (2.0, pytest.approx(4.302653 / 3**0.5, rel=1e-6))


def test_equal_values_have_no_spread_and_one_value_has_no_interval() -> None:
    assert interval([5.0, 5.0, 5.0]) == (5.0, 0.0)
    assert interval([5.0]) == (5.0, None)


def test_seeds_are_averaged_and_methods_evaluations_and_tables_are_not() -> None:
    rows = [
        row("pose", 0, SA=80.0),
        row("pose", 1, SA=90.0),
        row("pose", 0, nfe=4, SA=95.0),
        row("pose", 0, table="equal_time", SA=10.0),
        row("lcm", 0, SA=40.0),
    ]
    found = {(entry["table"], entry["method"], entry["nfe"]): entry for entry in summarise(rows)}
    means = {key: entry["SA"]["mean"] for key, entry in found.items()}
    assert means == {
        ("equal_updates", "pose", 1): 85.0,
        ("equal_updates", "pose", 4): 95.0,
        ("equal_time", "pose", 1): 10.0,
        ("equal_updates", "lcm", 1): 40.0,
    }
    assert found["equal_updates", "pose", 1]["seeds"] == 2


def test_a_figure_that_one_seed_lacks_is_not_averaged_over_the_others() -> None:
    (entry,) = summarise([row("pose", 0, motion=0.5), row("pose", 1)])
    assert entry["motion"] is None


def test_the_tables_show_means_with_intervals_and_leave_empty_what_does_not_apply() -> None:
    rows = [row("real", None, nfe=None, SA=99.04), row("pose", 0, SA=80.0, updates=200), row("pose", 1, SA=81.0)]
    rows[2]["updates"] = 200
    rows.append(row("lcm", 0, table="equal_time", SA=50.0))
    text = markdown(summarise(rows))
    updates, time = text.split("## Equal CPU time")
    lines = [line.split("|")[1:-1] for line in updates.splitlines() if line.startswith("| ")]
    heading, real, pose = [[cell.strip() for cell in line] for line in lines]
    assert dict(zip(heading, real, strict=True)) | {"NFE": "", "SA": "99.0", "TC": "", "updates": ""} == dict(
        zip(heading, real, strict=True)
    )
    # Half of it is t(97.5 %, 1) * 0.5 = 12.706 * 0.5; a count that no seed changes has no interval.
    assert dict(zip(heading, pose, strict=True))["SA"] == "80.5 ± 6.4"
    assert dict(zip(heading, pose, strict=True))["updates"] == "200"
    assert dict(zip(heading, pose, strict=True))["seeds"] == "2"
    assert "lcm" not in updates
    assert "| lcm | 1 | 1 | 50.0 |" in time
