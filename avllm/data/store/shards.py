"""Pack manifests and their media into tar shards, with a manifest that locates each file in them.

The shards have WebDataset's layout (https://github.com/webdataset/webdataset): what belongs to a
row shares one key, ``KEY.json`` with the row and ``KEY.0.mp4``, ``KEY.1.wav``, ... with its media.
Training reads them through the manifest, row by row and in any order, as it reads single files;
copied to an object store, the manifest is read at its URL. A file that several rows show is stored
once, with the first of them.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from avllm.data.index import Manifest
from avllm.data.manifest import digest
from avllm.data.schema import MediaPart, Sample, resolve
from avllm.data.store.access import lies_below
from avllm.data.store.output_folder import OutputFolder
from avllm.data.store.storage import byte_range_of, open_bytes, size_of, url_of
from avllm.errors import UserError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class ShardError(UserError):
    """Shards cannot be written: the message names the folder or file, and what to do."""


@dataclass
class PackedManifest:
    """Report the shards of one manifest.

    Attributes:
        manifest: path or URL of the manifest that was written.
        rows: in it.
        shards: tar files beside it.
        size: their bytes.
        dropped: rows left out, by reason; ``NAME.dropped.jsonl`` names them.
    """

    manifest: Path | str
    rows: int = 0
    shards: int = 0
    size: int = 0
    dropped: dict[str, int] = field(default_factory=dict)


def pack_shards(
    manifests: Sequence[str | Path],
    output: str | Path,
    shard_size: int = 10**9,
    roots: Sequence[str | Path] = (),
) -> list[PackedManifest]:
    """Write shards of several manifests into a folder; after an interruption, continue them.

    Args:
        manifests: JSONL files with different names.
        output: folder, or an fsspec URL of one, for ``NAME-000000.tar``, ..., ``NAME.jsonl`` and,
            where rows had to be left out, ``NAME.dropped.jsonl``.
        shard_size: largest number of bytes of a shard, apart from the last row's own size when the
            row is larger, and tar's padding (10 kB).
        roots: further folders whose files may be put into shards, beside each manifest's own. Rows
            that name files elsewhere are left out (``outside``): whoever wrote a row could
            otherwise publish any file that this user may read.

    Raises:
        ManifestError: a manifest is missing or malformed. ShardError: two manifests have one name,
            or the folder holds shards of other data. StoreError: the URL cannot be opened.
    """
    counts = Counter(Path(manifest).stem for manifest in manifests)
    for name, count in counts.items():
        if count > 1:
            raise ShardError(
                f"several manifests are named {name!r}; shards are named after them, so rename one",
                reason="same_name",
            )
    folder = OutputFolder(output)
    return [_Packing(Manifest(path), folder, shard_size, roots).run() for path in manifests]


def parse_size(text: str) -> int:
    """Return ``1GB``, ``500 MB`` or ``2000000`` in bytes; 1,000 MB are a GB.

    Raises:
        ShardError: the text is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise ShardError(
            f"shard size {text!r}; expected a number of bytes, for example 500MB or 1GB",
            reason="no_size",
        )
    return size


