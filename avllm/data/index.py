"""Read a manifest of any size as a sequence of samples on disk, located by an index.

Every row is validated once, when the index is built (in parallel, some 20 microseconds a row): a
malformed row stops a run before it starts, not on its third day. The index is a numpy array, 32
bytes a row, stored in the cache folder and mapped into memory, so that processes and loader workers
share it. Its file's name holds the manifest's size, time and SHA-256: when only the time differs,
the bytes are hashed once; when the bytes differ, the manifest is indexed again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from rich.progress import track

from avllm.data.manifest import ManifestError, digest, parse_row
from avllm.data.schema import Sample
from avllm.data.store.storage import cache_folder, local_copy, parent_of
from avllm.errors import looked_in
from avllm.log import logger

LOG = logger(__name__)
ROW = np.dtype(
    [("offset", "<i8"), ("size", "<u4"), ("line", "<u4"), ("id", "<u8"), ("media", "<u8")],
)
"""A row's bytes, its line from 1, and the hashes of its id and of its media parts (0 = none)."""

FORM = "1"  # version of the array, part of the file name
CHUNK = 16 * 2**20  # bytes of a manifest that are indexed at a time
STORED_FROM = 10_000  # rows: a smaller index is built faster than it is looked up
CACHED_SAMPLES = 2_000  # rows of a manifest that stay parsed, about 4 kB each


class Manifest(Sequence[Sample]):
    """Read the rows of a manifest when they are accessed; picklable.

    Args:
        path: a JSONL file, or an fsspec URL of one (copied into the cache folder first).

    Attributes:
        name: the path as given.
        root: the folder that relative media paths start from.
        path: of the local file.
        rows: ``(N,)`` of :data:`ROW`.

    Raises:
        ManifestError: the file is missing or empty, a row is malformed, or an id occurs twice.
    """

    def __init__(self, path: str | Path) -> None:
        self.name = str(path)
        self.root = parent_of(path)
        self.path = local_copy(path)
        self.rows = index_of(self.path, self.name)
        self._file: int | None = None
        self._samples: dict[int, Sample] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, row: int) -> Sample: ...
    @overload
    def __getitem__(self, row: slice) -> list[Sample]: ...
    def __getitem__(self, row: int | slice) -> Sample | list[Sample]:
        """Return the sample of a row, counted from 0.

        Raises:
            ManifestError: the file was changed after it was indexed. IndexError: there is no such
                row.
        """
        if isinstance(row, slice):
            return [self[n] for n in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        if row not in self._samples:
            if len(self._samples) >= CACHED_SAMPLES:
                oldest = next(iter(self._samples))
                del self._samples[oldest]
            self._samples[row] = self._read(row)
        return self._samples[row]

    def _read(self, row: int) -> Sample:
        entry = self.rows[row]
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        # pread has no shared position: forked workers read with the same descriptor.
        line = os.pread(self._file, int(entry["size"]), int(entry["offset"]))
        where = f"{self.name} line {entry['line']}"
        changed = ManifestError(
            f"{where} is another row than when the run began; "
            "do not change a manifest during a run",
            reason="changed",
        )
        try:
            sample = parse_row(line, where)
        except ManifestError as error:
            raise changed from error
        if hash_of(sample.id) != int(entry["id"]):
            raise changed
        return sample

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None, "_samples": {}}

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]


def hash_of(text: str) -> int:
    """Return 64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def media_hash(sample: Sample) -> int:
    """Return a hash that is equal for the same media in the same order; 0 without media."""
    fields = [part.__dict__ for part in sample.media]
    return max(1, hash_of(repr(fields))) if fields else 0


def index_of(path: Path, name: str | None = None) -> np.ndarray:
    """Return the index of a manifest, ``(N,)`` of :data:`ROW`: the stored one, or a new one.

    Args:
        path: a JSONL file.
        name: of the manifest in errors.

    Raises:
        ManifestError: the file is missing or empty, a row is malformed, or an id occurs twice.
    """
    name = name or str(path)
    if not path.is_file():
        raise ManifestError(
            f"{name} is not a file; expected a manifest (JSONL, one sample a line)"
            f"{looked_in(name)}",
            reason="missing",
        )
    stored = _stored_index(path)
    if stored is not None:
        return np.load(stored, mmap_mode="r")
    with _unchanged(path, name):
        index = build_index(path, name)
        if len(index) < STORED_FROM:
            return index
        try:
            return _store(path, index)
        except OSError as error:
            LOG.warning(
                "the index of %s cannot be stored (%s) and is made each time; set AVLLM_CACHE to a "
                "folder that can be written to",
                name,
                error,
            )
            return index


def _folder() -> Path:
    return cache_folder() / "manifests"


def _stem(path: Path) -> str:
    return f"{hash_of(str(path.resolve())):016x}.{FORM}"


def _stored_index(path: Path) -> Path | None:
    """Return the file of a stored index with the manifest's size and time, or with its bytes."""
    state = path.stat()
    stem = _stem(path)
    for stored in _folder().glob(f"{stem}.{state.st_size}.{state.st_mtime_ns}.*.npy"):
        return stored
    other_times = list(_folder().glob(f"{stem}.{state.st_size}.*.npy"))
    if not other_times:
        return None
    sha = digest(path)
    for stored in other_times:
        if stored.name.split(".")[-2] == sha:
            break
    else:
        return None
    try:
        name = f"{stem}.{state.st_size}.{state.st_mtime_ns}.{sha}.npy"
        return stored.replace(stored.with_name(name))
    except FileNotFoundError:  # another run that starts now has renamed it
        return _stored_index(path)


