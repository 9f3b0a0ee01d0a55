"""Fetch bytes by http from servers that may be slow, endless or hostile.

Each hop of a redirect is checked as the first URL is, and the connection goes to the address that
was checked. A body is bounded in size and time while it is read, whatever its headers claim.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from avllm.data.store.access import AccessError, check_url, public_address
from avllm.errors import OutageError, UserError

MOST_BYTES = 2**30
"""Of one body; a clip is a few MB."""
MOST_SECONDS = 600.0
GRACE_SECONDS = 20.0
"""After which a body has to come at ``LEAST_RATE`` on average."""
LEAST_RATE = 20_000
CONNECT_SECONDS = 15.0
MOST_REDIRECTS = 5
TRIES = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (408, 425, 429)
_Address = tuple[str, int]
_answered: dict[str, _Address] = {}  # servers that gave files in this process, the last at the end
_dead: dict[str, float] = {}  # until when servers are tried once alone, since others answer
DEAD_SECONDS = 60.0


class FetchError(UserError):
    """A file that a server does not give within bounds.

    Reasons: ``too_large``, ``timeout``, ``forbidden``, ``unreachable``.
    """

    def __init__(self, detail: str, reason: str) -> None:
        super().__init__(detail, reason=reason)

    def __reduce__(self) -> tuple[type[FetchError], tuple[object, ...]]:
        return type(self), (str(self), self.reason)  # for worker processes


@dataclass
class _Answer:
    """Hold a server's answer, of which the body is not read yet."""

    url: str
    response: http.client.HTTPResponse
    ends: float

    @property
    def size(self) -> int | None:
        length = self.response.headers.get("Content-Length", "")
        return int(length) if length.isdigit() else None


def fetch(url: str, start: int = 0, size: int | None = None) -> bytes:
    """Return the bytes of a URL, or a range of them.

    Args:
        url: http or https.
        start: first byte.
        size: number of bytes; None for all.

    Raises:
        FileNotFoundError: the server has no such file. AccessError: a row may not name it, or what
            it redirects to. FetchError: it is too large, comes too slowly, or its server does not
            answer while others do. OutageError: no server answers after several tries, or none
            is known.
    """
    headers = {} if size is None else {"Range": f"bytes={start}-{start + size - 1}"}
    for attempt in _tries(url):
        try:
            with _asked("GET", url, headers) as answer:
                is_part = answer.response.status == 206
                skipped = 0 if size is None or is_part else start
                most = MOST_BYTES if size is None else size + skipped
                body = _read(answer, most, stop_at_most=size is not None)
                return body[skipped:]
        except (OutageError, http.client.HTTPException, ConnectionError) as error:
            if attempt + 1 == TRIES:
                raise _no_answer(url, error) from error
            time.sleep(0.5 * 2**attempt)
    raise AssertionError("unreachable")


def size_of_url(url: str) -> int | None:
    """Return the bytes of a URL by its headers; None where there is no such file.

    Raises:
        as :func:`fetch`.
    """
    for attempt in _tries(url):
        try:
            with _asked("HEAD", url, {}) as answer:
                if answer.size is not None:
                    return answer.size
            return len(fetch(url))
        except FileNotFoundError:
            return None
        except (OutageError, http.client.HTTPException, ConnectionError) as error:
            if attempt + 1 == TRIES:
                raise _no_answer(url, error) from error
            time.sleep(0.5 * 2**attempt)
    raise AssertionError("unreachable")


def _no_answer(url: str, error: BaseException) -> FetchError | OutageError:
    """Return the error about a server that does not answer.

    It is the row's fault if the server never gave a file and another one can be reached now. A
    server that gave files is expected to be back, and without network none can be reached.
    """
    server = urlsplit(url).netloc
    detail = f"{url}: {error or type(error).__name__}"
    if server not in _answered and any(map(_is_reached, list(_answered.values())[-3:])):
        _dead[server] = time.monotonic() + DEAD_SECONDS
        return FetchError(f"{detail}; other servers answer: give another copy", "unreachable")
    return OutageError(detail)


