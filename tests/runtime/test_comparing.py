"""Every row is the same bargain, what is done is not done again, and a failure or Ctrl-C leaves nothing behind."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from row_work import work

from pose_core import config
from pose_core.data.captions import HELDOUT
from pose_core.data.moving_digits import draw_clip, render
from pose_core.data.shards import parquet_bytes, to_table
from pose_core.errors import ConfigError
from pose_core.models.codec import WanCodec
from pose_core.runtime import comparing
from pose_core.runtime.compare_clips import has_clips, read_heldout, read_training, write_clips
from pose_core.runtime.compare_row import RowJob, run_row
from pose_core.runtime.comparing import METHODS, Wanted, choose_methods, method_settings, paced
from pose_core.runtime.datasets import NULL_TEXT, Prepared
from pose_core.runtime.row_processes import run_in_processes
from pose_core.runtime.storage import Store
from pose_core.settings import Settings

TINY = [
    "run.seed=3",
    "model.teacher={teacher}",
    "data.text_tokens=6",
    "training.workers=1",
    "training.batch_per_worker=2",
    "priming.steps=1",
    "equilibrium.steps=1",
    "equilibrium.feature_blocks=[0,1]",
    "evaluation.clips=2",
    "evaluation.teacher_steps=2",
    "evaluation.judge=",
]
PROMPTS = ["a seven moving up and left", "an eight moving down"] * 2


def tiny(teacher: Path, *more: str) -> Settings:
    return config.load("", [*(line.format(teacher=teacher) for line in TINY), *more])


@pytest.fixture(scope="module")
def clips(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of clips as ``prepare_data`` leaves them to a comparison: four of each split."""
    folder = tmp_path_factory.mktemp("comparison")
    codec = WanCodec.load(tiny_folder, 6)
    rng = np.random.default_rng(0)
    store, shards = Store.open(str(folder / "store")), {}
    for split in ("train", *HELDOUT):
        video = np.stack([render(draw_clip(rng)) for _ in PROMPTS])
        condition = codec.encode_condition(PROMPTS, video[:, 0], video.shape[1])
        columns = {"key": [f"{split}-{index}" for index in range(4)], "prompt": PROMPTS, "video": video}
        columns |= {"latents": codec.encode_video(video).numpy(), "text": condition.text.numpy()}
        columns |= {"image": condition.image.numpy(), "first_frame": condition.first_frame.numpy()}
        store.write_bytes(f"{split}/one.parquet", parquet_bytes(to_table(columns)))
        shards[f"{split}/one.parquet"] = len(PROMPTS)
    store.write_bytes(NULL_TEXT, parquet_bytes(to_table({"text": codec.encode_text([""]).numpy()})))
    write_clips(folder, Prepared(store, shards), "key")
    return folder


def job_of(method: str, settings: Settings, folder: Path, table: str = "updates", seed: int = 3) -> RowJob:
    return RowJob(method, table, method_settings(settings, method, seed), folder, "test", "key")


def test_every_method_gets_as_many_generator_updates_and_differs_in_nothing_but_itself() -> None:
    settings = config.load("", ["priming.steps=150", "equilibrium.steps=60"])
    changed = {}
    for method in METHODS:
        row = method_settings(settings, method, 7)
        assert row.run.seed == 7
        assert row.priming.steps + row.equilibrium.steps == 210
        flat, base = (flatten(each) for each in (row, settings))
        changed[method] = {name for name in flat if flat[name] != base[name]} - {"run.seed"}
    steps = {"priming.steps", "equilibrium.steps"}
    assert changed == {
        "real": set(),
        "teacher": set(),
        "pose": set(),
        "pose_no_priming": steps,
        "pose_priming_only": steps,
        "pose_frozen": {"equilibrium.backbone"},
        "pose_no_consistency": {"equilibrium.semantic_head", "equilibrium.conditional_sds_weight"},
        "dmd2": steps | {"method.name"},
        "lcm": steps | {"method.name"},
        "ladd": steps | {"method.name"},
        "apt": steps | {"method.name"},
    }
    apt = method_settings(settings, "apt", 0)
    assert (apt.priming.steps, apt.equilibrium.steps) == (158, 52)  # three quarters are consistency distillation


