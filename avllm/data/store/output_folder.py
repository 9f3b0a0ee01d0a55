"""Write files into a local folder or a remote store, each of them whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from avllm.data.store.output_path import output_folder
from avllm.data.store.storage import file_system, url_of, without_file_scheme


class OutputFolder:
    """Hold a folder, or an fsspec URL of one.

    A local file is written under a partial name and renamed. A file for a store is finished in the
    system's temporary folder (``TMPDIR``) and then uploaded: object stores show a file when its
    last byte has arrived.

    Args:
        path: a local folder is created when it is missing.

    Raises:
        OutputPathError: the folder cannot be made or written to.
        StoreError: the URL cannot be opened from this machine.
    """

    def __init__(self, path: str | Path) -> None:
        self.url = url_of(path)
        self.path = without_file_scheme(path)
        if self.url is None:
            output_folder(self.path)
        else:
            self._store, self._root = file_system(self.url)

    def __str__(self) -> str:
        return self.url or str(self.path)

    def location(self, name: str) -> Path | str:
        """Return a file's path, or its URL."""
        if self.url is None:
            return self.path / name
        return f"{self.url.rstrip('/')}/{name}"

    def size(self, name: str) -> int | None:
        """Return the bytes of a file; None when there is none."""
        if self.url is None:
            path = self.path / name
            return os.path.getsize(path) if path.is_file() else None
        try:
            return int(self._store.info(self._in_store(name))["size"])
        except FileNotFoundError:
            return None

    def read(self, name: str) -> str:
        """Return the text of a file."""
        if self.url is None:
            return (self.path / name).read_text(encoding="utf-8")
        return str(self._store.cat_file(self._in_store(name)).decode())

    def write(self, name: str, text: str) -> None:
        """Write a text file."""
        with self.writing(name) as partial:
            partial.write_text(text, encoding="utf-8")

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a path to write to; the file gets its name when the block ends without an error."""
        if self.url is None:
            partial = self.path / f"{name}.partial"
            partial.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(self.path / name)
            return
        with tempfile.TemporaryDirectory() as temporary:
            partial = Path(temporary) / Path(name).name
            yield partial
            if "/" in name:  # object stores have no folders; other stores need them first
                self._store.makedirs(self._in_store(name).rpartition("/")[0], exist_ok=True)
            self._store.put_file(str(partial), self._in_store(name))

    def names(self, folder: str) -> list[str]:
        """List the files of a subfolder as ``folder/file``, sorted; none when it is missing."""
        if self.url is None:
            return sorted(f"{folder}/{path.name}" for path in (self.path / folder).glob("*"))
        self._store.invalidate_cache()
        try:
            paths = self._store.ls(self._in_store(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(f"{folder}/{path.rstrip('/').rpartition('/')[2]}" for path in paths)

    def remove(self, folder: str) -> None:
        """Remove a subfolder with its files."""
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
