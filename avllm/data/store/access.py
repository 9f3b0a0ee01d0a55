"""Decide which files and URLs a row of media may name: rows may come from others.

Without settings, rows name any local file and any URL, except for http addresses of private
networks. ``--media-root FOLDER`` admits local files below these folders alone, and then URLs only
as ``--allow-url`` names them. The settings lie in environment variables, which worker processes
inherit.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from avllm.errors import OutageError, UserError

ROOTS = "AVLLM_MEDIA_ROOTS"
URLS = "AVLLM_ALLOW_URLS"


class AccessError(UserError):
    """A row names a file or URL that it may not name. The reason is ``forbidden``."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail, reason="forbidden")

    def __reduce__(self) -> tuple[type[AccessError], tuple[object, ...]]:
        return type(self), self.args  # for worker processes


@dataclass(frozen=True)
class Access:
    """Hold folders and URLs that rows may name; empty ones say nothing.

    Attributes:
        roots: folders, resolved.
        urls: ``https://host/path``, ``s3://bucket`` or a scheme alone, ``https``.
    """

    roots: tuple[str, ...] = ()
    urls: tuple[str, ...] = ()


def allow(roots: Sequence[str | os.PathLike[str]] = (), urls: Sequence[str] = ()) -> None:
    """Restrict what rows may name, in this process and in those that it starts.

    Raises:
        UserError: a root is no folder.
    """
    folders = []
    for root in roots:
        if not os.path.isdir(root):
            raise UserError(f"--media-root {root} is no folder; expected one with media")
        folders.append(os.path.realpath(root))
    if folders:
        os.environ[ROOTS] = os.pathsep.join(folders)
    if urls:
        os.environ[URLS] = " ".join(urls)


def current() -> Access:
    """Return the settings of this process."""
    roots = os.environ.get(ROOTS, "")
    return Access(
        tuple(root for root in roots.split(os.pathsep) if root),
        tuple(os.environ.get(URLS, "").split()),
    )


def check_file(path: str | os.PathLike[str]) -> None:
    """Refuse a local file outside of the media roots; links are followed first.

    Raises:
        AccessError: it lies outside.
    """
    roots = current().roots
    if roots and not lies_below(path, roots):
        raise AccessError(
            f"{os.fspath(path)} lies outside of {', '.join(roots)}; if the row may show it, name "
            "its folder with --media-root"
        )


def lies_below(path: str | os.PathLike[str], roots: Sequence[str | os.PathLike[str]]) -> bool:
    """Return True if a file lies in one of the folders or below; links are followed first."""
    real = os.path.realpath(path)
    for root in roots:
        folder = os.path.realpath(root)
        if real == folder or real.startswith(folder.rstrip(os.sep) + os.sep):
            return True
    return False


def check_url(url: str) -> None:
    """Refuse a URL that rows may not name.

    Raises:
        AccessError: ``--allow-url`` names others, or ``--media-root`` is given alone.
    """
    access = current()
    if access.urls and any(_matches(urlsplit(url), rule) for rule in access.urls):
        return
    if access.urls or access.roots:
        allowed = ", ".join(access.urls) or "none"
        raise AccessError(
            f"{url} is not among the allowed URLs ({allowed}); if the row may show it, name it "
            "with --allow-url"
        )


def _matches(url: SplitResult, rule: str) -> bool:
    """Return True if a rule admits a URL: the same scheme and host, and a path below the rule's."""
    expected = urlsplit(rule if "://" in rule else f"{rule.rstrip(':')}://")
    if url.scheme != expected.scheme:
        return False
    if expected.netloc and url.netloc.lower() != expected.netloc.lower():
        return False
    path = os.path.normpath(url.path or "/")  # no climbing out with ..
    folder = expected.path.rstrip("/")
    return path == folder or path.startswith(folder + "/")


def public_address(url: SplitResult) -> tuple[str, int]:
    """Return address and port of a URL's host, which the connection then uses.

    Hosts that ``--allow-url`` names may have private addresses, others may not: a row could
    otherwise read what only this machine reaches (its own services, a cloud's metadata).

    Raises:
        AccessError: the address is private. FileNotFoundError: there is no such host.
        OutageError: names cannot be looked up now.
    """
    host = url.hostname or ""
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise OutageError(f"{host} cannot be looked up: {error}; is the network up?") from error
        raise FileNotFoundError(f"there is no host {host!r} ({error})") from error
    except UnicodeError as error:
        raise FileNotFoundError(f"{host!r} is no name of a host") from error
    address = str(found[0][4][0])
    if not ipaddress.ip_address(address.partition("%")[0]).is_global and not _is_named(url):
        raise AccessError(
            f"{host} has the private address {address}; a row may not name it, unless you do: "
            f"--allow-url {url.scheme}://{url.netloc}"
        )
    return address, port


def _is_named(url: SplitResult) -> bool:
    rules = [urlsplit(rule) for rule in current().urls if "://" in rule]
    return any(rule.netloc and rule.netloc.lower() == url.netloc.lower() for rule in rules)
