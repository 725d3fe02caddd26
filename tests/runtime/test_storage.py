"""The store as a person meets it: same keys on every kind, one-line errors, nothing half-written."""

from __future__ import annotations

import contextlib
import errno
import http.server
import os
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pyarrow.fs
import pytest
from botocore.exceptions import ClientError

from pose_core.errors import StorageError
from pose_core.runtime import local_files
from pose_core.runtime.raw_files import RawFiles
from pose_core.runtime.steady_files import SteadyFiles
from pose_core.runtime.storage import Store
from pose_core.runtime.storage_errors import explain


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An environment with S3 credentials and nothing else of AWS in it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-for-the-log")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    yield monkeypatch


def assert_one_line(error: StorageError, *words: str, exit_code: int) -> None:
    text = str(error)
    assert "\n" not in text and "not-for-the-log" not in text
    assert [word for word in words if word not in text] == []
    assert error.exit_code == exit_code


def test_objects_come_back_as_written_under_sorted_relative_keys(store: Store) -> None:
    store.write_bytes("runs/b/data", b"\x00\xff")
    store.write_json("runs/a/manifest.json", {"stage": "export", "seconds": 1.5})
    store.child("runs").write_bytes("c", "ü".encode())
    assert store.read_bytes("runs/b/data") == b"\x00\xff"
    assert store.read_json("runs/a/manifest.json") == {"stage": "export", "seconds": 1.5}
    assert store.read_text("runs/c") == "ü"
    assert store.list() == ["runs/a/manifest.json", "runs/b/data", "runs/c"]
    assert store.child("runs").list("a") == ["a/manifest.json"]
    assert Path(store.url("runs/b/data")).read_bytes() == b"\x00\xff"


def test_parts_are_read_of_the_object_that_was_listed(store: Store) -> None:
    store.write_bytes("a/film", b"0123456789")
    (listed,) = store.stored("a")
    assert (listed.key, listed.size) == ("a/film", 10) and store.stored() == [listed]
    files = RawFiles(SteadyFiles(store, 0))
    assert files.read(listed, 2, 3) == b"234" and files.read(listed, 8, 9) == b"89"
    assert files.read(listed, 10, 5) == b""
    store.write_bytes("a/film", b"9876543210")
    assert store.stored() != [listed]
    with pytest.raises(StorageError, match="a/film was replaced while it was read"):
        files.read(listed, 2, 3)


def test_a_raw_file_seeks_and_reads_like_any_other(store: Store) -> None:
    content = os.urandom(100_000)
    store.write_bytes("film", content)
    with RawFiles(SteadyFiles(store, 0)).open(store.stored()[0]) as file:
        assert file.read(10) == content[:10]
        file.seek(-5, os.SEEK_END)
        assert file.read() == content[-5:] and file.read() == b""
        file.seek(50_000)
        assert file.read(7) == content[50_000:50_007] and file.tell() == 50_007


def test_an_object_can_be_deleted_alone(store: Store) -> None:
    store.write_bytes("a/b", b"")
    store.write_bytes("a/b.json", b"")
    store.delete_prefix("a/b")
    assert store.list() == ["a/b.json"]


def test_only_objects_exist_not_their_folders(store: Store) -> None:
    assert store.list() == []
    store.write_bytes("a/b", b"")
    assert store.exists("a/b") and not store.exists("a") and not store.exists("a/c")


def test_delete_prefix_takes_the_folder_and_not_its_neighbour(store: Store) -> None:
    for key in ("run/x", "run/deep/y", "run-2/x"):
        store.write_bytes(key, b"1")
    store.delete_prefix("run")
    store.delete_prefix("never-written")
    assert store.list() == ["run-2/x"]
    with pytest.raises(StorageError, match="refusing to delete all"):
        store.delete_prefix("/")


def test_keys_cannot_leave_the_store(store: Store) -> None:
    with pytest.raises(StorageError, match=r"runs/\.\./\.\./secret"):
        store.write_bytes("runs/../../secret", b"")


def test_file_uris_and_plain_paths_name_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store.open("my%20data") != Store.open("my data")
    assert Store.open(f"file://{tmp_path}/my%20data") == Store.open("my data") == Store.open(str(tmp_path / "my data"))


@pytest.mark.parametrize("uri", ["gs://bucket/x", "s3://", "", "file://data"])
def test_unsupported_locations_are_refused_with_what_is_allowed(uri: str) -> None:
    with pytest.raises(StorageError) as caught:
        Store.open(uri)
    assert_one_line(caught.value, repr(uri), "s3://bucket/prefix", "folder", exit_code=2)


