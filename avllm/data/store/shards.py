"""Manifests with their media -> tar shards, and a manifest beside them that says where in a shard each file lies.

The shards have WebDataset's layout (https://github.com/webdataset/webdataset): what belongs to a row stands together
under one key, ``KEY.json`` with the row and ``KEY.0.mp4``, ``KEY.1.wav``, ... with its media. Training reads them
through the manifest, row by row and in any order, as it reads single files; copied to an object store, its URL does. A
file that several rows show is stored once, with the first of them.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import track

from avllm.data.index import Manifest
from avllm.data.manifest import digest
from avllm.data.schema import Sample, TextPart, resolve
from avllm.data.store.output_folder import OutputFolder
from avllm.data.store.storage import open_bytes, size_of, url_of
from avllm.errors import UserError


class ShardError(UserError):
    """Shards cannot be written as asked."""


@dataclass
class Packed:
    """What became of a manifest.

    Attributes:
        manifest: path or URL of the one that was written. rows: in it. shards: files beside it. size: their bytes.
        dropped: rows left out, by reason; ``NAME.dropped.jsonl`` names them.
    """

    manifest: Path | str
    rows: int
    shards: int
    size: int
    dropped: dict[str, int] = field(default_factory=dict)


def pack_shards(manifests: Sequence[str | Path], output: str | Path, shard_size: int = 10**9) -> list[Packed]:
    """Write shards of several manifests into a folder; started again after an interruption, it goes on.

    Args:
        manifests: JSONL files with different names.
        output: folder, or an fsspec URL of one, for ``NAME-000000.tar``, ..., ``NAME.jsonl`` and, where rows had to
            be left out, ``NAME.dropped.jsonl``.
        shard_size: bytes that a shard does not pass, but for what a single row and tar's own padding (10 kB) take.

    Raises:
        ManifestError: a manifest is missing or malformed. ShardError: two have one name, or the folder holds shards of
            other data. StoreError: the URL cannot be opened from here.
    """
    names = [Path(m).stem for m in manifests]
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise ShardError(f"several manifests are named {doubled[0]!r}; shards are named after them, so rename one")
    folder = OutputFolder(output)
    return [_Packing(Manifest(m), folder, shard_size).run() for m in manifests]


def parse_size(text: str) -> int:
    """``1GB``, ``500 MB`` or ``2000000`` as bytes; a thousand MB are a GB.

    Raises:
        ShardError: no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if size < 1:
        raise ShardError(f"shard size {text!r}; expected bytes, for example 500MB or 1GB")
    return size


