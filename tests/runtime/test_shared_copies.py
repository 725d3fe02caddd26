"""A folder in a bucket is copied once for the processes that need it together, and is gone with the last of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pose_core.errors import StorageError
from pose_core.runtime import shared_copies
from pose_core.runtime.object_store import EmbeddedStore
from pose_core.runtime.shared_copies import shared_copy
from pose_core.runtime.storage import Store

FILES = {"transformer/config.json": b"{}", "transformer/weights": b"1" * 100_000}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(shared_copies, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with EmbeddedStore(tmp_path_factory.mktemp("pose") / "object_store") as running:
        yield Store.open(running.uri)


@pytest.fixture
def store(bucket: Store, request: pytest.FixtureRequest) -> Store:
    filled = bucket.child(request.node.name)
    for key, data in FILES.items():
        filled.write_bytes(key, data)
    return filled


@pytest.fixture
def downloads(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were copied to."""
    kind, done = type(store), []
    download = kind.download_folder
    monkeypatch.setattr(
        kind, "download_folder", lambda store, prefix, local: (done.append(local), download(store, prefix, local))
    )
    return done


def files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def left(cache: Path) -> list[str]:
    return [found.name for found in cache.iterdir() if found.suffix != ".lock"]


def test_a_folder_of_ones_own_is_used_where_it_is_and_stays(tmp_path: Path, cache: Path) -> None:
    own = Store.open(str(tmp_path / "own"))
    own.write_bytes("file", b"1")
    with shared_copy(own) as folder:
        assert folder == tmp_path / "own"
    assert files(folder) == {"file": b"1"} and not cache.exists()


@pytest.mark.integration
def test_those_inside_together_have_one_copy_and_the_last_removes_it(
    store: Store, cache: Path, downloads: list[Path]
) -> None:
    inside = threading.Barrier(3)
    found = []

    def use() -> None:
        with shared_copy(store) as folder:
            inside.wait(60)
            found.append(files(folder))

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [FILES] * 3 and len(downloads) == 1
    assert left(cache) == []


@pytest.mark.integration
def test_one_that_leaves_takes_nothing_from_others(store: Store, cache: Path, downloads: list[Path]) -> None:
    with shared_copy(store) as folder:
        with shared_copy(store) as same:
            assert same == folder
        assert files(folder) == FILES
    assert len(downloads) == 1 and left(cache) == []


@pytest.mark.integration
def test_what_one_that_was_killed_leaves_is_used_and_removed(store: Store, cache: Path, downloads: list[Path]) -> None:
    program = (
        "import sys, time; from pathlib import Path; from pose_core.runtime import shared_copies as s\n"
        "from pose_core.runtime.storage import Store\n"
        f"s.CACHE = Path({str(cache)!r})\n"
        f"with s.shared_copy(Store.open({store.uri!r})): print('inside', flush=True); time.sleep(600)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as other:
        assert other.stdout is not None and other.stdout.readline() == b"inside\n"
        os.kill(other.pid, signal.SIGKILL)
    assert len(left(cache)) == 1
    with shared_copy(store) as folder:
        assert files(folder) == FILES
    assert downloads == [] and left(cache) == []


@pytest.mark.integration
def test_half_a_copy_is_never_used_and_does_not_stay(store: Store, cache: Path, downloads: list[Path]) -> None:
    with shared_copy(store) as folder:
        pass
    half = folder.with_name(f".{folder.name}-0123.part")
    (half / "transformer").mkdir(parents=True)
    with shared_copy(store) as again:
        assert again == folder and files(again) == FILES
        assert left(cache) == [folder.name]
    assert len(downloads) == 2


@pytest.mark.integration
def test_another_users_folder_is_refused_in_one_line(
    store: Store, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(StorageError) as caught, shared_copy(store):
        pass
    assert str(caught.value) == f"{cache} belongs to another user; have it removed or set TMPDIR"


@pytest.mark.integration
def test_other_content_is_another_copy(store: Store) -> None:
    with shared_copy(store) as folder:
        store.write_bytes("transformer/weights", b"2")
        with shared_copy(store) as other:
            assert other != folder and (other / "transformer/weights").read_bytes() == b"2"
            assert files(folder) == FILES