def test_rivals_are_told_times_of_their_own() -> None:
    times = {"consistency": 0.9, "adversarial": 0.8, "matching": 0.7}
    own = [f"rivals.{name}_conditioning_time={time}" for name, time in times.items()]
    settings = config.load("", ["method.conditioning_time=0.96", *own])
    told = {method: method_settings(settings, method, 0).method.conditioning_time for method in METHODS}
    rivals = {"lcm": 0.9, "apt": 0.9, "ladd": 0.8, "dmd2": 0.7}
    assert told == dict.fromkeys(METHODS, 0.96) | rivals


def flatten(settings: Settings) -> dict[str, object]:
    sections = settings.model_dump(mode="json").items()
    return {f"{section}.{name}": value for section, values in sections for name, value in values.items()}


def test_text_to_video_has_no_consistency_terms_to_leave_out() -> None:
    assert "pose_no_consistency" in choose_methods("i2v", ())
    assert "pose_no_consistency" not in choose_methods("t2v", ())
    assert choose_methods("i2v", ("lcm", "pose")) == ("pose", "lcm")


def test_a_misspelt_row_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(ConfigError, match="--only dmd3 .*did you mean dmd2") as refused:
        choose_methods("i2v", ("dmd3",))
    assert refused.value.exit_code == 2


def test_what_a_row_depends_on_makes_it_anew_and_nothing_else_does(tiny_folder: Path, tmp_path: Path) -> None:
    def keys(*overrides: str, **changes: object) -> tuple[str, str]:
        jobs = [job_of(method, tiny(tiny_folder, *overrides), tmp_path) for method in ("pose", "teacher")]
        jobs[1] = replace(jobs[1], table="reference")
        pose, teacher = (replace(job, **changes).key() for job in jobs)  # type: ignore[arg-type]
        return pose, teacher

    pose, teacher = keys()
    assert keys("tracking.experiment=other", "run.name=other") == (pose, teacher)
    longer = keys("priming.steps=2")
    assert longer[0] != pose and longer[1] == teacher
    for changed in (keys("evaluation.clips=3"), keys(data_key="other"), keys(split="validation")):
        assert changed[0] != pose and changed[1] != teacher
    assert keys(seconds={"priming": 1.0})[0] != pose


def test_clips_come_back_as_they_were_prepared(clips: Path) -> None:
    assert has_clips(clips, "key") and not has_clips(clips, "another")
    train, null_text = read_training(clips)
    assert (len(train.x_0), len(train.condition.text), null_text.shape[0]) == (4, 4, 1)
    heldout = read_heldout(clips, "test", 2)
    assert (len(heldout.videos), len(heldout.reference), heldout.prompts) == (2, 2, PROMPTS[:2])
    assert not np.array_equal(heldout.videos, heldout.reference)


def test_where_too_few_clips_are_left_the_generated_ones_are_the_reference(clips: Path) -> None:
    heldout = read_heldout(clips, "test", 4)
    assert np.array_equal(heldout.reference, heldout.videos)


def test_a_row_is_trained_once_and_scored_again_when_only_the_scoring_changed(clips: Path, tiny_folder: Path) -> None:
    job = job_of("pose", tiny(tiny_folder), clips)
    run_row(job, lambda share: None)
    result = job.read()
    assert result is not None
    assert [(row["nfe"], row["seed"], row["updates"]) for row in result["rows"]] == [(n, 3, 2) for n in (1, 2, 4)]
    assert all(row["cpu_seconds"] > 0 and row["diversity"] > 0 and row["SA"] is None for row in result["rows"])
    before = (job.trained / "training.json").stat().st_mtime_ns
    rescored = job_of("pose", tiny(tiny_folder, "evaluation.clips=3"), clips)
    assert rescored.read() is None
    run_row(rescored, lambda share: None)
    assert rescored.read() is not None
    assert (job.trained / "training.json").stat().st_mtime_ns == before


def test_the_teacher_has_a_row_for_many_steps_four_and_one_with_guidance_counted(
    clips: Path, tiny_folder: Path
) -> None:
    job = job_of("teacher", tiny(tiny_folder), clips, "reference")
    run_row(job, lambda share: None)
    rows = (job.read() or {})["rows"]
    assert [row["nfe"] for row in rows] == [4, 8, 1]
    assert [row["updates"] for row in rows] == [None, None, None]


