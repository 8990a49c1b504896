"""Read shards from web servers."""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime

import requests
import urllib3

from megamoe.core.urls import one_line
from megamoe.data.remote.stream import CHUNK, Interrupted, Patience, Refused, Stream

_WORTH_RETRYING = frozenset({408, 425, 429})  # and 500 to 599
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)$")
_REMEDIES = {
    401: "check the credentials",
    403: "check the credentials, or sign the URL again if it has expired",
    404: "check the name",
    410: "check the name",
}


@contextmanager
def open_http(url: str, offset: int, identity: str | None, patience: Patience) -> Iterator[Stream]:
    """Request the bytes from ``offset`` of the object that was ``identity`` when its first bytes arrived.

    Proxies, ``.netrc`` and certificates come from the environment, as ``requests`` documents them.

    Raises:
        Refused, Interrupted: the stream cannot be opened.
    """
    # If the server compressed, offsets and Content-Length would count compressed bytes.
    headers = {"Accept-Encoding": "identity", "User-Agent": "megamoe"}
    if offset and identity:
        headers |= {"Range": f"bytes={offset}-", "If-Range": _validator(identity)}
    with requests.Session() as session:  # one per stream: a fork never shares its sockets
        try:
            response = session.get(url, headers=headers, stream=True, timeout=(patience.connect, patience.read))
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise _failure(error) from error
        with response:
            start, length = _extent(response, offset)
            yield Stream(start, length, _identity(response, length, start, identity), _chunks(response))


def _extent(response: requests.Response, offset: int) -> tuple[int, int | None]:
    """Return the first byte of the answer and the length of the whole object."""
    status = response.status_code
    if status == 206:
        match = _RANGE.match(response.headers.get("Content-Range", ""))
        if not match or int(match.group(1)) != offset:
            raise Interrupted("the server sent another range than was asked for", anew=True)
        return offset, int(match.group(3))
    if status == 200:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdecimal() else None
    reason = one_line(f"HTTP {status} {response.reason or ''}".strip())
    if status == 416:
        raise Interrupted(f"{reason}: it is shorter than it was", anew=True)
    if status in _WORTH_RETRYING or 500 <= status < 600:
        raise Interrupted(reason, wait=_retry_after(response.headers.get("Retry-After", "")))
    raise Refused(reason, _REMEDIES.get(status, "check the URL"))


def _identity(response: requests.Response, length: int | None, start: int, before: str | None) -> str | None:
    """Return a strong ETag, else date and length. For a part it must equal ``before``: it is of the same object."""
    etag = response.headers.get("ETag", "")
    modified = response.headers.get("Last-Modified", "")
    identity = None
    if etag.startswith('"'):  # weak ones (W/) stay the same when bytes change
        identity = etag
    elif modified and length is not None:
        identity = f"{modified};{length}"
    if start and identity != before:
        raise Interrupted("it was replaced while it was read", anew=True)
    return identity


def _validator(identity: str) -> str:
    return identity if identity.startswith('"') else identity.rpartition(";")[0]


def _chunks(response: requests.Response) -> Iterator[bytes]:
    try:
        # read1 returns what has arrived. read would wait for a whole chunk, and a trickle would never time out.
        while data := response.raw.read1(CHUNK, decode_content=False):
            yield data
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise Interrupted(_reason(error)) from error


def _failure(error: Exception) -> Refused | Interrupted:
    if isinstance(error, requests.exceptions.TooManyRedirects):
        return Refused("it redirects in a circle", "check the URL")
    if isinstance(error, ValueError):  # what requests raises for an invalid URL is a ValueError too
        return Refused("not a valid URL", "check the URL")
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            remedy = "check the host's name, or name its authority's certificate in REQUESTS_CA_BUNDLE"
            return Refused(one_line(f"certificate refused: {cause.verify_message}"), remedy)
    return Interrupted(_reason(error))


def _reason(error: BaseException) -> str:
    """Describe the innermost cause: the outer ones repeat the URL with its signature."""
    causes = list(_causes(error))
    for cause in reversed(causes):
        if isinstance(cause, OSError) and cause.strerror:
            return one_line(cause.strerror)
    if any(isinstance(cause, (TimeoutError, urllib3.exceptions.TimeoutError, requests.Timeout)) for cause in causes):
        return "timed out"
    return one_line(f"connection broken: {type(causes[-1]).__name__}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        inner = current.__cause__ or current.__context__
        if inner is None:  # urllib3 passes some on as an attribute or an argument
            inner = next((each for each in current.args if isinstance(each, BaseException)), None)
        current = inner


def _retry_after(value: str) -> float | None:
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
