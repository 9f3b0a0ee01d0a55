"""Read and write a folder of features: shards of entries with hashes of all inputs as keys."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avllm.data.cache.disk import CacheError, FolderInUse, cost_file, shards_of
from avllm.data.cache.hashes import file_hash
from avllm.data.cache.shard_file import (
    DamagedShardError,
    is_intact,
    keys_of,
    open_shard,
    read_entry,
    whole_file,
    write_shard,
)
from avllm.data.media.load import MediaError
from avllm.data.reading import Place, Prepared
from avllm.data.schema import MediaPart, RowError, resolve
from avllm.data.store.storage import local_path
from avllm.errors import writing
from avllm.log import logger
from avllm.tokens import EncoderInput

LOG = logger(__name__)
# Open shards of a process. Each takes memory for its header, and one of the system's 65,530 maps.
OPEN_SHARDS = 256


@dataclass(frozen=True)
class Cost:
    """Hold the mean seconds that decoding and encoding a clip took when its shard was made."""

    decoding: float
    encoding: float


@dataclass
class Filled:
    """Report on the filling of a cache, or of one shard.

    Attributes:
        needed: distinct clips that the run needs, over all processes.
        cached: those of them that the cache held before, over all processes.
        encoded: clips that this process encoded.
        size: their bytes.
        seconds: that filling took.
        failed: errors of clips that could not be encoded, by key.
    """

    needed: int = 0
    cached: int = 0
    encoded: int = 0
    size: int = 0
    seconds: float = 0.0
    failed: dict[str, MediaError | RowError] = field(default_factory=dict)

    def add(self, other: Filled) -> None:
        """Add the report of one more shard."""
        self.encoded += other.encoded
        self.size += other.size
        self.failed |= other.failed


class FeatureCache:
    """Hold a folder of features.

    Args:
        folder: of the cache, shared by any number of runs.
        made_by: see :func:`recipe`.

    Attributes:
        index: file name of the shard that holds an entry, by the entry's key.
        keys: key of each media part that was asked for, by :func:`place_name`.
        costs: what an entry took to make, by shard.
        failed: errors of media that could not be decoded when the cache was filled, by
            :func:`place_name`.
        filled: report of the last filling.
    """

    def __init__(self, folder: str | Path, made_by: dict[str, Any]) -> None:
        self.folder = local_path(folder)
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.made_by = json.dumps(made_by, sort_keys=True)
        self.dtype = made_by["dtype"]
        self.index: dict[str, str] = {}
        self._entries: dict[str, set[str]] = {}  # the keys in each shard that was opened
        self._checked: set[str] = set()  # keys of entries that this process has checked
        self.keys: dict[str, str] = {}
        self.costs: dict[str, Cost] = {}
        self.failed: dict[str, MediaError | RowError] = {}
        self._open_shards: dict[tuple[int, str], Any] = {}
        self.filled = Filled()
        self._in_use: FolderInUse | None = None
        self.read_index()

    def mark_in_use(self) -> FolderInUse:
        """Keep other runs from deleting shards of the folder while this object lives."""
        if self._in_use is None:
            self._in_use = FolderInUse(self.folder)
        return self._in_use

    def read_index(self) -> None:
        """Read the headers of the folder's shards and note which shard holds which entry.

        A shard is opened once. Entries of deleted shards are forgotten, unless another has them. A
        shard that cannot be read is deleted: its features are made again.
        """
        paths = shards_of(self.folder)
        names = {path.name for path in paths}
        self.index = {key: shard for key, shard in self.index.items() if shard in names}
        self._entries = {shard: keys for shard, keys in self._entries.items() if shard in names}
        for path in paths:
            if path.name not in self._entries:
                try:
                    with open_shard(path) as shard:
                        keys = keys_of(shard)
                    self._read_cost(path)
                except FileNotFoundError:  # another run deleted it, see `mark_in_use`
                    continue
                except DamagedShardError as error:
                    LOG.warning("%s; its features are made again", error)
                    keys = set()
                    if os.access(self.folder, os.W_OK):
                        path.unlink(missing_ok=True)
                self._entries[path.name] = keys
            for key in self._entries[path.name]:
                self.index.setdefault(key, path.name)  # two runs may have encoded the same clip

    def check(self, shard: str, keys: Iterable[str]) -> bool:
        """Compare entries of a shard with their checksums; return whether all are intact."""
        try:
            opened = open_shard(self.folder / shard)
        except (DamagedShardError, FileNotFoundError):
            return False
        for key in keys:
            if not is_intact(opened, key, read_entry(opened, key)):
                return False
            self._checked.add(key)
        return True

    def remove(self, damaged: Iterable[tuple[str, str]]) -> None:
        """Take entries, by shard and key, out of the folder; intact ones beside them stay."""
        keys_by_shard: dict[str, set[str]] = {}
        for shard, key in damaged:
            keys_by_shard.setdefault(shard, set()).add(key)
        for name, keys in keys_by_shard.items():
            path = self.folder / name
            others = self._intact(path, self._entries[name] - keys)
            if others:
                other = self.folder / shard_name(others)
                if cost_file(path).is_file():
                    cost_file(path).replace(cost_file(other))
                write_shard(other, others)
            cost_file(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    @staticmethod
    def _intact(path: Path, keys: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of those of a shard's entries that have their checksums."""
        try:
            shard = open_shard(path)
        except (DamagedShardError, FileNotFoundError):
            return {}
        entries = {key: read_entry(shard, key) for key in sorted(keys)}
        return {key: entry for key, entry in entries.items() if is_intact(shard, key, entry)}

    def forget(self, damaged: Iterable[tuple[str, str]]) -> None:
        """Read the index again, without entries that are given by shard and key."""
        self._open_shards.clear()
        self._entries.clear()
        self.index.clear()
        self.read_index()
        for shard, key in damaged:
            if self.index.get(key) == shard:  # the folder cannot be written to
                del self.index[key]
                self._entries[shard].discard(key)

    def _read_cost(self, shard: Path) -> None:
        path = cost_file(shard)
        if not path.is_file():
            return
        try:
            decoding, encoding = map(float, json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise CacheError(
                f"{path} is damaged ({error}); delete it: it only holds how long its clips took",
                reason="damaged_times",
            ) from error
        self.costs[shard.name] = Cost(decoding, encoding)

    def shards(self, keys: Iterable[str]) -> set[str]:
        """Return the names of the shards that hold entries with these keys."""
        return {self.index[key] for key in keys if key in self.index}

    def key(self, place: Place, content: str | None = None) -> str:
        """Return the key of a media part's features; it is computed once.

        Args:
            place: the media part and its folder.
            content: hash of its file, see :class:`avllm.data.cache.hashes.Hashes`; None = read it.
        """
        name = place_name(place)
        if name not in self.keys:
            root, part = place
            # The file's content is part of the key, its name is not.
            fields = part.model_dump(mode="json", exclude={part_field(part)})
            content = content or file_hash(resolve(part, root))
            inputs = [self.made_by, json.dumps(fields, sort_keys=True), content]
            self.keys[name] = hashlib.sha256("\n".join(inputs).encode()).hexdigest()[:32]
        return self.keys[name]

    def get(self, place: Place) -> Prepared:
        """Return the streams of a media part with their features.

        Raises:
            MediaError, RowError: the part could not be decoded when the cache was filled.
            KeyError: the cache does not hold it.
        """
        name = place_name(place)
        if name in self.failed:
            raise self.failed[name]
        key = self.key(place)
        tensors = self._checked_entry(key)
        streams: dict[str, dict[str, Tensor]] = {}
        for tensor_name, tensor in tensors.items():
            stream, kind = tensor_name.split("/", 1)
            if stream:
                streams.setdefault(stream, {})[kind] = tensor
        return {stream: _unpack(tensors) for stream, tensors in sorted(streams.items())}

    def _checked_entry(self, key: str) -> dict[str, Tensor]:
        """Return the tensors of an entry; it is checked when this process reads it first."""
        try:
            shard = self._shard(self.index[key])
            tensors = read_entry(shard, key)
        except FileNotFoundError:
            tensors = {}
        if not tensors:  # another run found damaged entries in the shard, and wrote the rest again
            self.forget([])
            if key not in self.index:
                raise self._fault(f"{self.folder} has lost the features of this clip")
            shard = self._shard(self.index[key])
            tensors = read_entry(shard, key)
        if key not in self._checked:
            if not is_intact(shard, key, tensors):
                path = self.folder / self.index[key]
                raise self._fault(f"the features in {path} differ from their checksum")
            self._checked.add(key)
        return tensors

    @staticmethod
    def _fault(seen: str) -> RowError:
        return RowError("damaged_features", f"{seen}; they are made again when a run starts")

    def _shard(self, name: str) -> Any:
        """Open a shard, or return it when it is among those last opened."""
        handle = (os.getpid(), name)  # an open shard does not survive the fork into a loader worker
        if handle not in self._open_shards:
            if len(self._open_shards) >= OPEN_SHARDS:
                oldest = next(iter(self._open_shards))
                del self._open_shards[oldest]
            self._open_shards[handle] = open_shard(self.folder / name)
        return self._open_shards[handle]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open_shards": {}, "_in_use": None}

    def for_writing(self) -> FeatureCache:
        """Return a cache with the same folder and recipe and no index, to be sent to a process."""
        empty = copy(self)
        empty.index = {}
        empty.keys = {}
        empty.costs = {}
        empty.failed = {}
        empty.filled = Filled()
        return empty

    def put(
        self,
        clips: dict[str, Prepared],
        decode_seconds: float = 0.0,
        encode_seconds: float = 0.0,
    ) -> int:
        """Write clips (by key) as one shard.

        Args:
            clips: features by stream.
            decode_seconds: mean time to decode one of them. It lies beside the shard, whose bytes
                depend on its clips alone.
            encode_seconds: mean time to encode one of them.

        Returns:
            bytes of the shard.
        """
        entries: dict[str, dict[str, Tensor]] = {}
        for key, clip in clips.items():
            entries[key] = {"/": torch.zeros(0)}  # a clip without any stream is an entry too
            for stream, item in clip.items():
                for kind, tensor in _pack(item, self.dtype).items():
                    entries[key][f"{stream}/{kind}"] = tensor.contiguous()
        path = self.folder / shard_name(clips)
        with whole_file(cost_file(path)) as partial:
            # Before the shard, so that whoever sees the shard finds its times.
            partial.write_text(json.dumps([decode_seconds, encode_seconds]), encoding="utf-8")
        write_shard(path, entries)
        return path.stat().st_size


def shard_name(keys: Iterable[str]) -> str:
    """Return the file name of a shard, which follows from its entries."""
    return hashlib.sha256("".join(sorted(keys)).encode()).hexdigest()[:32] + ".safetensors"


def place_name(place: Place) -> str:
    """Return a media part and its folder as one text."""
    return f"{place[0]}|{place[1].model_dump_json()}"


def part_field(part: MediaPart) -> str:
    """Return the field that holds the file's name."""
    return part.type


def _pack(item: EncoderInput, dtype: str | None) -> dict[str, Tensor]:
    """Return an input's tensors by name, its features in ``dtype`` (None = their own)."""
    tensors = {"span": item.span, "mask": item.mask}
    for layer, features in (item.features or {}).items():
        tensors[f"layer/{layer}"] = features.to(getattr(torch, dtype)) if dtype else features
    for name, extra in item.extra.items():
        tensors[f"extra/{name}"] = extra
    if item.duration is not None:
        tensors["duration"] = torch.tensor(item.duration, dtype=torch.float64)
    return tensors


def _unpack(tensors: dict[str, Tensor]) -> EncoderInput:
    """Return the input that :func:`_pack` was given, without the encoder's inputs."""
    features = {}
    extra = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "layer":
            features[rest] = tensor
        elif kind == "extra":
            extra[rest] = tensor
    duration = float(tensors["duration"]) if "duration" in tensors else None
    return EncoderInput({}, tensors["span"], tensors["mask"], features, extra, duration)
