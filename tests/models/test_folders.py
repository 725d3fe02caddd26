"""A teacher's name: a folder of one's own, then what the project ships, then the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from pose_core.errors import CheckpointError
from pose_core.models import folders

HUB_NAME = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str | None, list[str] | None]]:
    """What the hub was asked for; it answers with a folder of its own."""
    requests: list[tuple[str, str | None, list[str] | None]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str] | None) -> str:
        requests.append((name, revision, allow_patterns))
        return str(tmp_path / "cache")

    monkeypatch.setattr(folders, "snapshot_download", download)
    return requests


def test_a_folder_in_the_working_folder_comes_first(
    asked: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = tmp_path / HUB_NAME
    own.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert folders.local_teacher(HUB_NAME, None) == own
    assert folders.local_teacher(HUB_NAME, None, weights=False) == own
    assert asked == []


def test_a_shipped_folder_is_named_relative_to_the_configs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert folders.find_folder("teachers/digits_judge") == folders.SHIPPED / "teachers" / "digits_judge"
    assert folders.find_folder("teachers/no_such") is None


def test_configs_of_a_published_model_need_no_hub(asked: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    folder = folders.local_teacher(HUB_NAME, None, weights=False)
    assert (folder / "transformer" / "config.json").is_file()
    assert asked == []


def test_weights_and_unknown_models_come_from_the_hub(
    asked: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert folders.local_teacher(HUB_NAME, "abc") == tmp_path / "cache"
    assert folders.local_teacher("someone/video", None, weights=False) == tmp_path / "cache"
    assert asked == [(HUB_NAME, "abc", None), ("someone/video", None, ["*.json", "*/*.json"])]


def test_an_unreachable_hub_is_one_line_that_the_caller_can_correct(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError("no\nroute")

    monkeypatch.setattr(folders, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=r"model\.teacher=someone/video .*no route") as caught:
        folders.local_teacher("someone/video", None)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
