"""Runs a function on untrusted bytes in a child process with limits, so that the worst file costs only itself.

A library that crashes, hangs or asks for all memory takes the child with it; the caller gets a ``DataError`` and the
next call a new child. The child may not write files. It ends with its parent, whose end closes its standard input.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO, ParamSpec, TypeVar

from pose_core.errors import ClusterError, DataError

P = ParamSpec("P")
T = TypeVar("T")
_LENGTH = struct.Struct("!Q")
_START_SECONDS = 120.0


class Guard:
    """One child process, started when it is first needed and used again until a call ends it.

    ``memory_bytes`` bounds what the child may allocate, ``seconds`` a call.
    """

    def __init__(self, memory_bytes: int, seconds: float):
        self.memory_bytes, self.seconds = memory_bytes, seconds
        self._child: subprocess.Popen[bytes] | None = None

    def call(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """``function(*arguments, **named)`` in the child. The function must be importable by name.

        Raises:
            DataError: ``decode: ...``; the function raised it, crashed, took too long or too much memory.
            ClusterError: no child can be started.
        """
        request = pickle.dumps((function, arguments, named), protocol=pickle.HIGHEST_PROTOCOL)
        if self._child is None or self._child.poll() is not None:
            self._start()
        deadline = time.monotonic() + self.seconds
        try:
            self._send(request, deadline)
            failed, value = pickle.loads(self._receive(deadline))
        except TimeoutError:
            self.close()
            raise DataError(f"decode: took longer than {self.seconds:g} seconds") from None
        except (EOFError, BrokenPipeError):
            raise DataError(f"decode: {self._ended()}") from None
        if failed:
            raise value
        return value

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for stream in (self._child.stdin, self._child.stdout):
                with contextlib.suppress(OSError):
                    stream.close()  # type: ignore[union-attr]
            self._child = None

    def _start(self) -> None:
        self.close()
        # The child must find what this process finds, wherever the cluster unpacked it.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        environment |= {"OPENBLAS_NUM_THREADS": "1"}
        self._child = subprocess.Popen(
            [sys.executable, "-m", __name__, str(self.memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        try:
            self._receive(time.monotonic() + _START_SECONDS)
        except (EOFError, TimeoutError):
            self.close()
            raise ClusterError(f"no process for decoding starts on this node with {sys.executable}") from None

    def _ended(self) -> str:
        child = self._child
        code = child.wait() if child else 0
        self.close()
        name = signal.Signals(-code).name if code < 0 else f"exit {code}"
        return f"crashed the decoder, {name}"

    def _send(self, content: bytes, deadline: float) -> None:
        stream = self._child.stdin  # type: ignore[union-attr]
        os.set_blocking(stream.fileno(), False)  # type: ignore[union-attr]
        rest = memoryview(_LENGTH.pack(len(content)) + content)
        while rest:
            _wait(stream.fileno(), deadline, writing=True)  # type: ignore[union-attr]
            with contextlib.suppress(BlockingIOError):
                rest = rest[os.write(stream.fileno(), rest[: 1 << 20]) :]  # type: ignore[union-attr]

    def _receive(self, deadline: float) -> bytes:
        stream = self._child.stdout  # type: ignore[union-attr]
        (length,) = _LENGTH.unpack(_exactly(stream.fileno(), _LENGTH.size, deadline))  # type: ignore[union-attr]
        return _exactly(stream.fileno(), length, deadline)  # type: ignore[union-attr]


def _exactly(descriptor: int, count: int, deadline: float) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        _wait(descriptor, deadline, writing=False)
        part = os.read(descriptor, min(count - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def _wait(descriptor: int, deadline: float, *, writing: bool) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT if writing else select.POLLIN)
    if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def _serve(memory_bytes: int, incoming: BinaryIO, outgoing: BinaryIO) -> None:
    """What the child does until its parent goes away."""
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _reply(outgoing, b"ready")
    while header := incoming.read(_LENGTH.size):
        try:
            function, arguments, named = pickle.loads(incoming.read(*_LENGTH.unpack(header)))
            answer: tuple[bool, Any] = (False, function(*arguments, **named))
        except DataError as error:
            answer = (True, error)
        except MemoryError:
            answer = (True, DataError("decode: needs too much memory"))
        except Exception as error:  # whatever a library makes of a hostile file
            answer = (True, DataError(f"decode: unreadable, {type(error).__name__}"))
        function = arguments = named = None
        _reply(outgoing, pickle.dumps(answer))


def _reply(outgoing: BinaryIO, content: bytes) -> None:
    outgoing.write(_LENGTH.pack(len(content)) + content)
    outgoing.flush()


if __name__ == "__main__":
    # What a library prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _serve(int(sys.argv[1]), sys.stdin.buffer, answers)
