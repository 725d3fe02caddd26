"""The boto3 client behind ``storage``: how long it waits, how often it tries, and for how long one client serves."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import boto3
from botocore.config import Config

CONNECT_SECONDS = 3
ATTEMPTS = 3


@lru_cache(maxsize=8)
def s3_client(settings: tuple[tuple[str, str], ...], read_seconds: int) -> Any:
    """A client, kept for as long as the ``AWS_*`` variables are ``settings``: making one takes tenths of a second."""
    session = boto3.session.Session()
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=read_seconds,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        # Not every S3 store knows the newer checksums.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    region = os.environ.get("AWS_REGION") or session.region_name or "us-east-1"
    return session.client("s3", region_name=region, config=config)
