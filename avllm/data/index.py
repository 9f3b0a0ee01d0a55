"""A manifest of any size as a sequence of samples: rows stay on the disk, an index knows where each begins.

Every row is validated once, when the index is built (in parallel, some 20 microseconds a row): a malformed row stops a
run before it starts, not in its third day. The index is a numpy array, 32 bytes a row, kept in the cache folder and
mapped into memory, so that processes and loader workers share it. Its file's name holds the manifest's size, time
and SHA-256: another time alone costs one reading of the bytes, other bytes are indexed anew.
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
from avllm.log import logger

LOG = logger(__name__)
ROW = np.dtype([("offset", "<i8"), ("size", "<u4"), ("line", "<u4"), ("id", "<u8"), ("media", "<u8")])
"""Where a row's bytes are, its line from 1, the hash of its id, and that of its media parts (0: it has none)."""

FORM = "1"  # of the array; another form is another file name
CHUNK = 16 * 2**20  # bytes of a manifest that are indexed at a time
KEPT_FROM = 10_000  # rows: an index of fewer is made faster than found
KEPT_SAMPLES = 2_000  # rows of a manifest that stay parsed, about 4 kB each


class Manifest(Sequence[Sample]):
    """The rows of a manifest, read when asked for; picklable.

    Args:
        path: a JSONL file, or an fsspec URL of one (copied into the cache folder first).

    Attributes:
        name: as given. root: the folder that relative media paths start from.
        rows: ``(N,)`` of :data:`ROW`.

    Raises:
        ManifestError: the file is missing or empty, a row is malformed, or an id occurs twice.
    """

    def __init__(self, path: str | Path) -> None:
        self.name, self.root = str(path), parent_of(path)
        self.path = local_copy(path)
        self.rows = index_of(self.path, self.name)
        self._file: int | None = None
        self._kept: dict[int, Sample] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, row: int) -> Sample: ...
    @overload
    def __getitem__(self, row: slice) -> list[Sample]: ...
    def __getitem__(self, row: int | slice) -> Sample | list[Sample]:
        """The sample of a row, counted from 0.

        Raises:
            ManifestError: the file was changed since it was indexed. IndexError: there is no such row.
        """
        if isinstance(row, slice):
            return [self[n] for n in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        if row not in self._kept:
            if len(self._kept) >= KEPT_SAMPLES:
                self._kept.pop(next(iter(self._kept)))
            self._kept[row] = self._read(row)
        return self._kept[row]

    def _read(self, row: int) -> Sample:
        entry = self.rows[row]
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        # pread has no position that processes could fight over: a forked worker reads on with the same descriptor
        line = os.pread(self._file, int(entry["size"]), int(entry["offset"]))
        where = f"{self.name} line {entry['line']}"
        changed = ManifestError(f"{where} is another row than when the run began; a manifest must not change under it")
        try:
            sample = parse_row(line, where)
        except ManifestError as error:
            raise changed from error
        if hash_of(sample.id) != int(entry["id"]):
            raise changed
        return sample

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None, "_kept": {}}

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]


def hash_of(text: str) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def media_hash(sample: Sample) -> int:
    """Equal for samples that show the same media in the same order; 0 without media."""
    media = sample.media
    return max(1, hash_of(repr([part.__dict__ for part in media]))) if media else 0


def index_of(path: Path, name: str | None = None) -> np.ndarray:
    """The index of a manifest, ``(N,)`` of :data:`ROW`: the one that is kept, or made anew and kept.

    Args:
        path: a JSONL file. name: what errors call it.

    Raises:
        ManifestError: the file is missing or empty, a row is malformed, or an id occurs twice.
    """
    name = name or str(path)
    if not path.is_file():
        raise ManifestError(f"{name} is not a file; expected a manifest (JSONL, one sample a line)")
    kept = _kept_index(path)
    if kept is not None:
        return np.load(kept, mmap_mode="r")
    with _unchanged(path, name):
        index = build_index(path, name)
        if len(index) < KEPT_FROM:
            return index
        try:
            return _keep(path, index)
        except OSError as error:
            LOG.warning(
                "the index of %s cannot be kept (%s) and is made each time; let AVLLM_CACHE name a folder that "
                "can be written",
                name,
                error,
            )
            return index


def _folder() -> Path:
    return cache_folder() / "manifests"


def _stem(path: Path) -> str:
    return f"{hash_of(str(path.resolve())):016x}.{FORM}"


