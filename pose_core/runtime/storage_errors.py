"""Turns what boto3, pyarrow and the operating system say about storage into one line with a remedy."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

import pyarrow
from botocore.exceptions import BotoCoreError, ClientError

from pose_core.errors import ReplacedError, StorageError

# The first row that matches wins. Matched against code, class and message without case, spaces and underscores, because
# boto3 says NoSuchBucket where pyarrow says NO_SUCH_BUCKET. The last column: another argument in the call would help.
_ANSWERS: tuple[tuple[str, str, bool], ...] = (
    (
        r"nocredentials|partialcredentials|unabletolocatecredentials",
        "no credentials for {url}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SHARED_CREDENTIALS_FILE",
        True,
    ),
    (
        r"profilenotfound",
        "no AWS profile {profile!r} for {url}; correct AWS_PROFILE or AWS_SHARED_CREDENTIALS_FILE",
        True,
    ),
    (
        r"expiredtoken|requestexpired|tokenrefreshrequired",
        "the credentials for {url} have expired; renew AWS_SESSION_TOKEN or the profile in AWS_SHARED_CREDENTIALS_FILE",
        True,
    ),
    (
        r"invalidaccesskeyid|signaturedoesnotmatch|invalidclienttokenid|invalidtoken|credentialretrieval",
        "{endpoint} refused the credentials for {url}; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the "
        "profile in AWS_SHARED_CREDENTIALS_FILE",
        True,
    ),
    (
        r"accessdenied|forbidden|allaccessdisabled",
        "{endpoint} does not let these credentials use {url}; check AWS_ACCESS_KEY_ID or AWS_PROFILE, or grant them "
        "read and write",
        True,
    ),
    (
        r"nosuchbucket|bucket'[^']*'notfound",
        "bucket of {url} does not exist at {endpoint}; create it or correct storage.uri",
        True,
    ),
    (r"invalidbucketname|paramvalidation", "{url} is not a valid location; correct storage.uri", True),
    (
        r"permanentredirect|authorizationheadermalformed|illegallocationconstraint",
        "the bucket of {url} is in another region; set AWS_REGION to it",
        True,
    ),
    (r"cutoff|incompleteread|responsestreaming", "{endpoint} cut {url} off before its end", False),
    (r"tooslow", "{endpoint} sends {url} too slowly to go on", False),
    (r"invalidendpoint", "AWS_ENDPOINT_URL is {endpoint!r}; write it as http://host:port", True),
    (r"nosuchkey|filenotfound|pathdoesnotexist", "{url} does not exist; was the step that writes it run?", False),
    (
        r"endpointconnection|timeout|connectionclosed|networkconnection|connectionerror|proxyconnection|couldnotconnect",
        "cannot reach {endpoint} for {url}; is it running, and is AWS_ENDPOINT_URL right?",
        True,
    ),
    (
        r"internalerror|internalfailure|serviceunavailable|insufficientstorage|slowdown|unknownerror|throttling|"
        r"toomanyrequests|requestlimitexceeded",
        "{endpoint} failed while working on {url}; look in its log, a full disk answers like this",
        False,
    ),
)

# What may be better on the next try: nobody answers, the store has trouble of its own, or the connection was cut.
_PASSING = re.compile(
    r"endpointconnection|timeout|timedout|connectionclosed|networkconnection|connectionerror|connectionreset|"
    r"proxyconnection|couldnotconnect|connectionrefused|internalerror|internalfailure|serviceunavailable|slowdown|"
    r"unknownerror|incompleteread|responsestreaming|cutoff|tooslow|throttling|toomanyrequests|requestlimitexceeded"
)
# And these with credentials that somebody renews meanwhile.
_CREDENTIALS = re.compile(
    r"expiredtoken|requestexpired|tokenrefreshrequired|invalidaccesskeyid|signaturedoesnotmatch|invalidclienttokenid|"
    r"invalidtoken|credentialretrieval|nocredentials|unabletolocatecredentials"
)

_ERRNOS = {
    errno.ENOSPC: "no space left on the disk of {place}; free some or choose another place",
    errno.EDQUOT: "the disk quota of {place} is used up; free some or choose another place",
    errno.EACCES: "not allowed to read or write {place}; change its permissions or choose another place",
    errno.EPERM: "not allowed to read or write {place}; change its permissions or choose another place",
    errno.EROFS: "{place} is on a read-only disk; choose another place",
    errno.ENOTDIR: "{place} leads through a file where a folder is needed; move the file or choose another place",
    errno.EEXIST: "{place} leads through a file where a folder is needed; move the file or choose another place",
}


@contextlib.contextmanager
def in_one_line(url: str, local: str | None = None) -> Iterator[None]:
    """What boto3, pyarrow or the system raises in the block becomes a ``StorageError``, as ``explain`` words it."""
    try:
        yield
    # boto3 raises ValueError for an endpoint that is no URL.
    except (BotoCoreError, ClientError, pyarrow.ArrowException, OSError, ValueError) as error:
        raise explain(error, url, local) from error


def explain(error: Exception, url: str, local: str | None = None) -> StorageError:
    """One line for ``error``, met while working on ``url`` (and on the local folder ``local`` at the other end)."""
    # Only boto3's ClientError has an answer of the store in it.
    code = (getattr(error, "response", None) or {}).get("Error", {}).get("Code", "")
    message = " ".join(str(error).split())
    number = getattr(error, "errno", None)
    if number in _ERRNOS:
        sentence = _ERRNOS[number].format(place=local or url)
        full = number in (errno.ENOSPC, errno.EDQUOT)
        told = StorageError(sentence, in_call=not full)
        told.passing = full
        return told
    said = re.sub(r"[\s_]", "", f"{code} {type(error).__name__} {message}").lower()
    if re.search(r"preconditionfailed|invalidrange", said):
        return ReplacedError(
            f"{url} was replaced while it was read; shards must not change while a run reads them: put the old object "
            "back, or prepare them again"
        )
    told = _told(said, message, url)
    status = (getattr(error, "response", None) or {}).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    told.passing = status >= 500 or bool(_PASSING.search(said) or _CREDENTIALS.search(said))
    return told


def _told(said: str, message: str, url: str) -> StorageError:
    for pattern, sentence, in_call in _ANSWERS:
        if re.search(pattern, said):
            profile = os.environ.get("AWS_PROFILE", "default")
            return StorageError(sentence.format(url=url, endpoint=endpoint(), profile=profile), in_call=in_call)
    return StorageError(f"storage failed at {url}: {message[:300]}; check storage.uri and AWS_ENDPOINT_URL")


def endpoint() -> str:
    """The S3 endpoint set in the environment, without a user name or password, or ``S3``."""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "S3"
    return url.replace(f"{urlsplit(url).netloc.rpartition('@')[0]}@", "")