def test_a_store_travels_to_another_process_as_its_location_only(store: Store) -> None:
    store.write_bytes("k", b"1")
    assert pickle.loads(pickle.dumps(store)).read_bytes("k") == b"1"
    remote = Store.open("s3://bucket/prefix")
    assert pickle.loads(pickle.dumps(remote)) == remote
    assert vars(remote) == {"uri": "s3://bucket/prefix"}


def test_missing_and_broken_objects_are_named(store: Store) -> None:
    with pytest.raises(StorageError) as caught:
        store.read_bytes("runs/a/manifest.json")
    assert_one_line(caught.value, store.url("runs/a/manifest.json"), "does not exist", exit_code=1)
    for broken in (b'{"half": ', b"[1]", b"\xff"):
        store.write_bytes("broken.json", broken)
        with pytest.raises(StorageError) as caught:
            store.read_json("broken.json")
        assert_one_line(caught.value, store.url("broken.json"), "delete it", exit_code=1)


def test_check_leaves_no_trace(store: Store) -> None:
    store.check()
    assert store.list() == []


def test_a_full_disk_keeps_the_old_object_and_leaves_no_partial_file(
    store: Store, request: pytest.FixtureRequest
) -> None:
    store.write_bytes("k", b"old")
    request.getfixturevalue("full_disk")
    with pytest.raises(StorageError) as caught:
        store.write_bytes("k", b"new")
    assert_one_line(caught.value, store.url("k"), "no space left", exit_code=1)
    with pytest.raises(StorageError) as caught:
        store.check()
    assert_one_line(caught.value, store.uri, "no space left", exit_code=2)
    assert store.read_bytes("k") == b"old"
    assert [path.name for path in Path(store.uri).rglob("*")] == ["k"]


def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for uri in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError) as caught:
            Store.open(str(uri)).check()
        assert_one_line(caught.value, str(uri), "file where a folder is needed", exit_code=2)


def test_what_another_process_is_still_writing_is_not_listed(store: Store) -> None:
    store.write_bytes("done", b"1")
    local_files.partial_name(Path(store.url("next"))).write_bytes(b"ha")
    assert store.list() == ["done"]


def make_tree(folder: Path) -> dict[str, bytes]:
    files = {"config.json": b"{}", "sub/empty": b"", "sub/deep/wei ghts%20ü.bin": os.urandom(3 << 20)}
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return files


def read_tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folders_survive_the_round_trip_and_replace_an_older_download(store: Store, tmp_path: Path) -> None:
    files = make_tree(tmp_path / "model")
    store.upload_folder(tmp_path / "model", "runs/x/export")
    assert store.list("runs/x/export") == sorted(f"runs/x/export/{name}" for name in files)
    (tmp_path / "out" / "export").mkdir(parents=True)
    (tmp_path / "out" / "export" / "stale").write_text("from the last run")
    store.download_folder("runs/x/export", tmp_path / "out" / "export")
    assert read_tree(tmp_path / "out") == {f"export/{name}": data for name, data in files.items()}