def _tries(url: str) -> range:
    """Return the numbers of the tries: one where the server was just found dead."""
    is_dead = time.monotonic() < _dead.get(urlsplit(url).netloc, 0.0)
    return range(TRIES - 1 if is_dead else 0, TRIES)


def _is_reached(address: _Address) -> bool:
    try:
        socket.create_connection(address, CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


@contextmanager
def _asked(method: str, url: str, headers: dict[str, str]) -> Iterator[_Answer]:
    """Send a request, and follow redirects that rows may name."""
    for _ in range(MOST_REDIRECTS + 1):
        check_url(url)
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https"):
            raise AccessError(f"{url} is no http address; a redirect may lead to no other")
        address = public_address(parts)
        connection = _connect(parts, address)
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request(method, target, headers={"User-Agent": "avllm", **headers})
            response = connection.getresponse()
            if response.status not in _REDIRECTS:
                if response.status < 500 and response.status not in _BUSY:
                    _answered.pop(parts.netloc, None)
                    _answered[parts.netloc] = address
                _check_status(url, response.status)
                yield _Answer(url, response, time.monotonic() + MOST_SECONDS)
                return
            url = urljoin(url, response.headers.get("Location", ""))
        except (TimeoutError, ssl.SSLError) as error:
            raise OutageError(f"{parts.netloc} does not answer: {error}") from error
        finally:
            connection.close()
    raise FetchError(f"{url}: more than {MOST_REDIRECTS} redirects; it is no file", "forbidden")


def _connect(url: SplitResult, address: _Address) -> Any:
    """Return a connection that will go to the address that was checked."""
    is_safe = url.scheme == "https"
    kind: Any = http.client.HTTPSConnection if is_safe else http.client.HTTPConnection
    connection = kind(url.hostname, address[1], timeout=CONNECT_SECONDS)

    def connect(_: Any, timeout: Any = None, *__: Any) -> socket.socket:
        try:
            return socket.create_connection(address, timeout)
        except OSError as error:
            raise OutageError(f"{url.netloc} cannot be reached: {error}") from error

    connection._create_connection = connect  # the name is kept for TLS and for the Host header
    return connection


def _check_status(url: str, status: int) -> None:
    if status >= 500 or status in _BUSY:
        raise OutageError(f"{url}: the server answers {status}")
    if status >= 400:
        raise FileNotFoundError(f"{url}: the server answers {status}")


def _read(answer: _Answer, most: int, *, stop_at_most: bool) -> bytes:
    """Read a body of at most so many bytes; a longer one is cut if ``stop_at_most``."""
    if not stop_at_most and (answer.size or 0) > most:
        raise _too_large(answer.url, most)
    began = time.monotonic()
    pieces = []
    count = 0
    while count < most or not stop_at_most:
        try:
            piece = answer.response.read1(2**16)
        except TimeoutError as error:
            detail = f"{answer.url}: no byte came for {CONNECT_SECONDS:g} s; give another copy"
            raise FetchError(detail, "timeout") from error
        if not piece:
            break
        pieces.append(piece)
        count += len(piece)
        if count > most and not stop_at_most:
            raise _too_large(answer.url, most)
        seconds = time.monotonic() - began
        is_slow = seconds > GRACE_SECONDS and count < LEAST_RATE * seconds
        if is_slow or time.monotonic() > answer.ends:
            detail = f"{answer.url}: {count} bytes came in {seconds:.0f} s; give a faster copy"
            raise FetchError(detail, "timeout")
    return b"".join(pieces)[:most]


def _too_large(url: str, most: int) -> FetchError:
    return FetchError(
        f"{url} has more than {most:,} bytes; cut the file, or copy it to this machine", "too_large"
    )
