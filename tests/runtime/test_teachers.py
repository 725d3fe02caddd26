"""A teacher in a bucket: its configs first, its files once a machine, and one line about what is missing."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pose_core.errors import CheckpointError
from pose_core.models import wan
from pose_core.runtime import teachers
from pose_core.runtime.object_store import EmbeddedStore
from pose_core.runtime.storage import Store
from pose_core.runtime.teachers import teacher_configs, teacher_folder
from pose_core.settings import ModelSettings


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(teachers, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    with EmbeddedStore(tmp_path_factory.mktemp("pose") / "object_store") as running:
        yield running


def bucket(server: EmbeddedStore, folder: Path, name: str) -> ModelSettings:
    Store.open(server.uri).upload_folder(folder, name)
    return ModelSettings(teacher=f"{server.uri}/{name}")


def files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_folder_of_ones_own_is_used_where_it_is(tiny_folder: Path, cache: Path) -> None:
    model = ModelSettings(teacher=str(tiny_folder))
    assert teacher_folder(model) == teacher_configs(model) == tiny_folder
    assert not cache.exists()


@pytest.mark.integration
def test_a_bucket_is_copied_once_whichever_process_asks_first(
    server: EmbeddedStore, tiny_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bucket(server, tiny_folder, "whole")
    kind, downloads = type(Store.open(model.teacher)), []
    download = kind.download_folder
    monkeypatch.setattr(
        kind, "download_folder", lambda store, prefix, local: (downloads.append(local), download(store, prefix, local))
    )
    threads = [threading.Thread(target=teacher_folder, args=(model,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folder = teacher_folder(model)
    assert files(folder) == files(tiny_folder)
    assert downloads == [folder] and folder.parent == cache
    assert wan.load(folder).width == 32


@pytest.mark.integration
def test_configs_are_had_without_weights_and_a_new_version_is_another_folder(
    server: EmbeddedStore, tiny_folder: Path, tmp_path: Path
) -> None:
    model = bucket(server, tiny_folder, "versions")
    first = teacher_configs(model)
    assert files(first).keys() == {name for name in files(tiny_folder) if name.endswith(".json")}
    changed = Path(shutil.copytree(tiny_folder, tmp_path / "changed"))
    (changed / "model_index.json").write_text((tiny_folder / "model_index.json").read_text() + "\n")
    assert teacher_configs(bucket(server, changed, "versions")) != first


@pytest.mark.integration
def test_what_a_bucket_lacks_is_named(server: EmbeddedStore, tiny_folder: Path, tmp_path: Path) -> None:
    spoiled = Path(shutil.copytree(tiny_folder, tmp_path / "spoiled"))
    (spoiled / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    model = bucket(server, spoiled, "partial")
    refused(model, f"{model.teacher} has no transformer/*.safetensors")
    refused(ModelSettings(teacher=f"{server.uri}/nothing-here"), "holds no file")


def refused(model: ModelSettings, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        teacher_configs(model)
    assert words in str(caught.value) and caught.value.exit_code == 2 and "\n" not in str(caught.value)