def test_a_failed_download_leaves_what_was_there_and_nothing_half_written(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write_bytes("model/weights", b"new")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weights").write_bytes(b"old")

    def disk_fills_up(source: str, target: str, *_: object, **__: object) -> None:
        Path(target, "weights").write_bytes(b"ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pyarrow.fs, "copy_files", disk_fills_up)
    with pytest.raises(StorageError) as caught:
        store.download_folder("model", tmp_path / "out")
    assert_one_line(caught.value, str(tmp_path / "out"), "no space left", exit_code=1)
    assert read_tree(tmp_path) == {"store/model/weights": b"new", "out/weights": b"old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "store"]


def test_folders_that_are_not_there_are_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        store.download_folder("never/written", tmp_path / "out")
    assert_one_line(caught.value, store.url("never/written"), "does not exist", exit_code=1)
    assert not (tmp_path / "out").exists()
    with pytest.raises(StorageError, match="missing is not a folder"):
        store.upload_folder(tmp_path / "missing", "x")


@pytest.mark.parametrize(
    ("code", "words", "exit_code"),
    [
        ("NoSuchBucket", "does not exist", 2),
        ("InvalidAccessKeyId", "refused the credentials", 2),
        ("SignatureDoesNotMatch", "refused the credentials", 2),
        ("AccessDenied", "read and write", 2),
        ("PermanentRedirect", "AWS_REGION", 2),
        ("NoSuchKey", "does not exist", 1),
        ("InternalError", "full disk", 1),
    ],
)
def test_every_answer_of_s3_has_its_remedy_and_exit_code(code: str, words: str, exit_code: int) -> None:
    answer = ClientError({"Error": {"Code": code, "Message": "two\nlines"}}, "PutObject")
    assert_one_line(explain(answer, "s3://b/k"), "s3://b/k", words, exit_code=exit_code)


def test_credentials_and_endpoint_mistakes_are_named(s3: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bucket = Store.open("s3://bucket/prefix")
    s3.setenv("AWS_ENDPOINT_URL", "localhost:8333")
    with pytest.raises(StorageError) as caught:
        bucket.check()
    assert_one_line(caught.value, "AWS_ENDPOINT_URL", "'localhost:8333'", "http://host:port", exit_code=2)
    s3.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    for use in (bucket.check, bucket.list, lambda: bucket.download_folder("x", tmp_path / "x")):
        with pytest.raises(StorageError) as caught:
            use()
        assert_one_line(caught.value, "http://127.0.0.1:1", "s3://bucket/prefix", "AWS_ENDPOINT_URL", exit_code=2)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        s3.delenv(name)
    s3.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError) as caught:
        bucket.check()
    assert_one_line(caught.value, "no credentials", "AWS_ACCESS_KEY_ID", exit_code=2)


def test_pyarrow_goes_where_boto3_goes(s3: pytest.MonkeyPatch) -> None:
    s3.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:8333")
    s3.setenv("AWS_REGION", "eu-west-1")
    filesystem, root = Store.open("s3://bucket/prefix/").arrow()
    assert root == "bucket/prefix"
    assert filesystem.region == "eu-west-1"
    # It is sent to Ray workers, and each finds its own credentials.
    sent = pickle.dumps(filesystem)
    assert b"127.0.0.1:8333" in sent and b"not-for-the-log" not in sent


@pytest.mark.integration
def test_a_silent_endpoint_is_given_up(s3: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        s3.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(StorageError) as caught:
            Store.open("s3://bucket").check()
    assert_one_line(caught.value, "cannot reach", "s3://bucket", exit_code=2)


class FullS3(http.server.BaseHTTPRequestHandler):
    """Has every bucket and starts every upload, but cannot store a byte."""

    def answer(self, status: int, body: str = "") -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def do_HEAD(self) -> None:
        self.answer(200)

    def do_POST(self) -> None:
        self.answer(200, "<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>")

    def do_PUT(self) -> None:
        self.answer(200 if self.path.endswith("/") else 500, "<Error><Code>InternalError</Code></Error>")

    def log_message(self, *_: object) -> None:
        pass


class SlowS3(FullS3):
    """Takes its time for each object, as one does that has just started; notes what it was asked."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append("GET")
        self.answer(200, "<ListBucketResult></ListBucketResult>")

    def do_PUT(self) -> None:
        self.asked.append("PUT")
        time.sleep(5)
        self.answer(200)

    def do_DELETE(self) -> None:
        self.asked.append("DELETE")
        self.answer(204)


@contextlib.contextmanager
def serving(handler: type[FullS3], s3: pytest.MonkeyPatch) -> Iterator[None]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        s3.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.integration
def test_an_upload_that_the_store_did_not_take_is_an_error(s3: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_tree(tmp_path / "model")
    with serving(FullS3, s3):
        with pytest.raises(StorageError) as caught:
            Store.open("s3://bucket").upload_folder(tmp_path / "model", "export")
        assert_one_line(caught.value, "s3://bucket/export", "full disk", exit_code=1)
        # Ray Train uploads checkpoints by this call on our filesystem.
        filesystem, root = Store.open("s3://bucket").arrow()
        with pytest.raises(OSError):
            pyarrow.fs.copy_files(str(tmp_path / "model"), root, destination_filesystem=filesystem)


@pytest.mark.integration
def test_a_check_waits_for_a_slow_store_and_writes_once(s3: pytest.MonkeyPatch) -> None:
    s3.setattr("pose_core.runtime.storage._PROBE_SECONDS", 1)
    with serving(SlowS3, s3):
        Store.open("s3://bucket").check()
    assert SlowS3.asked == ["GET", "PUT", "DELETE"]