def test_real_clips_show_the_given_first_frame_exactly(clips: Path, tiny_folder: Path) -> None:
    job = job_of("real", tiny(tiny_folder), clips, "reference")
    run_row(job, lambda share: None)
    (row,) = (job.read() or {})["rows"]
    assert (row["first_frame_psnr"], row["nfe"], row["seed"], row["diversity"]) == (60.0, None, None, None)


def test_one_job_failing_leaves_the_others_alone_and_says_why(tmp_path: Path) -> None:
    ended: dict[str, str | None] = {}
    jobs = {what: (what, str(tmp_path)) for what in ("refuses", "fine", "breaks", "killed", "fine too")}
    run_in_processes(work, jobs, parallel=2, on_progress=lambda shares: None, on_end=ended.__setitem__)
    assert ended["refuses"] == "no clips here: add some"
    assert "ValueError: a bug" in (ended["breaks"] or "") and "row_work.py" in (ended["breaks"] or "")
    assert "code -9" in (ended["killed"] or "")
    assert (ended["fine"], ended["fine too"]) == (None, None)
    assert (tmp_path / "fine").read_text() != (tmp_path / "fine too").read_text()


def test_an_interrupt_ends_the_processes(tmp_path: Path) -> None:
    def interrupt(shares: dict[str, float]) -> None:
        if list(shares.values()) == [0.5, 0.5]:
            raise KeyboardInterrupt

    jobs = {name: ("endless", str(tmp_path)) for name in ("one", "two")}
    with pytest.raises(KeyboardInterrupt):
        run_in_processes(work, jobs, parallel=2, on_progress=interrupt, on_end=lambda name, failure: None)
    assert multiprocessing.active_children() == []


def test_a_row_that_ends_by_time_has_the_steps_its_own_speed_gives_it() -> None:
    row = method_settings(config.load("", ["priming.steps=275", "equilibrium.steps=25"]), "apt", 0)
    assert (row.priming.steps, row.equilibrium.steps) == (225, 75)
    found = paced(row, {"priming": 90.0, "equilibrium": 0.5}, {"priming": 45.0, "equilibrium": 150.0})
    assert (found.priming.steps, found.equilibrium.steps) == (450, 1)
    assert found == row.model_copy(update={"priming": found.priming, "equilibrium": found.equilibrium})
    assert paced(row, {"priming": 1.0, "equilibrium": 1.0}, {"priming": 1.0, "equilibrium": 1.0}) == row


@pytest.mark.integration
def test_two_tables_are_made_in_processes_and_a_second_call_makes_nothing(
    clips: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(comparing, "data_key", lambda settings: "key")
    (tmp_path / ".pose" / "compare").mkdir(parents=True)
    (tmp_path / ".pose" / "compare" / "tiny").symlink_to(clips)
    wanted = Wanted("tiny", 1, ("real", "lcm", "pose"), ("updates", "time"), "test", 2, tmp_path / "out")

    def compare() -> dict:
        with comparing.open_comparison(tiny(tiny_folder), wanted) as comparison:
            comparison.prepare_clips()
            for table in wanted.tables:
                comparison.make_rows(table)
            comparison.report()
        return json.loads((tmp_path / "out" / "tiny.json").read_text())

    first = compare()
    rows = {(row["table"], row["method"], row["nfe"]): row for row in first["rows"]}
    assert rows["equal_updates", "lcm", 1]["updates"] == rows["equal_updates", "pose", 1]["updates"] == 2
    assert rows["equal_time", "lcm", 1]["cpu_seconds"] >= rows["equal_time", "pose", 1]["cpu_seconds"]
    assert rows["equal_time", "pose", 4]["motion"] == rows["equal_updates", "pose", 4]["motion"]
    assert ("equal_time", "real", None) in rows
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "tiny.json",
        "tiny.md",
        "tiny.png",
        "tiny-curves.png",
    }

    def not_again(*_: object, **__: object) -> None:
        raise AssertionError("a finished row was made again")

    monkeypatch.setattr(comparing, "run_row", not_again)
    assert compare()["rows"] == first["rows"]
