"""Download pictures politely: few concurrent requests per host, few retries, and the owner's refusal is respected.

Lists of URLs come from strangers. Every URL and redirect must lead to the public internet; otherwise a list could make
this machine call services inside its own cluster. Answers are limited in time and bytes.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from socket import socket
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import (
    HTTPError,
    LocationValueError,
    NameResolutionError,
    NewConnectionError,
    ProtocolError,
    SSLError,
    TimeoutError,
)

from data_tools.sources.item import FAILED_TO_DOWNLOAD, Loss
from megamoe import __version__

AGENT = "megamoe-data-build"  # our name in X-Robots-Tag lines for a single reader
USER_AGENT = f"{AGENT}/{__version__} (image-text data sets for model training)"
ROBOTS = "X-Robots-Tag says no"  # a cause
_REDIRECTS = 5
_WHOLE = 6  # times the timeout: total time for one picture, however steadily its bytes arrive
_WAIT = 0.5  # seconds before the first retry; doubles with each one
_MAX_WAIT = 30.0  # seconds; a server that asks for more with Retry-After is not retried
_CHUNK = 1 << 16
_DIGITS = 15  # of a plausible length
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class DownloadOptions:
    """How pictures are downloaded.

    Attributes:
        threads: concurrent downloads of one process.
        per_host: concurrent downloads from one host.
        timeout: seconds for a connection and for each piece of an answer.
        retries: retries after a fault that may be temporary (5xx, 429, timeouts, broken connections).
        max_bytes: maximum size of one picture.
        disallowed: directives of ``X-Robots-Tag`` that forbid the use; empty: the header is ignored.
        user_agent: value of the User-Agent header.
        private_hosts: allow addresses outside the public internet.
    """

    threads: int = 32
    per_host: int = 8
    timeout: float = 10.0
    retries: int = 2
    max_bytes: int = 32 << 20
    disallowed: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    user_agent: str = USER_AGENT
    private_hosts: bool = False


class Downloader:
    """Download from several threads of one process, over persistent connections."""

    def __init__(self, options: DownloadOptions) -> None:
        self._options = options
        self._hosts: defaultdict[str, threading.Semaphore] = defaultdict(lambda: threading.Semaphore(options.per_host))
        self._lock = threading.Lock()
        timeout = urllib3.Timeout(connect=options.timeout, read=options.timeout)
        shared = {"num_pools": 256, "maxsize": options.per_host, "timeout": timeout, "retries": False}
        self._direct = urllib3.PoolManager(**shared)  # type: ignore[arg-type]
        if not options.private_hosts:
            self._direct.pool_classes_by_scheme = {"http": _PublicHTTPPool, "https": _PublicHTTPSPool}
        self._proxies = {
            scheme: urllib3.ProxyManager(proxy, **shared)  # type: ignore[arg-type]
            for scheme, proxy in getproxies().items()
            if scheme in ("http", "https")
        }

    def get(self, url: str) -> bytes:
        """Download the bytes behind ``url``.

        Raises:
            Loss: the download failed, after all retries.
        """
        wait = _WAIT
        for left in range(self._options.retries, -1, -1):
            try:
                return self._follow(url)
            except _Passing as fault:
                wait = max(wait, fault.wait)
                if not left or wait > _MAX_WAIT:
                    raise Loss(fault.status, fault.cause, str(fault)) from fault
            time.sleep(wait)
            wait *= 2
        raise AssertionError("the last try returns or raises")

    def _follow(self, url: str) -> bytes:
        deadline = time.monotonic() + _WHOLE * self._options.timeout
        for _ in range(_REDIRECTS + 1):
            try:
                parts = urlsplit(url)
                host = parts.hostname
            except ValueError:
                host = None
            if not host or parts.scheme not in ("http", "https"):
                raise _lost("not an http(s) URL", url)
            with self._lock:
                turn = self._hosts[host]
            waited = time.monotonic()
            with turn:
                deadline += time.monotonic() - waited  # the server is not to blame for our queue
                answer = self._ask(url, parts.scheme, host, deadline)
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
        raise _lost("too many redirects", url)

    def _ask(self, url: str, scheme: str, host: str, deadline: float) -> bytes | str:
        """Return the bytes, or the target of a redirect."""
        proxy = None if proxy_bypass(host) else self._proxies.get(scheme)
        headers = {"User-Agent": self._options.user_agent, "Accept": "image/*", "Accept-Encoding": "identity"}
        try:
            response = (proxy or self._direct).request(
                "GET", url, headers=headers, preload_content=False, redirect=False, decode_content=False
            )
            try:
                return self._read(url, response, deadline)
            finally:
                response.close()
        except NameResolutionError as error:
            raise _lost("host not found", url) from error
        except NewConnectionError as error:  # before TimeoutError, one of its base classes
            raise _Passing("no connection", url) from error
        except TimeoutError as error:
            raise _Passing("timed out", url) from error
        except SSLError as error:
            raise _lost("TLS error", url, error) from error
        except ProtocolError as error:
            raise _Passing("connection broken", url) from error
        except LocationValueError as error:
            raise _lost("not an http(s) URL", url) from error
        except (HTTPError, ValueError, OSError) as error:  # whatever else a server can provoke
            raise _lost(type(error).__name__, url, error) from error

    def _read(self, url: str, response: urllib3.BaseHTTPResponse, deadline: float) -> bytes | str:
        if is_disallowed(response.headers.getlist("X-Robots-Tag"), self._options.disallowed):
            raise _lost(ROBOTS, url)
        if response.status in urllib3.HTTPResponse.REDIRECT_STATUSES and "Location" in response.headers:
            return str(response.headers["Location"])
        if response.status in _AGAIN:
            asked = response.headers.get("Retry-After", "")
            raise _Passing(f"HTTP {response.status}", url, float(asked) if asked.isdecimal() else 0.0)
        if response.status != 200:
            raise _lost(f"HTTP {response.status}", url)
        limit = self._options.max_bytes
        length = response.headers.get("Content-Length", "")
        content = bytearray()
        too_many = length.isdecimal() and (len(length) > _DIGITS or int(length) > limit)
        while not too_many and (piece := response.read1(_CHUNK)):
            content += piece
            too_many = len(content) > limit
            if time.monotonic() > deadline:
                raise _Passing("timed out", url)
        if too_many:
            raise _lost("too many bytes", url, f"--max-bytes {limit}")
        return bytes(content)


def is_disallowed(tags: Iterable[str], disallowed: Iterable[str]) -> bool:
    """Return whether an ``X-Robots-Tag`` line, for all or for us (``agent: word, word``), has a disallowed word."""
    words = {word.lower() for word in disallowed}
    for line in tags:
        agent, colon, rest = line.partition(":")
        if colon and agent.strip().lower() != AGENT:
            continue
        if words & {word.strip().lower() for word in (rest if colon else line).split(",")}:
            return True
    return False


class _Passing(Loss):
    """A fault that may be temporary. ``wait``: seconds that the server asks for."""

    def __init__(self, cause: str, url: str, wait: float = 0.0) -> None:
        super().__init__(FAILED_TO_DOWNLOAD, cause, f"{url}: {cause}")
        self.wait = wait


def _lost(cause: str, url: str, detail: object = None) -> Loss:
    return Loss(FAILED_TO_DOWNLOAD, cause, f"{url}: {cause}{f' ({detail})' if detail else ''}")


def _refuse_private(connected: socket) -> socket:
    """Refuse a private address. Check the address that answered: a name may resolve differently each time."""
    address = ip_address(connected.getpeername()[0].partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    if not address.is_global:
        connected.close()
        raise _lost("not on the public net", str(address), "--private-hosts allows it")
    return connected


class _PublicHTTPConnection(HTTPConnection):
    def _new_conn(self) -> socket:
        return _refuse_private(super()._new_conn())


class _PublicHTTPSConnection(HTTPSConnection):
    def _new_conn(self) -> socket:
        return _refuse_private(super()._new_conn())


class _PublicHTTPPool(HTTPConnectionPool):
    ConnectionCls = _PublicHTTPConnection


class _PublicHTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _PublicHTTPSConnection