def _store(path: Path, index: np.ndarray) -> np.ndarray:
    """Write an index in place of older ones of the same manifest; return it mapped into memory."""
    folder = _folder()
    state = path.stat()
    stem = _stem(path)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{stem}.{os.getpid()}.partial"
    with partial.open("wb") as file:
        np.save(file, index)
        file.flush()
        os.fsync(file.fileno())  # a file that a power cut left incomplete would be used
    older = list(folder.glob(f"{stem}.*.npy"))
    name = f"{stem}.{state.st_size}.{state.st_mtime_ns}.{digest(path)}.npy"
    final = partial.replace(folder / name)
    for other in older:
        if other != final:
            other.unlink(missing_ok=True)
    return np.load(final, mmap_mode="r")


@contextmanager
def _unchanged(path: Path, name: str) -> Iterator[None]:
    """Raise an error when a manifest changes within the block."""
    before = path.stat()
    yield
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ManifestError(
            f"{name} was written to while it was read; start again when it is complete",
            reason="changed",
        )


class _Chunk(NamedTuple):
    """Hold the index of a piece of a manifest.

    Attributes:
        rows: with lines counted from the begin of the piece.
        lines: of the piece; up to the first error when there is one.
        error: the first error, which is in the last line, or "".
    """

    rows: np.ndarray
    lines: int
    error: str = ""


def build_index(
    path: Path,
    name: str,
    processes: int | None = None,
    chunk: int = CHUNK,
) -> np.ndarray:
    """Read, validate and index all rows.

    Args:
        path: a JSONL file.
        name: of the manifest in errors.
        processes: that read; None for one a core.
        chunk: bytes that a process reads at a time.

    Raises:
        ManifestError: the file is empty, a row is malformed, or an id occurs twice.
    """
    begins = list(range(0, path.stat().st_size, chunk))
    workers = min(processes or _cores(), len(begins))
    parts: list[np.ndarray] = []
    lines = 0
    for part in _map(_read_chunk, [(path, begin, chunk) for begin in begins], workers):
        if part.error:
            message = f"{name} line {lines + part.lines}: {part.error}"
            raise ManifestError(message, reason="malformed")
        part.rows["line"] += lines
        parts.append(part.rows)
        lines += part.lines
    index = np.concatenate(parts) if parts else np.empty(0, ROW)
    if not len(index):
        message = f"{name} holds no row; expected one JSON object a line"
        raise ManifestError(message, reason="empty")
    _refuse_doubled_ids(path, name, index)
    return index


def _cores() -> int:
    """Return the cores that this process may use; all of the machine's on other systems."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _map(function: Callable[[Any], _Chunk], jobs: list[Any], workers: int) -> Iterator[_Chunk]:
    if workers < 2:
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(workers) as pool:
        try:
            yield from track(
                pool.map(function, jobs),
                "reading rows",
                total=len(jobs),
                transient=True,
            )
        finally:
            pool.shutdown(cancel_futures=True)


def _read_chunk(job: tuple[Path, int, int]) -> _Chunk:
    """Index the lines that begin within ``chunk`` bytes from ``begin``."""
    path, begin, chunk = job
    entries: list[tuple[int, int, int, int, int]] = []  # the fields of ROW
    number = 0
    error = ""
    for number, offset, line in _lines(path, begin, chunk):
        if not line.strip():
            continue
        try:
            sample = parse_row(line, "")
        except ManifestError as malformed:
            error = str(malformed).removeprefix(": ")
            break
        entries.append((offset, len(line), number, hash_of(sample.id), media_hash(sample)))
    return _Chunk(np.array(entries, ROW), number, error)


def _lines(path: Path, begin: int, chunk: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield number (from 1), offset and bytes of the lines that begin in a piece of a file."""
    with path.open("rb") as file:
        offset = begin
        if begin:
            file.seek(begin - 1)
            # A line that began before this piece belongs to the piece before.
            offset += len(file.readline()) - 1
        for number, line in enumerate(file, start=1):
            if offset >= begin + chunk:
                return
            yield number, offset, line
            offset += len(line)


def _refuse_doubled_ids(path: Path, name: str, index: np.ndarray) -> None:
    """Raise an error when an id occurs twice; only rows with an equal hash are read."""
    order = np.argsort(index["id"], kind="stable")
    hashes = index["id"][order]
    repeats = np.flatnonzero(hashes[1:] == hashes[:-1])  # n: rows order[n] and order[n + 1]
    suspects = np.unique(np.concatenate([order[repeats], order[repeats + 1]])).tolist()
    line_of_id: dict[str, int] = {}
    with path.open("rb") as file:
        for row in suspects:
            file.seek(int(index["offset"][row]))
            identity = parse_row(file.read(int(index["size"][row])), name).id
            line = int(index["line"][row])
            if identity in line_of_id:
                raise ManifestError(
                    f"{name} line {line}: id {identity!r} occurs already in line "
                    f"{line_of_id[identity]}; give each row an id",
                    reason="duplicate_id",
                )
            line_of_id[identity] = line