class _Packing:
    """The shards of one manifest. Notes on each finished shard lie in a hidden folder until the last is written."""

    def __init__(self, manifest: Manifest, output: OutputFolder, shard_size: int) -> None:
        self.manifest, self.output, self.shard_size = manifest, output, shard_size
        self.name = Path(manifest.name).stem
        self.final = f"{self.name}.jsonl"
        self.notes = f".{self.name}.packing"
        self.account = f".{self.name}.packed.json"  # of finished shards: what they were made of, and counts
        given = url_of(manifest.name) or manifest.path.resolve()
        if given == (output.place(self.final) if output.url else (output.path / self.final).resolve()):
            raise ShardError(f"{output} holds {manifest.name} itself; expected another folder for the shards")
        self.places: dict[str, str] = {}  # file -> where it is in the shards

    def run(self) -> Packed:
        """Write what is not yet there."""
        if self.output.size(self.final) is not None:
            return self._finished_before()
        self._check_same()
        finished, done = self._go_on()
        if done == len(self.manifest):
            return self._finish()
        rows = track(range(done, len(self.manifest)), f"packing {self.name}", completed=done, total=len(self.manifest))
        shard = _Shard(self.output, self.name, finished)
        for number in rows:
            sample = self.manifest[number]
            files = [str(resolve(part, self.manifest.root)) for part in sample.media]
            sizes = {file: size_of(file) or 0 for file in files if file not in self.places}
            lacking = next((file for file, size in sizes.items() if size == 0), None)
            if lacking is not None:
                shard.drop(sample, lacking)
                continue
            if shard.rows and shard.size + sum(sizes.values()) > self.shard_size:
                self._close(shard, number)
                shard = _Shard(self.output, self.name, shard.number + 1)
            self.places |= shard.add(number, sample, files, self.places)
        if shard.rows or shard.dropped:
            self._close(shard, len(self.manifest))
        return self._finish()

    def _asked(self) -> dict[str, Any]:
        return {"manifest": digest(self.manifest.path), "shard_size": self.shard_size}

    def _finished_before(self) -> Packed:
        known = self.output.size(self.account) is not None
        found = json.loads(self.output.read(self.account)) if known else {}
        if found.pop("asked", None) != self._asked():
            raise ShardError(
                f"{self.output.place(self.final)} is there already, with shards of another {self.name} or of another "
                f"size; expected a folder without it. To pack anew, delete it and {self.name}-*.tar"
            )
        return Packed(self.output.place(self.final), **found)

    def _check_same(self) -> None:
        note = f"{self.notes}/asked.json"
        if self.output.size(note) is not None and json.loads(self.output.read(note)) != self._asked():
            raise ShardError(
                f"{self.output} holds begun shards of another {self.name}; delete {self.output.place(self.notes)} to "
                "start anew"
            )
        self.output.write(note, json.dumps(self._asked()))

    def _finished(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and note of each finished shard."""
        for note in self.output.names(self.notes):
            number, _, ending = note.rpartition("/")[2].partition(".")
            if number.isdigit() and ending == "json":
                yield f"{self.name}-{number}.tar", json.loads(self.output.read(note))

    def _go_on(self) -> tuple[int, int]:
        """Finished shards, and rows that stand in them or were dropped; remembers where their files are."""
        shards, done = 0, 0
        for _, found in self._finished():
            self.places |= found["places"]
            shards, done = shards + 1, found["done"]
        return shards, done

    def _close(self, shard: _Shard, done: int) -> None:
        shard.close()
        content = {"done": done, "rows": shard.rows, "places": shard.places, "dropped": shard.dropped}
        self.output.write(f"{self.notes}/{shard.number:06d}.json", json.dumps(content, ensure_ascii=False))

    def _finish(self) -> Packed:
        packed = Packed(self.output.place(self.final), 0, 0, 0)
        dropped: list[dict[str, str]] = []
        with self.output.writing(self.final) as partial:
            with partial.open("w", encoding="utf-8") as file:
                for shard, found in self._finished():
                    file.writelines(row + "\n" for row in found["rows"])
                    packed.rows += len(found["rows"])
                    packed.shards += 1
                    packed.size += self.output.size(shard) or 0
                    dropped += found["dropped"]
            self._tell(packed, dropped)  # before the manifest has its name: with it all is there
        self.output.remove(self.notes)
        return packed

    def _tell(self, packed: Packed, dropped: list[dict[str, str]]) -> None:
        """Write down what was left out, and the counts."""
        if dropped:
            lines = "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in dropped)
            self.output.write(f"{self.name}.dropped.jsonl", lines)
        packed.dropped = dict(Counter(d["reason"] for d in dropped))
        if not packed.rows:
            raise ShardError(
                f"no row of {self.manifest.name} can be packed: {packed.dropped}; repair the files, delete "
                f"{self.output.place(self.notes)}"
            )
        counts = {name: value for name, value in vars(packed).items() if name != "manifest"}
        self.output.write(self.account, json.dumps({"asked": self._asked(), **counts}))


class _Shard:
    """A tar file that is being written; it has its name when it is whole."""

    def __init__(self, folder: OutputFolder, name: str, number: int) -> None:
        self.file, self.number = f"{name}-{number:06d}.tar", number
        self.rows: list[str] = []
        self.places: dict[str, str] = {}
        self.dropped: list[dict[str, str]] = []
        self._writing = folder.writing(self.file)
        self._tar = tarfile.open(self._writing.__enter__(), "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115 (closed in close)

    @property
    def size(self) -> int:
        """Bytes written."""
        return self._tar.offset

    def add(self, number: int, sample: Sample, files: list[str], elsewhere: dict[str, str]) -> dict[str, str]:
        """Store a row with those of its files that no shard holds yet; returns where these are."""
        new: dict[str, str] = {}
        for place, file in enumerate(files):
            if file not in elsewhere and file not in new:
                member = f"{number:09d}.{place}{Path(file).suffix.lower() or '.bin'}"
                size = size_of(file) or 0
                with open_bytes(file) as content:
                    new[file] = f"{self.file}#{self._write(member, size, content)}+{size}/{member}"
        row = json.dumps(rewritten(sample, [(elsewhere | new)[f] for f in files]), ensure_ascii=False)
        text = row.encode()
        self._write(f"{number:09d}.json", len(text), io.BytesIO(text))
        self.rows.append(row)
        self.places |= new
        return new

    def drop(self, sample: Sample, file: str) -> None:
        """Note a row whose file is not there."""
        reason = "missing" if size_of(file) is None else "zero_byte"
        self.dropped.append({"id": sample.id, "reason": reason, "detail": file})

    def _write(self, member: str, size: int, content: Any) -> int:
        """Append a file; returns where its bytes begin."""
        info = tarfile.TarInfo(member)  # no time and no owner: the same rows make the same bytes
        info.size = size
        first = self._tar.offset + len(info.tobuf(self._tar.format, self._tar.encoding or "utf-8", "strict"))
        self._tar.addfile(info, content)
        return first

    def close(self) -> None:
        """Give the file its name when every byte has been written."""
        self._tar.close()
        self._writing.__exit__(None, None, None)


def rewritten(sample: Sample, paths: Sequence[str]) -> dict[str, Any]:
    """A row as JSON with other paths for its media parts, in order."""
    row = sample.model_dump(mode="json", exclude_none=True)
    remaining: Iterator[str] = iter(paths)
    for message, turn in zip(sample.messages, row["messages"], strict=True):
        for part, entry in zip(message.content, turn["content"], strict=True):
            if not isinstance(part, TextPart):
                entry[part.type] = next(remaining)
    return row
