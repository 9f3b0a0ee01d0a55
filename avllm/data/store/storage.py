"""Where a file's bytes are: a file of this machine, a URL that fsspec knows, or a member of a tar shard in either.

A member is written ``SHARD.tar#OFFSET+SIZE/NAME``: the bytes are found without looking through the shard, so a row of a
shard is read as any other row, in any order.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from avllm.errors import UserError

MEMBER = re.compile(r"(?P<shard>.+\.tar)#(?P<offset>\d+)\+(?P<size>\d+)/(?P<name>[^/]+)")
URL = re.compile(r"(?P<protocol>[a-z][a-z0-9+.-]+):/{1,2}(?P<rest>[^/].*)")  # one slash: what pathlib leaves of two
FILE_URL = re.compile(r"(?:file|local):/{1,3}(?P<rest>[^/].*)")  # an absolute path: there is no other machine in it
PACKAGES = {
    **dict.fromkeys(["s3", "s3a"], "s3fs"),
    **dict.fromkeys(["gs", "gcs"], "gcsfs"),
    **dict.fromkeys(["az", "abfs", "adl"], "adlfs"),
    **dict.fromkeys(["http", "https"], "aiohttp requests"),
    **dict.fromkeys(["sftp", "ssh"], "paramiko"),
}
"""What fsspec needs beside itself for the stores that most media lie in. It has no say in versions: s3fs wants the
fsspec of its own number, so pip has to choose both."""


class StoreError(UserError):
    """A URL of a store that cannot be reached from here, or that is no place for what shall be written."""


class Place(NamedTuple):
    """Bytes that are no plain local file: ``size`` of them from ``offset`` of a file, or all of it when None."""

    file: str
    offset: int
    size: int | None


def place_of(path: str | Path) -> Place | None:
    """Where a shard's member or a URL is; None for a plain file of this machine."""
    text = url_of(path) or str(plain(path))
    member = MEMBER.fullmatch(text)
    if member:
        return Place(member["shard"], int(member["offset"]), int(member["size"]))
    return Place(text, 0, None) if url_of(path) else None


def url_of(path: str | Path) -> str | None:
    """The URL that a text or a path stands for, or None. ``Path("s3://a/b")`` has lost a slash; it is put back.

    ``file:///a/b`` is none: it is a file of this machine, see :func:`plain`.
    """
    found = None if FILE_URL.fullmatch(str(path)) else URL.fullmatch(str(path))
    return f"{found['protocol']}://{found['rest']}" if found else None


def plain(path: str | Path) -> Path:
    """``file:///a/b`` as ``/a/b``; any other path as it is."""
    found = FILE_URL.fullmatch(str(path))
    return Path(f"/{found['rest']}" if found else path)


def here(path: str | Path) -> Path:
    """A path of this machine for what is written here.

    Raises:
        StoreError: it is a URL of a store, which pathlib would take for a folder named ``s3:``.
    """
    if url_of(path):
        raise StoreError(
            f"{url_of(path)} is a URL of a store; expected a path of this machine (into stores writes `avllm data "
            "pack` alone). Write here and copy it, or mount the store"
        )
    return plain(path)


def parent_of(path: str | Path) -> Path:
    """The folder of a file or URL."""
    return plain(path).parent


def size_of(path: str | Path) -> int | None:
    """Bytes of a file, member or URL; None when there is no such file.

    Raises:
        StoreError: it cannot be opened from here. OSError, or what the store raises: it did not answer, or refuses to.
    """
    place = place_of(path)
    if place is None:
        path = plain(path)
        return os.path.getsize(path) if os.path.isfile(path) else None
    if url_of(place.file):
        there = (_remote(place.file) or {}).get("size")
    else:
        there = os.path.getsize(place.file) if os.path.isfile(place.file) else None
    if there is None or place.size is None:
        return there
    return max(0, min(place.size, there - place.offset))


def sha256(path: str | Path) -> str:
    """SHA-256 of the bytes of a file, member or URL, in hex.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    with open_bytes(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_bytes(path: str | Path) -> io.BufferedReader | io.BytesIO:
    """Open a file, member or URL for reading; it has the name of the file, as far as decoders go by names.

    Raises:
        FileNotFoundError: there is no such file.
    """
    place = place_of(path)
    if place is None:
        return open(plain(path), "rb")
    if url_of(place.file):
        return _Named(_fetch(place), str(path))
    return io.BufferedReader(_Window(place, str(path)))


class _Named(io.BytesIO):
    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name


class _Window(io.RawIOBase):
    """A range of a local file as a file of its own."""

    def __init__(self, place: Place, name: str) -> None:
        self.name = name
        self._file = open(place.file, "rb")  # noqa: SIM115 (closed in close)
        self._first, self._at = place.offset, 0
        self._size = max(0, min(place.size or 0, os.fstat(self._file.fileno()).st_size - place.offset))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = os.pread(self._file.fileno(), min(len(buffer), max(0, self._size - self._at)), self._first + self._at)
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        self._file.close()
        super().close()


@functools.lru_cache(maxsize=2)  # a decoder opens a file more than once: headers, then packets
def _fetch(place: Place) -> bytes:
    files, name = file_system(place.file)
    if place.size is None:
        return files.cat_file(name)
    return files.cat_file(name, start=place.offset, end=place.offset + place.size)


def file_system(url: str) -> tuple[Any, str]:
    """What fsspec reads and writes a URL with, and what it calls the file.

    Raises:
        StoreError: its package is not installed, or there is no such protocol.
    """
    import fsspec

    # asked for each time: fsspec itself keeps file systems, one set a process, so that workers may be forked
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(url.partition(":")[0])
        todo = f"expected: pip install {package}" if package else "install what it names"
        raise StoreError(f"{url} cannot be opened: {error}; {todo}") from error
    except ValueError as error:
        raise StoreError(f"{url} cannot be opened: {error}; expected a URL that fsspec knows, or a path") from error


def _remote(url: str) -> dict[str, Any] | None:
    """What a store says of a file; None when there is no such file. Any other failure is no answer, and is raised."""
    files, name = file_system(url)
    try:
        found = files.info(name)
    except FileNotFoundError:
        return None
    return found if found["type"] == "file" else None


def cache_folder() -> Path:
    """Where indexes and copies of remote manifests are kept: ``AVLLM_CACHE``, else ``~/.cache/avllm``."""
    if "AVLLM_CACHE" in os.environ:
        return Path(os.environ["AVLLM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "avllm"


def local_copy(path: str | Path) -> Path:
    """The file itself, or a copy of what a URL holds, fetched anew when that has changed.

    Raises:
        FileNotFoundError: the URL leads nowhere.
    """
    url = url_of(path)
    if url is None:
        return plain(path)
    found = _remote(url)
    if found is None:
        raise FileNotFoundError(f"{url} is not there; expected a manifest (JSONL, one sample a line)")
    # fsspec's own mark (``ukey``) takes what http serves for unchanging; where http leads may be another URL each time
    marks = sorted((key, str(value)) for key, value in found.items() if key != "url")
    state = hashlib.sha256(f"{url} {marks}".encode()).hexdigest()[:32]
    copy = cache_folder() / "remote" / f"{state}.jsonl"
    if not copy.is_file():
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(f".{copy.name}.{os.getpid()}.partial")
        files, name = file_system(url)
        files.get_file(name, str(partial))
        partial.replace(copy)
    return copy
