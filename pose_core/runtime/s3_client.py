"""boto3 clients, kept for as long as the environment that they were made from."""

from __future__ import annotations

import contextlib
import os
from functools import lru_cache
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from pose_core.runtime.pieces import Piece, receive

CONNECT_SECONDS = 3
SILENT_SECONDS = 15
"""How long a reader of pieces waits for a byte."""


def forget_credentials() -> None:
    """Make the next request read the credentials anew; somebody may have renewed them."""
    s3_client.cache_clear()


@lru_cache(maxsize=8)
def s3_client(settings: tuple[tuple[str, str], ...], read_seconds: int, attempts: int) -> Any:
    """A client, kept for as long as the ``AWS_*`` variables are ``settings``: making one takes tenths of a second."""
    session = boto3.session.Session()
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=read_seconds,
        retries={"mode": "standard", "total_max_attempts": attempts},
        # Not every S3 store knows the newer checksums.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    region = os.environ.get("AWS_REGION") or session.region_name or "us-east-1"
    return session.client("s3", region_name=region, config=config)


def fill_piece(s3: Any, at: dict[str, str], piece: Piece) -> None:
    """Go on reading ``piece`` of the object ``at`` bucket and key with one request, of the version it began with."""
    condition = {"IfMatch": piece.version} if piece.version else {}
    part = {"Range": piece.range} if piece.range else {}
    try:
        answer = s3.get_object(**at, **condition, **part)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 416 or piece.at:
            raise
        piece.size = 0  # no range fits into an empty object
        return
    with contextlib.closing(answer["Body"]) as body:
        piece.version = answer.get("ETag", "")
        _, _, total = answer.get("ContentRange", "").rpartition("/")
        piece.size = int(total) if total.isdecimal() else piece.at + answer["ContentLength"]
        receive(body, piece, answer["ContentLength"])
