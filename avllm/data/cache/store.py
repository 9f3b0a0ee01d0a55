"""A folder of features: what their addresses are made of, and the shards that hold them."""

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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from avllm.data.cache.disk import CacheError, Use, seconds_of, shards_of
from avllm.data.cache.hashes import file_hash
from avllm.data.media.load import MediaError
from avllm.data.reading import Place, Prepared
from avllm.data.schema import MediaPart, RowError, resolve
from avllm.data.store.storage import local_path
from avllm.tokens import EncoderInput

FORMAT = 2  # of an entry: 2 holds a clip's duration and side information beside its features
OPEN_SHARDS = 256  # of a process: each takes memory for its header, and one of the system's maps (65,530 of them)


@dataclass
class Filled:
    """What filling a cache did, in this process and (``found``, ``wanted``) over all.

    Attributes:
        wanted: distinct clips that the run needs; found: those of them that were there before.
        encoded: clips that this process encoded, ``size`` their bytes, ``seconds`` the time that it all took.
        failed: by key what was wrong with those that could not be.
    """

    wanted: int = 0
    found: int = 0
    encoded: int = 0
    size: int = 0
    seconds: float = 0.0
    failed: dict[str, MediaError | RowError] = field(default_factory=dict)

    def add(self, other: Filled) -> None:
        """Take in what one more shard was."""
        self.encoded, self.size = self.encoded + other.encoded, self.size + other.size
        self.failed |= other.failed


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over names, dtypes and bytes of all parameters and buffers."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def recipe(processor: Any, encoders: nn.ModuleDict, precision: str, dtype: str | None = None) -> dict[str, Any]:
    """Everything besides the clip that decides its features, JSON-able.

    Raises:
        CacheError: an encoder trains, so that features of now would be wrong a step later.
    """
    for stream, encoder in encoders.items():
        training = next((n for n, p in encoder.named_parameters() if p.requires_grad), None)
        if training:
            raise CacheError(
                f"data.cache is set, but `trainable` trains encoders.{stream}.{training}; "
                "freeze the encoder or leave out data.cache"
            )
    return {
        "format": FORMAT,
        "preprocessing": {s: p.settings() for s, p in sorted(processor.preprocessors.items())},
        "sampling": repr(processor.sampling),
        "encoders": {s: encoder_recipe(e) for s, e in sorted(encoders.items())},
        "precision": precision,
        "dtype": dtype,
    }


def encoder_recipe(encoder: Any) -> dict[str, Any]:
    """What decides an encoder's features: its class, weights, options (which layer, which tokens) and config.

    Left out of the config is what names where it came from: a later stage reads the same encoder from a checkpoint.
    """
    config = encoder.backbone_config.to_dict()
    named = ("architectures", "dtype", "torch_dtype", "transformers_version")
    return {
        "class": f"{type(encoder).__module__}:{type(encoder).__qualname__}",
        "options": encoder.options(),
        "config": {k: v for k, v in config.items() if k not in named and not k.startswith("_")},
        "weights": weights_digest(encoder),
    }


