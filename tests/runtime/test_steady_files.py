"""Reads that outlast trouble: a real SeaweedFS behind a proxy that does what networks and stores do on bad days."""

from __future__ import annotations

import http.client
import http.server
import itertools
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from pose_core.data.order import Order, Position
from pose_core.data.shards import parquet_bytes, to_table
from pose_core.errors import DataError, ReplacedError, StorageError, StorageGoneError
from pose_core.runtime import pieces, s3_client, steady_files
from pose_core.runtime.batches import Batches
from pose_core.runtime.object_store import EmbeddedStore
from pose_core.runtime.prepared_chunks import PreparedChunks
from pose_core.runtime.steady_files import SteadyFiles
from pose_core.runtime.storage import Store

pytestmark = pytest.mark.integration

CONTENT = random.Random(0).randbytes(3 << 20)
Handler = http.server.BaseHTTPRequestHandler


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to ``endpoint``; the next ones get what ``faults`` do instead."""

    daemon_threads = True

    def __init__(self, endpoint: str):
        self.target, self.faults, self.requests = urlsplit(endpoint).netloc, list[Callable[[Handler], None]](), 0
        self.on_request: Callable[[int], None] = lambda number: None
        super().__init__(("127.0.0.1", 0), _Forward)


class _Forward(Handler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_GET(self) -> None:
        self.server.requests += 1
        self.server.on_request(self.server.requests)
        if self.server.faults:
            self.close_connection = True
            return self.server.faults.pop(0)(self)
        status, headers, body = forwarded(self)
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "server", "date"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def forwarded(request: Handler) -> tuple[int, list[tuple[str, str]], bytes]:
    connection = http.client.HTTPConnection(request.server.target, timeout=20)  # type: ignore[attr-defined]
    connection.putrequest("GET", request.path, skip_host=True, skip_accept_encoding=True)
    for name, value in request.headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.getheaders(), body


def refuse(status: int, code: str) -> Callable[[Handler], None]:
    def fault(request: Handler) -> None:
        body = f"<Error><Code>{code}</Code><Message>for a test</Message></Error>".encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    return fault


def send_part(request: Handler, then: Callable[[], None] = lambda: None) -> None:
    """Begin a right answer, and stop in the middle."""
    status, headers, body = forwarded(request)
    request.send_response(status)
    for name, value in headers:
        if name.lower() in ("content-length", "content-range", "etag"):
            request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body[: len(body) // 2])
    request.wfile.flush()
    then()


def stall(request: Handler) -> None:
    send_part(request, lambda: time.sleep(3))


def hang_up(request: Handler) -> None:
    request.connection.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    with EmbeddedStore(tmp_path_factory.mktemp("store")) as store:
        yield store


@pytest.fixture
def proxy(server: EmbeddedStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setattr(steady_files, "_FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(steady_files, "_LONGEST_WAIT_SECONDS", 0.1)
    with Proxy(server.environment["AWS_ENDPOINT_URL"]) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_port}")
        yield proxy
        proxy.shutdown()


@pytest.fixture
def store(server: EmbeddedStore, request: pytest.FixtureRequest) -> Store:
    store = Store.open(server.uri).child(request.node.name.partition("[")[0])
    store.write_bytes("object", CONTENT)
    return store


@pytest.mark.parametrize(
    "fault",
    [
        refuse(500, "InternalError"),
        refuse(503, "SlowDown"),
        refuse(502, "BadGateway"),
        refuse(400, "ExpiredToken"),
        refuse(403, "InvalidAccessKeyId"),
        send_part,
        hang_up,
    ],
    ids=["500", "503", "502", "expired", "refused key", "cut off", "hang up"],
)
def test_the_object_comes_whole_after_trouble(store: Store, proxy: Proxy, fault: Callable[[Handler], None]) -> None:
    proxy.faults = [fault] * 3
    assert bytes(SteadyFiles(store, 20).read("object")) == CONTENT
    assert proxy.faults == []


def test_a_silent_store_is_asked_again(store: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pose_core.runtime.storage.SILENT_SECONDS", 1)
    proxy.faults = [stall]
    assert bytes(SteadyFiles(store, 20).read("object")) == CONTENT


def test_a_trickle_is_left_and_taken_up_again(store: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_PACE_SECONDS", 0.5)
    monkeypatch.setattr(pieces, "_STEP_BYTES", 1024)

    def trickle(request: Handler) -> None:
        def drops() -> None:
            for _ in range(40):
                request.wfile.write(b"")
                time.sleep(0.05)

        send_part(request, drops)

    proxy.faults = [trickle]
    assert bytes(SteadyFiles(store, 20).read("object")) == CONTENT


def test_what_came_before_a_cut_is_not_asked_for_again(store: Store, proxy: Proxy) -> None:
    piece = pieces.Piece("object")
    proxy.faults = [send_part]
    with pytest.raises(StorageError, match="cut .* off") as caught:
        store.fill(piece)
    assert caught.value.passing and bytes(piece.data) == CONTENT[: len(CONTENT) // 2]
    store.fill(piece)
    assert bytes(piece.data) == CONTENT


@pytest.mark.parametrize(
    ("fault", "words", "exit_code"),
    [
        (refuse(503, "SlowDown"), "failed while working on", 1),
        (refuse(400, "ExpiredToken"), "have expired; renew", 2),
        (send_part, "off before its end", 1),
    ],
)
def test_after_the_set_time_there_is_one_clear_error(
    store: Store, proxy: Proxy, fault: Callable[[Handler], None], words: str, exit_code: int
) -> None:
    # Half of what is left comes each time, so that a read that is cut off could go on for very long.
    proxy.faults = [fault] * 100_000
    with pytest.raises(StorageGoneError) as caught:
        SteadyFiles(store, 0.5).read("object", 0, 1 << 20)
    message = str(caught.value)
    assert words in message and store.url("object") in message and "\n" not in message
    assert "gave up after 0.5 s (storage.retry_seconds)" in message and caught.value.exit_code == exit_code


def test_what_waiting_does_not_help_is_an_error_at_once(store: Store, proxy: Proxy) -> None:
    with pytest.raises(StorageError, match="missing does not exist"):
        SteadyFiles(store, 60).read("missing")
    proxy.faults = [refuse(403, "AccessDenied")]
    with pytest.raises(StorageError, match="does not let these credentials"):
        SteadyFiles(store, 60).read("object")


def test_credentials_that_somebody_renews_are_read_anew(
    store: Store, server: EmbeddedStore, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = (server.folder / "credentials").read_text()
    (tmp_path / "credentials").write_text("[pose]\naws_access_key_id = OLD\naws_secret_access_key = old\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    proxy.on_request = lambda number: (tmp_path / "credentials").write_text(right) and None if number == 2 else None
    assert bytes(SteadyFiles(store, 20).read("object")) == CONTENT
    s3_client.forget_credentials()


def test_an_object_replaced_between_requests_is_read_anew(
    store: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steady_files, "PIECE_BYTES", 1 << 20)
    other = CONTENT[::-1]
    replaced = Store.open(store.uri)
    # Writes go through the proxy too, which knows only GET: around it.
    proxy.on_request = lambda number: _around(proxy, replaced, other) if number == 2 else None
    assert bytes(SteadyFiles(store, 20).read("object")) == other


def test_a_file_of_which_some_has_been_seen_does_not_change_under_its_reader(
    store: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steady_files, "READ_AHEAD_BYTES", 1 << 16)
    with SteadyFiles(store, 20).open("object") as file:
        assert file.read(100) == CONTENT[:100]
        file.seek(-10, os.SEEK_END)
        assert file.read() == CONTENT[-10:]
        _around(proxy, store, CONTENT[::-1])
        with pytest.raises(ReplacedError, match="object was replaced while it was read"):
            file.seek(1 << 20)
            file.read(100)


def _around(proxy: Proxy, store: Store, content: bytes) -> None:
    names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
    before = {name: os.environ[name] for name in names}
    os.environ.update(dict.fromkeys(names, f"http://{proxy.target}"))
    try:
        store.write_bytes("object", content)
    finally:
        os.environ.update(before)


def test_empty_objects_and_ends_are_no_trouble(store: Store) -> None:
    files = SteadyFiles(store, 5)
    store.write_bytes("empty", b"")
    assert bytes(files.read("empty")) == b""
    assert files.open("empty").read() == b""
    assert bytes(files.read("object", len(CONTENT) - 3)) == CONTENT[-3:]
    assert files.open("object").read() == CONTENT


def test_a_shard_cut_short_for_good_is_named_after_the_set_time(store: Store) -> None:
    shards = write_shards(store, 2)
    whole = store.read_bytes("train/1.parquet")
    store.write_bytes("train/1.parquet", whole[: len(whole) // 2])
    with reader(store, shards, retry_seconds=0.2) as batches, pytest.raises(DataError, match="not readable Parquet"):
        list(itertools.islice(batches, 20))


def write_shards(store: Store, count: int) -> dict[str, int]:
    for shard in range(count):
        keys = [f"{shard}-{row}" for row in range(12)]
        rows = {"key": keys, "latents": np.full((12, 2, 1, 1, 1), shard, np.float32)}
        store.write_bytes(f"train/{shard}.parquet", parquet_bytes(to_table(rows)))
    return {f"train/{shard}.parquet": 12 for shard in range(count)}


def reader(store: Store, shards: dict[str, int], retry_seconds: float = 60) -> Batches:
    chunks = PreparedChunks(SteadyFiles(store, retry_seconds), shards, ("key", "latents"), 5)
    order = Order(len(shards), 2, seed=1)
    return Batches(chunks, order, Position(), batch=4, rank=0, ranks=1, ahead=2)


def test_the_store_killed_and_restarted_in_mid_epoch_changes_nothing(tmp_path: Path) -> None:
    """Gone for 20 seconds, then back at the same address with the same data."""
    with EmbeddedStore(tmp_path) as server:
        store = Store.open(server.uri)
        shards = write_shards(store, 10)
        with reader(store, shards) as batches:
            undisturbed = [batch.columns["key"] for batch in itertools.islice(batches, 60)]
        seen = []
        with reader(store, shards) as batches:
            for batch in itertools.islice(batches, 60):
                seen.append(batch.columns["key"])
                if len(seen) == 9:
                    process = server._process
                    assert process is not None
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    restart = threading.Timer(20, _restart, (server,))
                    restart.start()
    assert seen == undisturbed
    assert len({key for keys in seen[:30] for key in keys}) == 120


def _restart(server: EmbeddedStore) -> None:
    """The same command in the same folder: the same ports, data and keys."""
    assert server._process is not None
    with server.log_file.open("ab") as log:
        again = subprocess.Popen(
            server._process.args, cwd=server.folder, env={"HOME": str(server.folder)}, stdout=log, stderr=log
        )
    server._cleanup.callback(lambda: (again.kill(), again.wait()))
