"""Read bytes of local files, of URLs that fsspec opens, and of members of tar shards in either.

A member is written ``SHARD.tar#OFFSET+SIZE/NAME``. Its bytes are read without a search through the
shard, so that rows of a shard are read in any order, as rows with single files are.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from avllm.data.store.access import check_file, check_url
from avllm.data.store.http import MOST_BYTES, FetchError, fetch, size_of_url
from avllm.data.store.limits import ANSWER_SECONDS, NoAnswer, seconds_for, within
from avllm.errors import OutageError, UserError

MEMBER = re.compile(r"(?P<shard>.+\.tar)#(?P<offset>\d+)\+(?P<size>\d+)/(?P<name>[^/]+)")
# One slash after the colon is enough: pathlib leaves one of two.
URL = re.compile(r"(?P<protocol>[a-z][a-z0-9+.-]+):/{1,2}(?P<rest>[^/].*)")
# An absolute path of this machine: a file URL names no other machine here. With two slashes the
# machine may be given, and pathlib leaves one of the two.
FILE_URL = re.compile(r"(?P<scheme>file|local):(?:/{1,2}localhost/|/{1,3})(?P<rest>[^/].*)")
PACKAGES = {
    **dict.fromkeys(["s3", "s3a"], "s3fs"),
    **dict.fromkeys(["gs", "gcs"], "gcsfs"),
    **dict.fromkeys(["az", "abfs", "adl"], "adlfs"),
    **dict.fromkeys(["http", "https"], "aiohttp requests"),
    **dict.fromkeys(["sftp", "ssh"], "paramiko"),
}
"""Packages that fsspec needs for each protocol. They are named without versions: s3fs requires the
fsspec release with the same number, so pip has to choose both."""


class StoreError(UserError):
    """A store's URL cannot be reached from this machine, or cannot be written to."""


class ByteRange(NamedTuple):
    """Locate bytes that are no plain local file.

    Attributes:
        file: path or URL. offset: first byte. size: bytes; None = to the end.
    """

    file: str
    offset: int
    size: int | None


def byte_range_of(path: str | Path) -> ByteRange | None:
    """Locate a shard's member or a URL; return None for a plain local file."""
    url = url_of(path)
    text = url or str(without_file_scheme(path))
    member = MEMBER.fullmatch(text)
    if member and not os.path.isfile(text):  # a folder's name may look like a shard's member
        return ByteRange(member["shard"], int(member["offset"]), int(member["size"]))
    return ByteRange(text, 0, None) if url else None


def url_of(path: str | Path) -> str | None:
    """Return the URL that a text or path denotes, or None when it is a path of this machine.

    ``Path("s3://a/b")`` has lost a slash; it is put back. ``file:///a/b`` gives None: it is a file
    of this machine, see :func:`without_file_scheme`.
    """
    if FILE_URL.fullmatch(str(path)):
        return None
    url = URL.fullmatch(str(path))
    return f"{url['protocol']}://{url['rest']}" if url else None


def without_file_scheme(path: str | Path) -> Path:
    """Return ``file:///a/b`` as ``/a/b``, and any other path unchanged."""
    file_url = FILE_URL.fullmatch(str(path))
    if file_url is None:
        return Path(path)
    rest = file_url["rest"]
    if file_url["scheme"] == "file":  # such URLs write %20 for a space, and so on
        rest = unquote(rest, errors="surrogateescape")
    return Path(f"/{rest}")