def _kept_index(path: Path) -> Path | None:
    """The file of an index that fits the manifest as it is now."""
    state, stem = path.stat(), _stem(path)
    fitting = next(_folder().glob(f"{stem}.{state.st_size}.{state.st_mtime_ns}.*.npy"), None)
    others = [] if fitting else list(_folder().glob(f"{stem}.{state.st_size}.*.npy"))
    if not others:
        return fitting
    sha = digest(path)
    same = next((other for other in others if other.name.split(".")[-2] == sha), None)
    if same is None:
        return None
    try:
        return same.replace(same.with_name(f"{stem}.{state.st_size}.{state.st_mtime_ns}.{sha}.npy"))
    except FileNotFoundError:  # another run that starts now has just done it
        return _kept_index(path)


def _keep(path: Path, index: np.ndarray) -> np.ndarray:
    """Write an index beside those of other manifests, in the place of older ones of this one; returns it mapped."""
    folder, state, stem = _folder(), path.stat(), _stem(path)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{stem}.{os.getpid()}.partial"
    with partial.open("wb") as file:
        np.save(file, index)
        file.flush()
        os.fsync(file.fileno())  # one that a power cut left half written would be taken for whole
    older = list(folder.glob(f"{stem}.*.npy"))
    final = partial.replace(folder / f"{stem}.{state.st_size}.{state.st_mtime_ns}.{digest(path)}.npy")
    for other in older:
        if other != final:
            other.unlink(missing_ok=True)
    return np.load(final, mmap_mode="r")


@contextmanager
def _unchanged(path: Path, name: str) -> Iterator[None]:
    before = path.stat()
    yield
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ManifestError(f"{name} was written to while it was read; start again when it is whole")


class _Chunk(NamedTuple):
    """What became of a piece of a manifest: its rows (lines counted from the piece's begin), its number of lines, and
    the line and text of the first error."""

    rows: np.ndarray
    lines: int
    error: tuple[int, str] | None


def build_index(path: Path, name: str, processes: int | None = None, chunk: int = CHUNK) -> np.ndarray:
    """Read, validate and index all rows.

    Args:
        path: a JSONL file. name: what errors call it.
        processes: that read; None for one a core. chunk: bytes that one reads at a time.
    """
    begins = list(range(0, path.stat().st_size, chunk))
    workers = min(processes or _cores(), len(begins))
    parts: list[np.ndarray] = []
    lines = 0
    for part in _map(_read_chunk, [(path, begin, chunk) for begin in begins], workers):
        if part.error is not None:
            raise ManifestError(f"{name} line {lines + part.error[0]}: {part.error[1]}")
        part.rows["line"] += lines
        parts.append(part.rows)
        lines += part.lines
    index = np.concatenate(parts) if parts else np.empty(0, ROW)
    if not len(index):
        raise ManifestError(f"{name} holds no row; expected one JSON object a line")
    _refuse_doubled_ids(path, name, index)
    return index


def _cores() -> int:
    """Cores that this process may use; all of the machine's where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _map(function: Callable[[Any], _Chunk], jobs: list[Any], workers: int) -> Iterator[_Chunk]:
    if workers < 2:
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(workers) as pool:
        try:
            yield from track(pool.map(function, jobs), "reading rows", total=len(jobs), transient=True)
        finally:
            pool.shutdown(cancel_futures=True)


def _read_chunk(job: tuple[Path, int, int]) -> _Chunk:
    """Index the lines that begin within ``chunk`` bytes from ``begin``."""
    path, begin, chunk = job
    entries: list[tuple[int, int, int, int, int]] = []
    number, error = 0, None
    for number, offset, line in _lines(path, begin, chunk):
        if not line.strip():
            continue
        try:
            sample = parse_row(line, "")
        except ManifestError as found:
            error = (number, str(found).removeprefix(": "))
            break
        entries.append((offset, len(line), number, hash_of(sample.id), media_hash(sample)))
    return _Chunk(np.array(entries, ROW), number, error)


def _lines(path: Path, begin: int, chunk: int) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, offset, bytes) of the lines that begin in a piece of a file."""
    with path.open("rb") as file:
        offset = begin
        if begin:
            file.seek(begin - 1)
            offset += len(file.readline()) - 1  # the line that began before belongs to the piece before
        for number, line in enumerate(file, start=1):
            if offset >= begin + chunk:
                return
            yield number, offset, line
            offset += len(line)


def _refuse_doubled_ids(path: Path, name: str, index: np.ndarray) -> None:
    order = np.argsort(index["id"], kind="stable")
    hashes = index["id"][order]
    suspects = np.flatnonzero(hashes[1:] == hashes[:-1])
    seen: dict[str, int] = {}
    with path.open("rb") as file:
        for row in sorted({int(order[n + step]) for n in suspects for step in (0, 1)}):
            file.seek(int(index["offset"][row]))
            id, line = parse_row(file.read(int(index["size"][row])), name).id, int(index["line"][row])
            if id in seen:
                raise ManifestError(f"{name} line {line}: id {id!r} stands already in line {seen[id]}")
            seen[id] = line