class FeatureCache:
    """A folder of features.

    Args:
        folder: of the cache, shared by any number of runs.
        made_by: see :func:`recipe`.

    Attributes:
        index: by key the shard of each entry.
        costs: by shard the seconds that decoding and encoding an entry took when it was made.
        failed: what was wrong with media that could not be decoded when the cache was filled.
        filled: what the last filling did.
    """

    def __init__(self, folder: str | Path, made_by: dict[str, Any]) -> None:
        self.folder = local_path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.made_by = json.dumps(made_by, sort_keys=True)
        self.dtype = made_by["dtype"]
        self.index: dict[str, str] = {}
        self.keys: dict[str, str] = {}
        self.costs: dict[str, tuple[float, float]] = {}
        self.failed: dict[str, MediaError | RowError] = {}
        self._shards: dict[tuple[int, str], Any] = {}
        self.filled = Filled()
        self._use: Use | None = None
        self.read_index()

    @property
    def use(self) -> Use:
        """That this run reads from the folder; no shard leaves it meanwhile but by this run's own wish."""
        self._use = self._use or Use(self.folder)
        return self._use

    def read_index(self) -> None:
        """Look at the headers of shards that are new since the last time, and forget those that have left."""
        paths = shards_of(self.folder)
        there = {path.name for path in paths}
        self.index = {key: shard for key, shard in self.index.items() if shard in there}
        known = set(self.index.values())
        for path in paths:
            if path.name in known:
                continue
            try:
                with open_shard(path) as shard:
                    keys = {name.partition("/")[0] for name in shard.keys()}  # noqa: SIM118 (safe_open is no mapping)
                self._read_costs(path)
            except FileNotFoundError:  # it has left since: before it holds the folder, a run keeps nobody from that
                continue
            for key in keys:
                self.index.setdefault(key, path.name)

    def _read_costs(self, shard: Path) -> None:
        path = seconds_of(shard)
        if not path.is_file():
            return
        try:
            decoding, encoding = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CacheError(
                f"{path} is damaged ({error}); delete it: it says how long its clips took, no more"
            ) from error
        self.costs[shard.name] = (decoding, encoding)

    def shards(self, keys: Iterable[str]) -> set[str]:
        """Names of the shards that hold the entries that are there."""
        return {self.index[key] for key in keys if key in self.index}

    def key(self, place: Place, content: str | None = None) -> str:
        """The address of a media part's features; kept.

        Args:
            content: hash of its file, see :class:`avllm.data.cache.hashes.Hashes`; None reads the file.
        """
        name = place_name(place)
        if name not in self.keys:
            part, path = place[1].model_dump(mode="json", exclude={part_field(place[1])}), resolve(place[1], place[0])
            parts = [self.made_by, json.dumps(part, sort_keys=True), content or file_hash(path)]
            self.keys[name] = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
        return self.keys[name]

    def get(self, place: Place) -> Prepared:
        """The streams of a media part with their features.

        Raises:
            MediaError, RowError: what was found wrong when the cache was filled. KeyError: it was never filled.
        """
        name = place_name(place)
        if name in self.failed:
            raise self.failed[name]
        key = self.key(place)
        shard = self._shard(self.index[key])
        found: dict[str, dict[str, Tensor]] = {}
        for full in shard.keys():  # noqa: SIM118 (safe_open is no mapping)
            owner, stream, kind = full.split("/", 2)
            if owner == key and stream:
                found.setdefault(stream, {})[kind] = shard.get_tensor(full)
        return {stream: _unpack(parts) for stream, parts in sorted(found.items())}

    def _shard(self, name: str) -> Any:
        place = (os.getpid(), name)  # a handle does not survive the fork into a loader worker
        if place not in self._shards:
            if len(self._shards) >= OPEN_SHARDS:
                self._shards.pop(next(iter(self._shards)))
            self._shards[place] = open_shard(self.folder / name)
        return self._shards[place]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}, "_use": None}

    def for_writing(self) -> FeatureCache:
        """The same folder and recipe without what is known of their entries: all that a process needs to add some."""
        empty = copy(self)
        empty.index, empty.keys, empty.costs, empty.failed, empty.filled = {}, {}, {}, {}, Filled()
        return empty

    def put(self, clips: dict[str, Prepared], decode_seconds: float = 0.0, encode_seconds: float = 0.0) -> int:
        """Write clips (by key) as one shard.

        Args:
            clips: features by stream.
            decode_seconds, encode_seconds: what each of them took in the mean; kept beside the shard, whose bytes
                follow from its clips alone.

        Returns:
            bytes of the shard.
        """
        tensors: dict[str, Tensor] = {}
        for key, clip in clips.items():
            tensors[f"{key}//"] = torch.zeros(0)  # a clip without any stream is an entry too
            for stream, item in clip.items():
                tensors |= {f"{key}/{stream}/{kind}": t.contiguous() for kind, t in _pack(item, self.dtype).items()}
        name = hashlib.sha256("".join(sorted(clips)).encode()).hexdigest()[:32] + ".safetensors"
        partial = self.folder / f".{name}.{os.getpid()}.partial"
        partial.write_text(json.dumps([decode_seconds, encode_seconds]), encoding="utf-8")
        partial.replace(seconds_of(self.folder / name))  # before the shard: it is there for whoever sees the shard
        save_file(tensors, partial)
        size = partial.stat().st_size
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(self.folder / name)
        return size


def open_shard(path: Path) -> Any:
    """A shard for reading.

    Raises:
        CacheError: it is damaged. FileNotFoundError: it is not there.
    """
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise CacheError(
            f"{path} is no whole shard of features ({error}); delete it, and what it held is made anew"
        ) from error


def place_name(place: Place) -> str:
    """A media part of a manifest's folder as one text."""
    return f"{place[0]}|{place[1].model_dump_json()}"


def part_field(part: MediaPart) -> str:
    """The field that holds the file's name: it is no part of the address, the content is."""
    return part.type


def _pack(item: EncoderInput, dtype: str | None) -> dict[str, Tensor]:
    cast = getattr(torch, dtype) if dtype else None
    features = {f"layer/{k}": v.to(cast) if cast else v for k, v in (item.features or {}).items()}
    extra = {f"extra/{k}": v for k, v in item.extra.items()}
    duration = {} if item.duration is None else {"duration": torch.tensor(item.duration, dtype=torch.float64)}
    return {"span": item.span, "mask": item.mask, **features, **extra, **duration}


def _unpack(parts: dict[str, Tensor]) -> EncoderInput:
    features = {k.removeprefix("layer/"): v for k, v in parts.items() if k.startswith("layer/")}
    extra = {k.removeprefix("extra/"): v for k, v in parts.items() if k.startswith("extra/")}
    duration = float(parts["duration"]) if "duration" in parts else None
    return EncoderInput({}, parts["span"], parts["mask"], features, extra, duration)
