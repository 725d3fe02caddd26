"""Object storage behind one small class: an S3 bucket or a local folder, with the same keys and the same errors.

boto3 does the control work and small objects, pyarrow.fs moves folders; the usual ``AWS_*`` variables set both up.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow
import pyarrow.fs
from botocore.exceptions import ClientError

from pose_core.data.sources.source import Stored
from pose_core.errors import StorageError
from pose_core.runtime.local_files import is_partial, partial_name, replace_folder, write_whole
from pose_core.runtime.pieces import Piece
from pose_core.runtime.s3_client import CONNECT_SECONDS, SILENT_SECONDS, fill_piece, s3_client
from pose_core.runtime.storage_errors import in_one_line

_READ_SECONDS = 60
_PROBE_SECONDS = 4
_ATTEMPTS = 3
_CHUNK_BYTES = 8 << 20
BUCKET = "s3://"
_LOCAL = pyarrow.fs.LocalFileSystem()

Keys = list[str]
Found = list[Stored]


@dataclass(frozen=True)
class Store(ABC):
    """One root location: ``s3://bucket/prefix`` or a local folder; keys below it are relative and '/'-separated.

    It holds only its location, so it travels into Ray tasks; each process makes clients from its ``AWS_*`` variables.
    Every method raises ``StorageError`` with one line that names the location and the remedy.
    """

    uri: str

    @classmethod
    def open(cls, uri: str) -> Store:
        """A store at ``s3://bucket/prefix``, ``file:///folder`` or a folder path; nothing is made or asked yet."""
        if uri.startswith(BUCKET) and uri.strip("/") != "s3:":
            return _BucketStore(uri.rstrip("/"))
        if uri.startswith("file:///"):
            return _FolderStore(unquote(uri.removeprefix("file://")).rstrip("/"))
        if "://" in uri or not uri:
            raise StorageError(f"storage {uri!r} is not supported; use s3://bucket/prefix or a folder", in_call=True)
        return _FolderStore(str(Path(uri).expanduser().absolute()))

    def child(self, prefix: str) -> Store:
        """The store whose root is ``prefix`` below this one."""
        return type(self)(self.url(prefix))

    def url(self, key: str) -> str:
        """The full location of ``key``, which a person or another process can open."""
        if ".." in key.split("/"):
            raise StorageError(f"storage key {key!r} leaves {self.uri}; keys may not contain '..'")
        return f"{self.uri.rstrip('/')}/{key.strip('/')}".rstrip("/")

    @abstractmethod
    def arrow(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """The pyarrow filesystem and the root's path on it: ``bucket/prefix`` or ``/folder``."""

    def check(self) -> None:
        """Write and remove a small object, so that a wrong location fails now and not after hours.

        Raises:
            StorageError: (exit code 2) wrong credentials, no bucket, not writable, disk full, no answer for 15 seconds,
                to a write for 45.
        """
        try:
            self._probe(f".pose-check-{uuid.uuid4().hex}")
        except StorageError as error:
            error.exit_code = 2
            raise

    @abstractmethod
    def _probe(self, key: str) -> None: ...

    @abstractmethod
    def create_bucket(self) -> None:
        """Create the bucket or folder unless it exists."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether an object (not a prefix) has this key."""

    @abstractmethod
    def read_bytes(self, key: str) -> bytes:
        """The whole object; meant for small ones."""

    @abstractmethod
    def fill(self, piece: Piece) -> None:
        """Go on reading ``piece`` from where it stands, with one request; what came before an error stays in it.

        Raises:
            StorageError: also where the object is not ``piece.version`` any more. ``passing`` ones are worth a retry.
        """

    @abstractmethod
    def write_bytes(self, key: str, data: bytes | memoryview) -> None:
        """Write the object at once: readers see the old content or the new, never a part."""

    def list(self, prefix: str = "") -> Keys:
        """All keys below ``prefix`` (a folder's name), sorted, relative to this store's root; maybe none."""
        return [stored.key for stored in self.stored(prefix)]

    @abstractmethod
    def stored(self, prefix: str = "") -> Found:
        """The same with sizes and versions."""

    def delete_prefix(self, prefix: str) -> None:
        """Delete the object or the folder ``prefix`` with all below; nothing there is fine. The root is refused."""
        if not prefix.strip("/"):
            raise StorageError(f"refusing to delete all of {self.uri}; name a prefix below it")
        self._delete(prefix)

    @abstractmethod
    def _delete(self, prefix: str) -> None: ...

    def read_text(self, key: str) -> str:
        """The object decoded as UTF-8, with a mark in place of what is not."""
        return self.read_bytes(key).decode(errors="replace")

    def read_json(self, key: str) -> dict[str, Any]:
        """The object parsed as a JSON object."""
        with contextlib.suppress(ValueError):
            value = json.loads(self.read_bytes(key))
            if isinstance(value, dict):
                return value
        raise StorageError(f"{self.url(key)} does not hold a JSON object; delete it and run again")

    def write_json(self, key: str, obj: dict[str, Any]) -> None:
        """Write ``obj`` as indented JSON with sorted keys."""
        self.write_bytes(key, (json.dumps(obj, indent=2, sort_keys=True) + "\n").encode())

    def upload_folder(self, local: Path, prefix: str) -> None:
        """Copy every file below ``local`` to keys below ``prefix``, streamed; other keys there stay."""
        if not local.is_dir():
            raise StorageError(f"{local} is not a folder; nothing was uploaded to {self.url(prefix)}")
        filesystem, root = self.child(prefix).arrow()
        with in_one_line(self.url(prefix)):
            if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
                # Made for nested files only by copy_files; an object store needs none.
                filesystem.create_dir(root, recursive=True)
            pyarrow.fs.copy_files(str(local.absolute()), root, _LOCAL, filesystem, chunk_size=_CHUNK_BYTES)

    def download_folder(self, prefix: str, local: Path) -> None:
        """Copy all keys below ``prefix`` into ``local``, which appears, or replaces a folder, whole or not at all."""
        filesystem, root = self.child(prefix).arrow()
        partial = partial_name(local.absolute())
        try:
            with in_one_line(self.url(prefix), str(local)):
                partial.mkdir(parents=True)
                pyarrow.fs.copy_files(root, str(partial), filesystem, _LOCAL, chunk_size=_CHUNK_BYTES)
                replace_folder(partial, local.absolute())
        finally:
            shutil.rmtree(partial, ignore_errors=True)


class _FolderStore(Store):
    """A local folder, or one that all machines mount; ``uri`` is its absolute path."""

    def arrow(self) -> tuple[pyarrow.fs.FileSystem, str]:
        return _LOCAL, self.uri

    def _probe(self, key: str) -> None:
        with in_one_line(self.uri):
            # One page, because a full disk may still take an empty file.
            write_whole(Path(self.url(key)), b"\0" * 4096)
            Path(self.url(key)).unlink()

    def create_bucket(self) -> None:
        with in_one_line(self.uri):
            Path(self.uri).mkdir(parents=True, exist_ok=True)

    def exists(self, key: str) -> bool:
        with in_one_line(self.url(key)):
            return Path(self.url(key)).is_file()

    def read_bytes(self, key: str) -> bytes:
        with in_one_line(self.url(key)):
            return Path(self.url(key)).read_bytes()

    def fill(self, piece: Piece) -> None:
        with in_one_line(self.url(piece.key)), Path(self.url(piece.key)).open("rb") as file:
            size, version = _version(os.fstat(file.fileno()))
            if piece.version not in ("", version):
                raise OSError("PreconditionFailed")
            piece.version, piece.size = version, size
            file.seek(piece.at)
            piece.data += file.read(min(piece.stop, piece.size) - piece.at)
            if not piece.whole:
                raise ConnectionError("cut off")

    def write_bytes(self, key: str, data: bytes | memoryview) -> None:
        with in_one_line(self.url(key)):
            write_whole(Path(self.url(key)), data)

    def stored(self, prefix: str = "") -> Found:
        root = Path(self.uri)
        with in_one_line(self.url(prefix)):
            files = (path for path in Path(self.url(prefix)).rglob("*") if path.is_file() and not is_partial(path))
            found = [Stored(path.relative_to(root).as_posix(), *_version(path.stat())) for path in files]
        return sorted(found, key=lambda stored: stored.key)

    def _delete(self, prefix: str) -> None:
        with in_one_line(self.url(prefix)), contextlib.suppress(FileNotFoundError):
            Path(self.url(prefix)).unlink() if self.exists(prefix) else shutil.rmtree(self.url(prefix))


def _version(status: os.stat_result) -> tuple[int, str]:
    return status.st_size, f"{status.st_size}-{status.st_mtime_ns}"


class _BucketStore(Store):
    """A prefix in an S3 bucket."""

    def _at(self, key: str) -> dict[str, str]:
        bucket, _, full_key = self.url(key).removeprefix("s3://").partition("/")
        return {"Bucket": bucket, "Key": full_key}

    @contextlib.contextmanager
    def _s3(self, key: str = "", read_seconds: int = _READ_SECONDS, attempts: int = _ATTEMPTS) -> Iterator[Any]:
        with in_one_line(self.url(key)):
            settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
            yield s3_client(settings, read_seconds, attempts)

    def arrow(self) -> tuple[pyarrow.fs.FileSystem, str]:
        with self._s3() as s3:
            # What boto3 resolved, so that both go to the same place. Amazon's own hosts are pyarrow's to choose.
            scheme, endpoint = s3.meta.endpoint_url.rstrip("/").split("://")
            amazon = endpoint.startswith("s3.") and ".amazonaws.com" in endpoint
            filesystem = pyarrow.fs.S3FileSystem(
                scheme=scheme,
                endpoint_override=None if amazon else endpoint,
                region=s3.meta.region_name,
                allow_bucket_creation=False,
                # Or copy_files, which Ray Train uses too, drops the errors of its uploads.
                background_writes=False,
                connect_timeout=CONNECT_SECONDS,
                request_timeout=_READ_SECONDS,
                retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
                tls_ca_file_path=os.environ.get("AWS_CA_BUNDLE") or None,
            )
        return filesystem, self.uri.removeprefix("s3://")

    def _probe(self, key: str) -> None:
        with self._s3(read_seconds=_PROBE_SECONDS) as s3:
            # First, because some stores create a missing bucket on a put. A HEAD request would not say what is wrong.
            next(self._raw(s3, ""), None)
        # A store that has just started may take seconds for its first object. Asked again meanwhile, it would write a
        # second time, maybe after the object was removed.
        with self._s3(read_seconds=SILENT_SECONDS) as s3:
            s3.put_object(**self._at(key), Body=b"pose")
            s3.delete_object(**self._at(key))

    def create_bucket(self) -> None:
        with self._s3(read_seconds=_PROBE_SECONDS) as s3, contextlib.suppress(s3.exceptions.BucketAlreadyOwnedByYou):
            s3.create_bucket(Bucket=self._at("")["Bucket"])

    def exists(self, key: str) -> bool:
        with self._s3(key) as s3:
            try:
                return bool(s3.head_object(**self._at(key)))
            except ClientError as error:
                if error.response["Error"]["Code"] != "404":
                    raise
                return False

    def read_bytes(self, key: str) -> bytes:
        with self._s3(key) as s3:
            return bytes(s3.get_object(**self._at(key))["Body"].read())

    def fill(self, piece: Piece) -> None:
        with self._s3(piece.key, read_seconds=SILENT_SECONDS, attempts=1) as s3:
            fill_piece(s3, self._at(piece.key), piece)

    def write_bytes(self, key: str, data: bytes | memoryview) -> None:
        with self._s3(key) as s3:
            s3.put_object(**self._at(key), Body=bytes(data))

    def _raw(self, s3: Any, prefix: str) -> Iterator[Stored]:
        bucket, below = self._at(prefix).values()
        below = f"{below}/".removeprefix("/")
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=below):
            yield from (Stored(item["Key"], item["Size"], item["ETag"]) for item in page.get("Contents", ()))

    def stored(self, prefix: str = "") -> Found:
        root = f"{self._at('')['Key']}/".removeprefix("/")
        with self._s3(prefix) as s3:
            # A key that ends in '/' is a marker by which some tools show an empty folder.
            found = [each for each in self._raw(s3, prefix) if not each.key.endswith("/")]
        return sorted((replace(each, key=each.key.removeprefix(root)) for each in found), key=lambda each: each.key)

    def _delete(self, prefix: str) -> None:
        bucket = self._at(prefix)["Bucket"]
        with self._s3(prefix) as s3:
            keys = [{"Key": self._at(prefix)["Key"]}, *({"Key": each.key} for each in self._raw(s3, prefix))]
            for start in range(0, len(keys), 1000):
                batch = {"Objects": keys[start : start + 1000], "Quiet": True}
                if failed := s3.delete_objects(Bucket=bucket, Delete=batch).get("Errors"):
                    raise ClientError({"Error": failed[0]}, "DeleteObjects")
