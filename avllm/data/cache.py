"""Features of frozen encoders, computed once: nothing is decoded or encoded a second time.

An entry is content-addressed: file hash, interval, preparation of frames and sound, the encoders' weights and
the dtype make up its key, so that any of them changing is a miss and never a wrong hit. Entries lie in safetensors
shards, each written whole or not at all; the shards' own headers are the index.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from avllm import distributed
from avllm.data.collate import gather_stream
from avllm.data.media import MediaError
from avllm.data.schema import MediaPart, RowError, resolve
from avllm.data.storage import open_bytes, size_of
from avllm.log import logger
from avllm.tokens import EncoderInput

LOG = logger(__name__)
Clip = dict[str, EncoderInput]
Place = tuple[Path, MediaPart]
"""A manifest's folder and a media part of one of its rows."""


class CacheError(ValueError):
    """The cache cannot be used for this run: its features would be wrong."""


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
        "preprocessing": {s: p.settings() for s, p in sorted(processor.preprocessors.items())},
        "sampling": repr(processor.sampling),
        "encoders": {s: weights_digest(e) for s, e in sorted(encoders.items())},
        "precision": precision,
        "dtype": dtype,
    }


class FeatureCache:
    """A folder of features.

    Args:
        folder: of the cache, shared by any number of runs.
        made_by: see :func:`recipe`.

    Attributes:
        failed: what was wrong with media that could not be decoded when the cache was filled.
    """

    def __init__(self, folder: str | Path, made_by: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.made_by = json.dumps(made_by, sort_keys=True)
        self.dtype = made_by["dtype"]
        self.index: dict[str, tuple[str, list[str]]] = {}
        self.keys: dict[str, str] = {}
        self.failed: dict[str, MediaError | RowError] = {}
        self._shards: dict[tuple[int, str], Any] = {}
        self.read_index()

    def read_index(self) -> None:
        """Look at the headers of shards that are new since the last time."""
        known = {shard for shard, _ in self.index.values()}
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in known:
                continue
            with safe_open(path, "pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (safe_open is no mapping)
                    self.index.setdefault(name.split("/")[0], (path.name, []))[1].append(name)

    def key(self, place: Place) -> str:
        """The address of a media part's features; the file's hash is taken once a run."""
        name = place_name(place)
        if name not in self.keys:
            part = place[1].model_dump(mode="json", exclude={part_field(place[1])})
            parts = [self.made_by, json.dumps(part, sort_keys=True), file_hash(resolve(place[1], place[0]))]
            self.keys[name] = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
        return self.keys[name]

    def get(self, place: Place) -> Clip:
        """The streams of a media part with their features.

        Raises:
            MediaError, RowError: what was found wrong when the cache was filled. KeyError: it was never filled.
        """
        name = place_name(place)
        if name in self.failed:
            raise self.failed[name]
        shard_name, tensors = self.index[self.key(place)]
        shard = self._shard(shard_name)
        found: dict[str, dict[str, Tensor]] = {}
        for full in tensors:
            _, stream, kind = full.split("/", 2)
            if stream:
                found.setdefault(stream, {})[kind] = shard.get_tensor(full)
        return {stream: _unpack(parts) for stream, parts in sorted(found.items())}

    def _shard(self, name: str) -> Any:
        place = (os.getpid(), name)  # a handle does not survive the fork into a loader worker
        if place not in self._shards:
            self._shards[place] = safe_open(self.folder / name, "pt")
        return self._shards[place]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}

    def put(self, clips: dict[str, Clip]) -> None:
        """Write clips (by key) as one shard."""
        tensors: dict[str, Tensor] = {}
        for key, clip in clips.items():
            tensors[f"{key}//"] = torch.zeros(0)  # a clip without any stream is an entry too
            for stream, item in clip.items():
                tensors |= {f"{key}/{stream}/{kind}": t.contiguous() for kind, t in _pack(item, self.dtype).items()}
        name = hashlib.sha256("".join(sorted(clips)).encode()).hexdigest()[:32] + ".safetensors"
        partial = self.folder / f".{name}.{os.getpid()}.partial"
        save_file(tensors, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(self.folder / name)


def place_name(place: Place) -> str:
    """A media part of a manifest's folder as one text."""
    return f"{place[0]}|{place[1].model_dump_json()}"


def part_field(part: MediaPart) -> str:
    """The field that holds the file's name: it is no part of the address, the content is."""
    return part.type


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, or its absence: the decoder will say what is wrong."""
    if size_of(path) is None:
        return f"absent: {path}"
    with open_bytes(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pack(item: EncoderInput, dtype: str | None) -> dict[str, Tensor]:
    cast = getattr(torch, dtype) if dtype else None
    features = {f"layer/{k}": v.to(cast) if cast else v for k, v in (item.features or {}).items()}
    return {"span": item.span, "mask": item.mask, **features}


def _unpack(parts: dict[str, Tensor]) -> EncoderInput:
    features = {k.removeprefix("layer/"): v for k, v in parts.items() if k.startswith("layer/")}
    return EncoderInput({}, parts["span"], parts["mask"], features)


@dataclass
class _Media:
    """Map-style: a media part -> its prepared streams, or what is wrong with it."""

    places: Sequence[Place]
    prepare: Callable[[Place], Clip]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> tuple[int, Clip | MediaError | RowError]:
        try:
            return number, self.prepare(self.places[number])
        except (MediaError, RowError) as error:
            return number, error


def fill(
    cache: FeatureCache,
    places: Iterable[Place],
    prepare: Callable[[Place], Clip],
    encoders: nn.ModuleDict,
    *,
    device: torch.device,
    num_workers: int = 0,
    batch_size: int = 32,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> int:
    """Decode and encode what the cache does not hold yet, shared out over the processes.

    Args:
        cache: to be filled.
        places: media parts; repeated ones count once.
        prepare: decodes a media part and prepares it for the encoders.
        encoders: frozen, by stream.
        device: that they run on.
        num_workers: processes that decode.
        batch_size: clips encoded at once and written as one shard.
        autocast: the precision that training runs in.

    Returns:
        how many clips this process encoded.
    """
    unique = list({place_name(p): p for p in places}.values())
    _share_keys(cache, unique)
    missing = list({cache.key(p): p for p in unique if cache.key(p) not in cache.index}.values())
    mine = missing[distributed.rank() :: distributed.world_size()]
    if missing:
        LOG.info("encoding %d of %d clips into %s", len(missing), len(unique), cache.folder)
    loader: DataLoader[Any] = DataLoader(
        _Media(mine, prepare),  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),
    )
    encoders.to(device).eval()
    failed: dict[str, MediaError | RowError] = {}
    for loaded in track(loader, "features", disable=not (mine and distributed.is_main())):
        good = {number: clip for number, clip in loaded if isinstance(clip, dict)}
        failed |= {cache.key(mine[number]): found for number, found in loaded if not isinstance(found, dict)}
        with torch.no_grad(), autocast():
            encoded = encode(list(good.values()), encoders, device)
        if encoded:
            cache.put({cache.key(mine[n]): clip for n, clip in zip(good, encoded, strict=True)})
    _settle(cache, unique, failed)
    return len(mine) - len(failed)


def _share_keys(cache: FeatureCache, places: list[Place]) -> None:
    own = places[distributed.rank() :: distributed.world_size()]
    hashed = {place_name(p): cache.key(p) for p in own}
    for part in distributed.gather_objects(hashed):
        cache.keys |= part


def _settle(cache: FeatureCache, places: list[Place], failed: dict[str, MediaError | RowError]) -> None:
    everyones = {k: v for part in distributed.gather_objects(failed) for k, v in part.items()}
    cache.failed = {place_name(p): everyones[cache.key(p)] for p in places if cache.key(p) in everyones}
    distributed.barrier()
    cache.read_index()


def encode(clips: list[Clip], encoders: nn.ModuleDict, device: torch.device) -> list[Clip]:
    """Prepared clips -> the same with features instead of inputs, on the CPU."""
    found: list[Clip] = [{} for _ in clips]
    for stream, encoder in encoders.items():
        items = [clip.get(stream) for clip in clips]
        if all(item is None for item in items):
            continue
        layers = encoder.encode(gather_stream(stream, items).to(device))  # type: ignore[operator]
        for number, item in enumerate(items):
            if item is not None:
                t, p = item.mask.shape
                features = {name: tokens.x[number, :t, :p].cpu() for name, tokens in layers.items()}  # (T, P, D)
                found[number][stream] = replace(item, inputs={}, features=features)
    return found
