"""VBench-I2V's prompts, what is missing and where it goes, seeds and sizes, and the table beside the paper's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from pose_core.errors import DataError
from pose_core.evaluation import vbench
from pose_core.result_settings import VbenchSettings

SUBJECT, BACKGROUND = ("i2v_subject", "temporal_flickering"), ("i2v_background", "temporal_flickering")


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    entries = [("a cat", "a cat.jpg", SUBJECT), ("a dog", "a dog.jpg", SUBJECT), ("a hill", "a hill.jpg", BACKGROUND)]
    entries.append(("a hill, camera pans left", "a hill.jpg", ("camera_motion",)))
    raw = [{"prompt_en": p, "image_name": i, "dimension": list(d), "image_type": "x"} for p, i, d in entries]
    (tmp_path / vbench.INFO).write_text(json.dumps(raw))
    return tmp_path


def prompts(folder: Path, dimensions: list[str], most: int = 0) -> list[str]:
    return [entry.prompt for entry in vbench.read_suite(folder, dimensions, most)]


def test_the_prompts_are_those_that_the_dimensions_look_at_each_once(suite: Path) -> None:
    assert prompts(suite, ["i2v_subject"]) == ["a cat", "a dog"]
    assert prompts(suite, ["temporal_flickering", "i2v_background"]) == ["a cat", "a dog", "a hill"]
    assert prompts(suite, ["camera_motion"]) == ["a hill, camera pans left"]
    assert prompts(suite, ["i2v_subject", "i2v_background"], most=1) == ["a cat", "a hill"]


def test_a_suite_that_is_not_there_or_is_none_says_where_it_is_had(suite: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="clone https://github.com/Vchitect/VBench") as caught:
        vbench.read_suite(tmp_path / "nowhere", ["i2v_subject"], 0)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no prompt for dynamic_degree"):
        vbench.read_suite(suite, ["dynamic_degree"], 0)
    (suite / vbench.INFO).write_text('[{"prompt": 3}]')
    with pytest.raises(DataError, match="not VBench-I2V's list"):
        vbench.read_suite(suite, ["i2v_subject"], 0)


def test_missing_images_are_counted_with_place_source_and_licence(suite: Path) -> None:
    entries = vbench.read_suite(suite, ["temporal_flickering"], 0)
    for ratio, names in (("1-1", ("a cat.jpg", "a dog.jpg", "a hill.jpg")), ("16-9", ("a cat.jpg",))):
        place = suite / vbench.CROPS / ratio
        place.mkdir(parents=True)
        for name in names:
            (place / name).touch()
    (line,) = vbench.missing_images(suite, ["1-1", "16-9"], entries)
    assert line.startswith(f"{suite / vbench.CROPS / '16-9'}: 2 of 3 images, e.g. a dog.jpg")
    assert "download_data.sh" in line and "Pexels" in line


def test_every_dimension_says_what_it_needs_where_it_goes_and_the_licence(tmp_path: Path) -> None:
    assert set(vbench.NEEDED) == set(VbenchSettings().dimensions)
    assert vbench.missing_weights(tmp_path, ["temporal_flickering"]) == []
    for dimension in set(vbench.NEEDED) - {"temporal_flickering"}:
        lines = vbench.missing_weights(tmp_path, [dimension])
        assert len(lines) == len(vbench.NEEDED[dimension]) > 0
        for line, weights in zip(lines, vbench.NEEDED[dimension], strict=True):
            assert line == f"{tmp_path / weights.path} for {dimension} ({weights.source}; {weights.licence})"
            assert "https://" in weights.source and weights.licence


def test_what_is_there_is_not_missing_and_has_a_checksum(tmp_path: Path) -> None:
    (weights,) = vbench.NEEDED["dynamic_degree"]
    file = tmp_path / weights.path
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    assert vbench.missing_weights(tmp_path, ["dynamic_degree"]) == []
    assert vbench.checksums(tmp_path, vbench.NEEDED) == {weights.path: hashlib.sha256(b"weights").hexdigest()}


def test_seeds_repeat_and_differ_in_all_that_they_are_made_from() -> None:
    seeds = [
        vbench.seed_of(run, prompt, ratio, index)
        for run in (0, 1)
        for prompt in ("a cat", "a dog")
        for ratio in ("1-1", "16-9")
        for index in range(5)
    ]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**32 for seed in seeds)
    assert vbench.seed_of(0, "a cat", "1-1", 0) == seeds[0]


@pytest.mark.parametrize("ratio", ["1-1", "8-5", "7-4", "16-9"])
def test_sizes_have_the_pixels_the_ratio_and_the_models_step(ratio: str) -> None:
    height, width = vbench.size_of(ratio, 480 * 832, 16)
    wide, high = map(int, ratio.split("-"))
    assert height % 16 == width % 16 == 0
    assert width / height == pytest.approx(wide / high, rel=0.03)
    assert height * width == pytest.approx(480 * 832, rel=0.05)


def test_the_table_has_ours_in_per_cent_the_papers_and_the_differences() -> None:
    text = vbench.table({"generator_1_nfe, 1-1": {"i2v_subject": 0.91234}}, ["Ours is small."])
    assert "| generator_1_nfe, 1-1 | 91.23 |" in text
    assert "| POSE, 1 NFE | 91.54 | 79.56 | 68.66 |" in text
    assert text.endswith("* Ours is small.\n")