def is_utf8(text: str) -> bool:
    """Return whether a text can be written as UTF-8; names of files may hold other bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_utf8(text: str, name: str) -> None:
    """Refuse a text that cannot be written as UTF-8.

    Raises:
        UserError: no_utf8, with the text's ``name``.
    """
    if not is_utf8(text):
        seen = f"{name} {ascii(text)} holds half of a character (a lone surrogate)"
        raise UserError(f"{seen}; expected text in UTF-8", reason="no_utf8")


def name_in_utf8(path: str | Path) -> str:
    """Return a path as a row may hold it: a name in other bytes than UTF-8 becomes a file URL."""
    name = str(path)
    return name if is_utf8(name) else f"file://{quote(os.fsencode(os.path.abspath(name)))}"


def local_path(path: str | Path) -> Path:
    """Return a path of this machine that may be written to.

    Raises:
        StoreError: it is a URL of a store, which pathlib would take for a folder named ``s3:``.
    """
    url = url_of(path)
    if url:
        raise StoreError(
            f"{url} is a URL of a store; expected a path of this machine (only `avllm data pack` "
            "writes to stores). Write to a local folder and copy it, or mount the store",
            reason="not_local",
        )
    return without_file_scheme(path)


def parent_of(path: str | Path) -> Path:
    """Return the folder of a file or URL."""
    return without_file_scheme(path).parent


def size_of(path: str | Path) -> int | None:
    """Return the bytes of a file, member or URL; None when there is no such file.

    Raises:
        StoreError: the URL cannot be opened from this machine. OSError, or what the store raises:
            it did not answer, or refuses to.
    """
    byte_range = byte_range_of(path)
    if byte_range is None:
        return _local_size(without_file_scheme(path))
    measure = _remote_size if url_of(byte_range.file) else _local_size
    file_size = measure(byte_range.file)
    if file_size is None or byte_range.size is None:
        return file_size
    return max(0, min(byte_range.size, file_size - byte_range.offset))


def check_access(path: str | Path) -> None:
    """Refuse a file, member or URL that rows may not name.

    Raises:
        AccessError: see :mod:`avllm.data.store.access`.
    """
    byte_range = byte_range_of(path)
    file = str(without_file_scheme(path)) if byte_range is None else byte_range.file
    if url_of(file):
        check_url(file)
    else:
        check_file(file)


def _remote_size(url: str) -> int | None:
    if _is_http(url):
        return size_of_url(url)
    check_url(url)
    info = _remote_info(url)
    return None if info is None else info["size"]


def _is_http(url: str) -> bool:
    return url.partition(":")[0] in ("http", "https")


def _local_size(path: str | Path) -> int | None:
    return os.path.getsize(path) if os.path.isfile(path) else None


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of the bytes of a file, member or URL, in hex.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    with open_bytes(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_bytes(path: str | Path) -> io.BufferedReader | io.BytesIO:
    """Open a file, member or URL for reading, with a ``name`` for decoders that read suffixes.

    Raises:
        FileNotFoundError: there is no such file.
    """
    byte_range = byte_range_of(path)
    if byte_range is None:
        return open(without_file_scheme(path), "rb")
    if url_of(byte_range.file):
        return _NamedBytes(_fetch(byte_range), str(path))
    return io.BufferedReader(_FileRange(byte_range, str(path)))


class _NamedBytes(io.BytesIO):
    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name


class _FileRange(io.RawIOBase):
    """Present a range of a local file as a file."""

    def __init__(self, byte_range: ByteRange, name: str) -> None:
        self.name = name
        self._file = open(byte_range.file, "rb")  # noqa: SIM115 (closed in close)
        self._first = byte_range.offset
        self._position = 0  # relative to the first byte of the range
        available = os.fstat(self._file.fileno()).st_size - byte_range.offset
        self._size = max(0, min(byte_range.size or 0, available))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), max(0, self._size - self._position))
        content = os.pread(self._file.fileno(), count, self._first + self._position)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}
        self._position = max(0, offset + origins[whence])
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        self._file.close()
        super().close()


@functools.lru_cache(maxsize=2)  # a decoder opens a file more than once: headers, then packets
def _fetch(byte_range: ByteRange) -> bytes:
    if _is_http(byte_range.file):
        return fetch(byte_range.file, byte_range.offset, byte_range.size)
    check_url(byte_range.file)
    files, name = file_system(byte_range.file)
    url = byte_range.file
    if byte_range.size is None:
        info = _remote_info(url)
        if info is None:
            raise FileNotFoundError(f"{url} does not exist")
        size = info["size"]  # None where the store does not say it
        last = None
    else:
        size = byte_range.size
        last = byte_range.offset + size
    if size is not None and size > MOST_BYTES:
        raise FetchError(f"{url} has {size:,} bytes; at most {MOST_BYTES:,} are read", "too_large")
    seconds = seconds_for(size)
    try:
        return within(seconds, url, lambda: files.cat_file(name, start=byte_range.offset, end=last))
    except NoAnswer as error:
        detail = f"{url}: its bytes did not come in {seconds:.0f} s; give a faster copy"
        raise FetchError(detail, "timeout") from error


def file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the name of the file in it.

    Raises:
        StoreError: the protocol's package is not installed, or there is no such protocol.
    """
    import fsspec

    # Not cached here: fsspec keeps one set of file systems a process, so that workers may fork.
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(url.partition(":")[0])
        advice = f"run: pip install {package}" if package else "install the package that it names"
        message = f"{url} cannot be opened: {error}; {advice}"
        raise StoreError(message, reason="package_missing") from error
    except ValueError as error:
        raise StoreError(
            f"{url} cannot be opened: {error}; expected a URL that fsspec knows, or a path",
            reason="unknown_protocol",
        ) from error


def _remote_info(url: str) -> dict[str, Any] | None:
    """Return a store's description of a file; None when there is no such file.

    Any other failure is raised: a store that does not answer is no missing file.

    Raises:
        OutageError: it does not answer.
    """
    files, name = file_system(url)
    try:
        info = within(ANSWER_SECONDS, url, lambda: files.info(name))
    except FileNotFoundError:
        return None
    except NoAnswer as error:
        raise OutageError(str(error)) from error
    return info if info["type"] == "file" else None


def cache_folder() -> Path:
    """Return the folder for indexes and copies of remote manifests.

    It is ``AVLLM_CACHE``, else ``~/.cache/avllm``.
    """
    if "AVLLM_CACHE" in os.environ:
        return Path(os.environ["AVLLM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "avllm"


def local_copy(path: str | Path) -> Path:
    """Return a local file unchanged, and a URL as a local copy that is fetched when it changed.

    Raises:
        FileNotFoundError: there is no file at the URL.
    """
    url = url_of(path)
    if url is None:
        return without_file_scheme(path)
    info = _remote_info(url)
    if info is None:
        raise FileNotFoundError(f"{url} does not exist; expected a manifest (JSONL)")
    # fsspec's own mark (``ukey``) takes what http serves for unchanging. The final URL is left out,
    # since http may redirect to another one each time.
    marks = sorted((key, str(value)) for key, value in info.items() if key != "url")
    state = hashlib.sha256(f"{url} {marks}".encode()).hexdigest()[:32]
    copy = cache_folder() / "remote" / f"{state}.jsonl"
    if not copy.is_file():
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(f".{copy.name}.{os.getpid()}.partial")
        files, name = file_system(url)
        files.get_file(name, str(partial))
        partial.replace(copy)
    return copy