class _Packing:
    """Write the shards of one manifest.

    A note on each finished shard lies in a hidden folder until the last shard is written, so that a
    second run continues after the last finished one.
    """

    def __init__(
        self,
        manifest: Manifest,
        output: OutputFolder,
        shard_size: int,
        roots: Sequence[str | Path],
    ) -> None:
        self.manifest = manifest
        self.roots = [manifest.root, *roots]
        self.output = output
        self.shard_size = shard_size
        self.name = Path(manifest.name).stem
        self.output_name = f"{self.name}.jsonl"
        self.notes = f".{self.name}.packing"
        self.summary = f".{self.name}.packed.json"  # of the finished shards: settings and counts
        self.locations: dict[str, str] = {}  # media file -> its member in the shards
        self._check_other_folder()

    def _check_other_folder(self) -> None:
        """Refuse to write the new manifest over the one that is packed."""
        source = url_of(self.manifest.name) or self.manifest.path.resolve()
        target = self.output.location(self.output_name)
        if isinstance(target, Path):
            target = target.resolve()
        if source == target:
            raise ShardError(
                f"{self.output} holds {self.manifest.name} itself; give another folder",
                reason="own_folder",
            )

    def run(self) -> PackedManifest:
        """Write the shards that are missing, then the manifest."""
        if self.output.size(self.output_name) is not None:
            return self._read_summary()
        self._check_settings()
        number, row = self._read_progress()
        with Progress() as progress:
            bar = progress.add_task(f"packing {self.name}", total=len(self.manifest), completed=row)
            while row < len(self.manifest):
                row = self._write_shard(number, row)
                progress.update(bar, completed=row)
                number += 1
        return self._write_manifest()

    def _write_shard(self, number: int, first_row: int) -> int:
        """Write one shard and its note; return the first row of the next shard."""
        file_name = f"{self.name}-{number:06d}.tar"
        row = first_row
        with _open_shard(self.output, file_name) as shard:
            while row < len(self.manifest) and self._add_row(shard, row):
                row += 1
        note = {
            "done": row,
            "rows": shard.rows,
            "places": shard.locations,
            "dropped": shard.dropped,
        }
        note_text = json.dumps(note, ensure_ascii=False)
        self.output.write(f"{self.notes}/{number:06d}.json", note_text)
        return row

    def _add_row(self, shard: _Shard, row: int) -> bool:
        """Add a row to a shard, or note why it is dropped; return False when the shard is full."""
        sample = self.manifest[row]
        files = [str(resolve(part, self.manifest.root)) for part in sample.media]
        new_files = dict.fromkeys(file for file in files if file not in self.locations)
        for file in new_files:
            if not self._may_be_packed(file):
                shard.drop(sample, file, "outside")
                return True
        sizes = {file: size_of(file) for file in new_files}
        for file, size in sizes.items():
            if not size:
                shard.drop(sample, file, "missing" if size is None else "zero_byte")
                return True
        if shard.rows and shard.size + sum(size or 0 for size in sizes.values()) > self.shard_size:
            return False
        self.locations |= shard.add(row, sample, files, self.locations)
        return True

    def _may_be_packed(self, file: str) -> bool:
        """Return True for files below the manifest's folder or a root, and for URLs."""
        byte_range = byte_range_of(file)
        shard = file if byte_range is None else byte_range.file
        if url_of(shard):
            return True  # what a URL may name is decided where it is fetched
        folders = [root for root in self.roots if not url_of(root)]
        return lies_below(shard, folders)

    def _settings(self) -> dict[str, Any]:
        roots = [str(root) for root in self.roots[1:]]
        settings = {"manifest": digest(self.manifest.path), "shard_size": self.shard_size}
        return settings | ({"roots": roots} if roots else {})

    def _read_summary(self) -> PackedManifest:
        """Return the report of shards that an earlier run finished with the same settings."""
        summary: dict[str, Any] = {}
        if self.output.size(self.summary) is not None:
            summary = json.loads(self.output.read(self.summary))
        target = self.output.location(self.output_name)
        if summary.pop("asked", None) != self._settings():
            raise ShardError(
                f"{target} exists already, with shards of another {self.name} or of another size; "
                f"give a folder without it. To pack again, delete it and {self.name}-*.tar",
                reason="other_shards",
            )
        return PackedManifest(target, **summary)

    def _check_settings(self) -> None:
        """Record the settings, and refuse to continue the shards of other settings."""
        note = f"{self.notes}/asked.json"
        settings = self._settings()
        if self.output.size(note) is not None and json.loads(self.output.read(note)) != settings:
            raise ShardError(
                f"{self.output} holds unfinished shards of another {self.name}, or another "
                f"size; delete {self.output.location(self.notes)} to start again",
                reason="other_unfinished",
            )
        self.output.write(note, json.dumps(settings))

    def _finished_shards(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield file name and note of each finished shard."""
        for note in self.output.names(self.notes):
            number, _, suffix = note.rpartition("/")[2].partition(".")
            if number.isdigit() and suffix == "json":
                yield f"{self.name}-{number}.tar", json.loads(self.output.read(note))

    def _read_progress(self) -> tuple[int, int]:
        """Return the number of finished shards and of rows in them, dropped ones included."""
        shards = 0
        rows = 0
        for _, note in self._finished_shards():
            self.locations |= note["places"]
            shards += 1
            rows = note["done"]
        return shards, rows

    def _write_manifest(self) -> PackedManifest:
        packed = PackedManifest(self.output.location(self.output_name))
        dropped: list[dict[str, str]] = []
        with self.output.writing(self.output_name) as partial:
            with partial.open("w", encoding="utf-8") as file:
                for shard, note in self._finished_shards():
                    file.writelines(row + "\n" for row in note["rows"])
                    packed.rows += len(note["rows"])
                    packed.shards += 1
                    packed.size += self.output.size(shard) or 0
                    dropped += note["dropped"]
            # Before the manifest gets its name: whoever sees it may rely on the other files.
            self._write_summary(packed, dropped)
        self.output.remove(self.notes)
        return packed

    def _write_summary(self, packed: PackedManifest, dropped: list[dict[str, str]]) -> None:
        """Write the dropped rows and the counts."""
        if dropped:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in dropped)
            self.output.write(f"{self.name}.dropped.jsonl", lines)
        packed.dropped = dict(Counter(row["reason"] for row in dropped))
        if not packed.rows:
            raise ShardError(
                f"no row of {self.manifest.name} can be packed: {packed.dropped}; repair "
                f"the media, then delete {self.output.location(self.notes)}",
                reason="no_rows",
            )
        counts = {name: value for name, value in vars(packed).items() if name != "manifest"}
        self.output.write(self.summary, json.dumps({"asked": self._settings(), **counts}))


@contextmanager
def _open_shard(folder: OutputFolder, file_name: str) -> Iterator[_Shard]:
    """Open a shard for writing; it gets its name when the block ends without an error."""
    with (
        folder.writing(file_name) as partial,
        tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as tar,
    ):
        yield _Shard(file_name, tar)


class _Shard:
    """Add rows and their media to a tar file.

    Attributes:
        rows: JSON of each row, with its media located in the shards.
        locations: media file -> its member, of the files in this shard.
        dropped: rows left out, each with its id, reason and file.
    """

    def __init__(self, file_name: str, tar: tarfile.TarFile) -> None:
        self.file_name = file_name
        self.rows: list[str] = []
        self.locations: dict[str, str] = {}
        self.dropped: list[dict[str, str]] = []
        self._tar = tar

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._tar.offset

    def add(
        self,
        number: int,
        sample: Sample,
        files: list[str],
        stored: dict[str, str],
    ) -> dict[str, str]:
        """Store a row with its new files.

        Args:
            number: of the row in its manifest.
            sample: the row.
            files: of its media parts, in order.
            stored: locations of files in earlier rows.

        Returns:
            the locations of the files that were added.
        """
        added: dict[str, str] = {}
        for index, file in enumerate(files):
            if file in stored or file in added:
                continue
            member = f"{number:09d}.{index}{Path(file).suffix.lower() or '.bin'}"
            size = size_of(file) or 0
            with open_bytes(file) as content:
                offset = self._write_member(member, size, content)
            added[file] = f"{self.file_name}#{offset}+{size}/{member}"
        paths = [added[file] if file in added else stored[file] for file in files]
        row = with_media_paths(sample, paths)
        text = json.dumps(row, ensure_ascii=False)
        content_of_row = text.encode()
        self._write_member(f"{number:09d}.json", len(content_of_row), io.BytesIO(content_of_row))
        self.rows.append(text)
        self.locations |= added
        return added

    def drop(self, sample: Sample, file: str, reason: str) -> None:
        """Note a row that is left out because of a media file."""
        self.dropped.append({"id": sample.id, "reason": reason, "detail": file})

    def _write_member(self, member: str, size: int, content: Any) -> int:
        """Append a file; return the offset of its first byte."""
        info = tarfile.TarInfo(member)  # without time and owner: equal rows make equal bytes
        info.size = size
        header = info.tobuf(self._tar.format, self._tar.encoding or "utf-8", "strict")
        first = self._tar.offset + len(header)
        self._tar.addfile(info, content)
        return first


def with_media_paths(sample: Sample, paths: Sequence[str]) -> dict[str, Any]:
    """Return a row as JSON, with these paths for its media parts, in order."""
    row = sample.model_dump(mode="json", exclude_none=True)
    remaining = iter(paths)
    for message, turn in zip(sample.messages, row["messages"], strict=True):
        for part, entry in zip(message.content, turn["content"], strict=True):
            if isinstance(part, MediaPart):
                entry[part.type] = next(remaining)
    return row
