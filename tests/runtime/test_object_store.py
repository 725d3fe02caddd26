"""The embedded SeaweedFS, for real: it keeps data and secrets, refuses strangers and never outlives us."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pose_core.errors import StorageError
from pose_core.runtime import object_store
from pose_core.runtime.object_store import EmbeddedStore
from pose_core.runtime.raw_files import RawFiles
from pose_core.runtime.steady_files import SteadyFiles
from pose_core.runtime.storage import Store

integration = pytest.mark.integration


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    with EmbeddedStore(tmp_path_factory.mktemp("pose") / "object_store") as running:
        yield running


@pytest.fixture
def store(server: EmbeddedStore, request: pytest.FixtureRequest) -> Store:
    return Store.open(server.uri).child(request.node.name)


def refusal(store: Store) -> StorageError:
    with pytest.raises(StorageError) as caught:
        store.check()
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    return caught.value


def is_alive(process_id: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return "State:\tZ" not in Path(f"/proc/{process_id}/status").read_text()
    return False


def secrets_of(folder: Path) -> list[str]:
    lines = (folder / "credentials").read_text().splitlines()
    return [line.split(" = ")[1] for line in lines if " = " in line]


@integration
def test_more_keys_than_one_page_are_listed_and_deleted(store: Store) -> None:
    filesystem, root = store.arrow()
    keys = [f"many/{index:04}" for index in range(1003)]
    for key in keys:
        with filesystem.open_output_stream(f"{root}/{key}") as stream:
            stream.write(key.encode())
    store.write_bytes("many-more", b"1")
    assert store.list() == ["many-more", *keys]
    assert store.read_text("many/1002") == "many/1002"
    store.delete_prefix("many")
    assert store.list() == ["many-more"]


@integration
def test_objects_exist_and_folders_do_not(store: Store) -> None:
    store.check()
    store.write_json("a/b", {"x": 1})
    assert store.read_json("a/b") == {"x": 1}
    assert store.exists("a/b") and not store.exists("a") and not store.exists("c")
    with pytest.raises(StorageError, match="a/c does not exist") as caught:
        store.read_bytes("a/c")
    assert caught.value.exit_code == 1


@integration
def test_parts_are_read_of_the_object_that_was_listed(store: Store) -> None:
    content = random.Random(1).randbytes(9 << 20)
    store.write_bytes("parts/film", content)
    (listed,) = store.stored("parts")
    assert (listed.key, listed.size) == ("parts/film", len(content))
    files = RawFiles(SteadyFiles(store, 20))
    assert files.read(listed, len(content) - 3, 10) == content[-3:]
    with files.open(listed) as file:
        file.seek(1000)
        assert file.read() == content[1000:]
    store.write_bytes("parts/film", content[::-1])
    with pytest.raises(StorageError, match="parts/film was replaced while it was read"):
        files.read(listed, 0, 10)
    store.delete_prefix("parts/film")
    assert store.stored("parts") == []


@integration
def test_folders_survive_the_round_trip(store: Store, tmp_path: Path) -> None:
    files = {"weights.bin": random.Random(0).randbytes(25 << 20), "sub/empty": b"", "sub/wei ght%20ü": b"1"}
    files |= {f"shards/{index}": bytes([index]) for index in range(40)}
    for name, data in files.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes(data)
    store.upload_folder(tmp_path / "model", "export")
    assert store.list() == sorted(f"export/{name}" for name in files)
    store.download_folder("export", tmp_path / "back")
    back = tmp_path / "back"
    assert {path.relative_to(back).as_posix(): path.read_bytes() for path in back.rglob("*") if path.is_file()} == files
    with pytest.raises(StorageError, match="never does not exist"):
        store.download_folder("never", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "model"]


@integration
@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_keys_are_refused(server: EmbeddedStore, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    access, secret = secrets_of(server.folder)
    for name, value in {"AWS_ACCESS_KEY_ID": access, "AWS_SECRET_ACCESS_KEY": secret, wrong: "wrong"}.items():
        monkeypatch.setenv(name, value)
    message = str(refusal(Store.open(server.uri)))
    assert "refused the credentials" in message and secret not in message
    with pytest.raises(StorageError, match="credentials") as caught:
        Store.open(server.uri).upload_folder(Path(__file__).parent, "x")
    assert caught.value.exit_code == 2


@integration
def test_a_missing_bucket_is_named_and_not_created(server: EmbeddedStore, tmp_path: Path) -> None:
    missing = Store.open("s3://tpyo/runs")
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert "s3://tpyo/runs" in str(refusal(missing)) and "create it" in str(refusal(missing))
        with pytest.raises(StorageError, match="s3://tpyo/runs/x does not exist"):
            missing.upload_folder(tmp_path, "x")


@integration
def test_another_process_needs_only_the_environment_and_the_pickled_store(server: EmbeddedStore, store: Store) -> None:
    store.write_bytes("k", b"from the driver")
    read = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read()).read_text('k'))"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment = clean | {"AWS_ACCESS_KEY_ID": "mine", "AWS_PROFILE": "mine"} | server.environment
    sent = pickle.dumps(store)
    done = subprocess.run([sys.executable, "-c", read], input=sent, env=environment, capture_output=True, check=True)
    assert done.stdout == b"from the driver\n"


@integration
def test_secrets_stay_in_files_that_only_the_user_can_read(server: EmbeddedStore, store: Store) -> None:
    store.check()
    assert stat.S_IMODE(server.folder.stat().st_mode) == 0o700
    for name in ("credentials", "s3.json"):
        assert stat.S_IMODE((server.folder / name).stat().st_mode) == 0o600
    process = Path(f"/proc/{server.process_id}")
    seen = [server.log_file.read_text(), str(server.environment), str(vars(server))]
    seen += [(process / name).read_text() for name in ("cmdline", "environ")]
    secrets = secrets_of(server.folder)
    assert len(secrets) == 2
    assert [secret for secret in secrets for text in seen if secret in text] == []
    # Ctrl-C in the terminal goes to our session only.
    assert os.getsid(server.process_id) != os.getsid(0)


@integration
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has batch work")
def test_its_timers_interrupt_nobody_who_trains(server: EmbeddedStore) -> None:
    threads = [int(task.name) for task in Path(f"/proc/{server.process_id}/task").iterdir()]
    assert {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_BATCH}


@integration
def test_only_this_machine_is_listened_to(server: EmbeddedStore) -> None:
    files = Path(f"/proc/{server.process_id}/fd").iterdir()
    mine = {os.readlink(file) for file in files if file.exists() or file.is_symlink()}
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
                addresses.add(fields[1].split(":")[0])
    assert addresses == {"0100007F"}


@integration
def test_one_run_at_a_time_uses_a_folder(server: EmbeddedStore) -> None:
    with pytest.raises(StorageError) as caught, EmbeddedStore(server.folder):
        pass
    message = str(caught.value)
    assert str(server.folder) in message and f"process {os.getpid()}" in message and "storage.uri" in message
    assert caught.value.exit_code == 2
    Store.open(server.uri).check()


@integration
def test_a_restart_finds_data_and_credentials_and_ctrl_c_stops_the_server(tmp_path: Path) -> None:
    before = dict(os.environ)
    with pytest.raises(KeyboardInterrupt), EmbeddedStore(tmp_path, bucket="mine") as server:
        first, secrets = server.process_id, secrets_of(tmp_path)
        Store.open(server.uri).write_bytes("large", b"x" * (9 << 20))
        Store.open("s3://mine").write_bytes("runs/manifest.json", b"{}")
        raise KeyboardInterrupt
    assert not is_alive(first) and dict(os.environ) == before
    assert list(Path("/tmp").glob(f"seaweedfs-*-grpc-*{server.environment['AWS_ENDPOINT_URL'][-4:]}.sock")) == []
    with EmbeddedStore(tmp_path, bucket="mine"):
        assert secrets_of(tmp_path) == secrets
        assert Store.open("s3://mine").list() == ["large", "runs/manifest.json"]
        assert Store.open("s3://mine").read_bytes("large") == b"x" * (9 << 20)


@integration
def test_the_server_dies_with_a_killed_parent_and_the_folder_is_free_again(tmp_path: Path) -> None:
    script = f"""if True:
        import time
        from pathlib import Path
        from pose_core.runtime.object_store import EmbeddedStore
        with EmbeddedStore(Path({str(tmp_path)!r})) as server:
            print(server.process_id, server.environment["AWS_ENDPOINT_URL"][-5:], flush=True)
            time.sleep(600)
    """
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    server_id, s3_port = map(int, parent.stdout.readline().split())
    assert is_alive(server_id)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 30
    while is_alive(server_id) and time.monotonic() < deadline:
        time.sleep(0.05)
    object_store._remove_sockets(s3_port - 3)
    assert not is_alive(server_id)
    with EmbeddedStore(tmp_path) as server:
        Store.open(server.uri).check()


@integration
def test_a_server_that_cannot_start_names_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(object_store, "_free_ports", lambda: taken.getsockname()[1])
        with pytest.raises(StorageError) as caught, EmbeddedStore(tmp_path):
            pass
    assert str(tmp_path / "weed.log") in str(caught.value) and "\n" not in str(caught.value)


def test_a_full_disk_is_noticed_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_FREE_MEBIBYTES", 1 << 40)
    with pytest.raises(StorageError, match="disk full") as caught, EmbeddedStore(tmp_path / "store"):
        pass
    assert str(tmp_path / "store") in str(caught.value) and caught.value.exit_code == 2


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as caught, EmbeddedStore(tmp_path / "file"):
        pass
    assert str(tmp_path / "file") in str(caught.value) and "storage.uri" in str(caught.value)
    assert caught.value.exit_code == 2
