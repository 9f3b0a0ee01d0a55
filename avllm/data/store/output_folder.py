"""A folder that files are written into, here or in a store that fsspec knows: each is there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from avllm.data.store.storage import file_system, plain, url_of


class OutputFolder:
    """A folder, or a URL of one.

    A store gets a file when it is finished here (in the system's folder for passing files, ``TMPDIR``): object stores
    show it when its last byte has arrived. On this machine it is written beside its place and renamed.

    Args:
        path: it is made where it is not there.

    Raises:
        StoreError: the URL cannot be opened from here.
    """

    def __init__(self, path: str | Path) -> None:
        self.url = url_of(path)
        self.path = plain(path)
        if self.url is None:
            self.path.mkdir(parents=True, exist_ok=True)
        else:
            self._store, self._root = file_system(self.url)

    def __str__(self) -> str:
        return self.url or str(self.path)

    def place(self, name: str) -> Path | str:
        """A file's path, or its URL."""
        return self.path / name if self.url is None else f"{self.url.rstrip('/')}/{name}"

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when there is none."""
        if self.url is None:
            return os.path.getsize(self.path / name) if (self.path / name).is_file() else None
        try:
            return int(self._store.info(self._in_store(name))["size"])
        except FileNotFoundError:
            return None

    def read(self, name: str) -> str:
        """The text of a file."""
        if self.url is None:
            return (self.path / name).read_text(encoding="utf-8")
        return str(self._store.cat_file(self._in_store(name)).decode())

    def write(self, name: str, text: str) -> None:
        """Write a text file."""
        with self.writing(name) as partial:
            partial.write_text(text, encoding="utf-8")

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path to write to; at the end of the block the file has its name, and when it fails nothing has."""
        if self.url is None:
            partial = self.path / f"{name}.partial"
            partial.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(self.path / name)
            return
        with tempfile.TemporaryDirectory() as passing:
            partial = Path(passing) / Path(name).name
            yield partial
            if "/" in name:  # object stores have no folders; others want them before the first file
                self._store.makedirs(self._in_store(name).rpartition("/")[0], exist_ok=True)
            self._store.put_file(str(partial), self._in_store(name))

    def names(self, folder: str) -> list[str]:
        """The files in a folder of this one, ``folder/file``, sorted; none when there is no such folder."""
        if self.url is None:
            return sorted(f"{folder}/{path.name}" for path in (self.path / folder).glob("*"))
        self._store.invalidate_cache()
        try:
            found = self._store.ls(self._in_store(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(f"{folder}/{path.rstrip('/').rpartition('/')[2]}" for path in found)

    def remove(self, folder: str) -> None:
        """Remove a folder of this one with its files."""
        for name in self.names(folder):
            if self.url is None:
                (self.path / name).unlink()
            else:
                self._store.rm_file(self._in_store(name))
        if self.url is None:
            (self.path / folder).rmdir()
        elif self._store.exists(self._in_store(folder)):
            self._store.rmdir(self._in_store(folder))

    def _in_store(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"
