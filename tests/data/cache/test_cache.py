"""The feature cache: what decides an address, what is kept, what a bad file becomes."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from avllm.data.cache import hashes as cache_hashes
from avllm.data.cache import store as cache_store
from avllm.data.cache.disk import Use, make_room, seconds_of
from avllm.data.cache.fill import CacheError, FeatureCache, account, fill, recipe
from avllm.data.cache.hashes import Hashes
from avllm.data.media.load import MediaError
from avllm.data.schema import VideoPart
from avllm.data.store.storage import sha256
from avllm.encoders.base import Encoder
from avllm.tokens import EncoderInput

CPU = torch.device("cpu")


class Double(Encoder):
    """Gives back its input times its one weight."""

    stream = "video"
    layer_names = [""]

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {"": self.weight * inputs["x"][:, None]}  # (U, 1, P, D)


class Prepare:
    """Stands for decoding: as many steps as the file has bytes, counted."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, parts: Sequence[VideoPart], root: Path) -> list[dict[str, EncoderInput]]:
        return [self.one(root / part.video) for part in parts]

    def one(self, path: Path) -> dict[str, EncoderInput]:
        self.calls += 1
        if not path.is_file():
            raise MediaError(path, "missing", "no such file")
        t = path.stat().st_size
        if t == 0:
            return {}
        x = torch.arange(t * 6.0).view(t, 2, 3)
        return {"video": EncoderInput({"x": x}, torch.zeros(t, 2), torch.ones(t, 2, dtype=torch.bool))}


def made_by(**changes: object) -> dict[str, object]:
    """A recipe."""
    return {"encoders": "abc", "dtype": None, **changes}


def test_side_information_and_duration_are_kept_to_the_bit(tmp_path: Path) -> None:
    extra = {"boxes": torch.rand(3, 2, 4), "real": torch.tensor([[True, False]])}
    features = {"": torch.rand(3, 2, 6), "4": torch.rand(3, 2, 6)}
    whole = EncoderInput({}, torch.rand(3, 2), torch.ones(3, 2, dtype=torch.bool), features, extra, 1.1)
    plain = EncoderInput({}, torch.rand(3, 2), torch.ones(3, 2, dtype=torch.bool), features)
    (tmp_path / "one").write_bytes(b"x")
    place = (tmp_path, VideoPart(video="one"))
    cache = FeatureCache(tmp_path / "cache", made_by(dtype="bfloat16"))
    cache.put({cache.key(place): {"video": whole, "audio": plain}})
    cache.read_index()
    seen = cache.get(place)
    assert seen["video"].duration == 1.1
    assert seen["audio"].duration is None
    assert seen["audio"].extra == {}
    assert seen["video"].extra.keys() == extra.keys()
    for name, value in extra.items():
        assert torch.equal(seen["video"].extra[name], value)
        assert seen["video"].extra[name].dtype == value.dtype
    assert seen["video"].features is not None
    assert seen["video"].features["4"].dtype == torch.bfloat16


def test_a_filled_cache_gives_features_and_decodes_once(tmp_path: Path) -> None:
    names = ["one", "twoo", "nothing"]
    for name, size in zip(names, (3, 4, 0), strict=True):
        (tmp_path / name).write_bytes(b"x" * size)
    places = [(tmp_path, VideoPart(video=n)) for n in [*names, "one", "gone"]]
    encoders, prepare = nn.ModuleDict({"video": Double()}), Prepare()
    cache = FeatureCache(tmp_path / "cache", made_by())
    assert fill(cache, places, prepare, encoders, device=CPU, batch_size=2) == 3
    assert prepare.calls == 4
    clip = cache.get(places[1])["video"]
    assert clip.features is not None
    torch.testing.assert_close(clip.features[""], 2 * torch.arange(24.0).view(4, 2, 3))
    assert clip.inputs == {}
    assert cache.get(places[2]) == {}
    with pytest.raises(MediaError, match="no such file"):
        cache.get(places[4])
    again = FeatureCache(tmp_path / "cache", made_by())
    assert fill(again, places[:4], prepare, encoders, device=CPU) == 0
    assert prepare.calls == 4


def test_what_decides_an_address(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    shutil.copy(tmp_path / "a", tmp_path / "copy")
    cache = FeatureCache(tmp_path / "cache", made_by())

    def key(cache: FeatureCache, **part: object) -> str:
        return cache.key((tmp_path, VideoPart(**part)))  # type: ignore[arg-type]

    own = key(cache, video="a")
    assert own == key(cache, video="copy"), "the content counts, not the name"
    others = [key(cache, video="b"), key(cache, video="a", start=0.5), key(cache, video="a", sound="off")]
    others += [key(FeatureCache(tmp_path / "cache", made_by(encoders="other")), video="a")]
    others += [key(FeatureCache(tmp_path / "cache", made_by(dtype="float16")), video="a")]
    assert len({own, *others}) == 6


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed."""
    names: list[str] = []
    hash_file = cache_hashes.file_hash
    monkeypatch.setattr(cache_hashes, "file_hash", lambda path: names.append(path.name) or hash_file(path))
    return names


def test_a_file_is_hashed_once_for_all_its_intervals_and_runs(tmp_path: Path, hashed: list[str]) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode())
    places = [(tmp_path, VideoPart(video=name, start=start)) for name in "ab" for start in (0.0, 0.5, 1.0)]
    places.append((tmp_path, VideoPart(video="gone")))

    def keys(recipe: dict[str, object]) -> set[str]:
        cache = FeatureCache(tmp_path / "cache", recipe)
        fill(cache, places, Prepare(), nn.ModuleDict({"video": Double()}), device=CPU)
        return set(cache.keys.values())

    first = keys(made_by())
    assert (len(first), sorted(hashed)) == (7, ["a", "b", "gone"])
    hashed.clear()
    assert keys(made_by()) == first
    assert keys(made_by(encoders="other")).isdisjoint(first)
    assert hashed == ["gone", "gone"], "of which there is nothing to keep"
    hashed.clear()
    old = (tmp_path / "a").stat()
    (tmp_path / "a").write_bytes(b"c")
    os.utime(tmp_path / "a", ns=(old.st_atime_ns, old.st_mtime_ns))
    assert len(keys(made_by()) - first) == 3, "same size and time of modification, other bytes"
    assert sorted(hashed) == ["a", "gone"]


def remember(folder: Path, media: Path, number: int) -> None:
    """One of several processes that hash the same and other files."""
    Hashes(folder).look([media / str(n) for n in range(number * 5, number * 5 + 20)], threads=2, bar=False)


def test_processes_share_hashes_and_a_torn_line_is_cut(tmp_path: Path, hashed: list[str]) -> None:
    for n in range(50):
        (tmp_path / str(n)).write_bytes(b"%d" % n)
    file = tmp_path / "hashes.jsonl"
    file.write_text('{"path": "a process that di')
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=remember, args=(tmp_path, tmp_path, number)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    everything = Hashes(tmp_path)
    assert everything.look([tmp_path / str(n) for n in range(35)]) == 0
    assert everything[tmp_path / "7"] == sha256(tmp_path / "7")
    assert hashed == []
    file.write_text(file.read_text() + "[]\n")
    with pytest.raises(CacheError, match=r"hashes.jsonl line \d+ is no hash of a file .*; delete the file"):
        Hashes(tmp_path).look([])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    shard, other = sorted(filled(tmp_path, "ab").folder.glob("*.safetensors"))
    cache = FeatureCache(tmp_path / "cache", made_by())
    content = shard.read_bytes()
    for damaged in (content[:-4], b"x" * 100, b""):
        shard.write_bytes(damaged)
        with pytest.raises(CacheError, match=f"{shard.name} is no whole shard of features .*; delete it, and what it"):
            FeatureCache(tmp_path / "cache", made_by())
        with pytest.raises(CacheError, match=f"{shard.name} is no whole shard"):
            cache.get(
                next(
                    (tmp_path, VideoPart(video=n))
                    for n in "ab"
                    if cache.index[cache.key((tmp_path, VideoPart(video=n)))] == shard.name
                )
            )
    shard.unlink()
    assert filled(tmp_path, "ab").filled.encoded == 1
    seconds_of(other).write_text("")
    with pytest.raises(CacheError, match=f"{other.stem}.json is damaged .*; delete it"):
        FeatureCache(tmp_path / "cache", made_by())


def test_few_shards_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_store, "OPEN_SHARDS", 2)
    cache = filled(tmp_path, "abcde")
    for name in "abcdeeba":
        clip = cache.get((tmp_path, VideoPart(video=name)))["video"]
        assert clip.features is not None
        torch.testing.assert_close(clip.features[""], 2 * torch.arange(300.0).view(50, 2, 3))
        assert len(cache._shards) <= 2


def test_a_shard_that_leaves_while_the_folder_is_read_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, listed = filled(tmp_path, "ab"), cache_store.shards_of(tmp_path / "cache")
    listed[0].unlink()
    monkeypatch.setattr(cache_store, "shards_of", lambda folder: listed)
    assert len(FeatureCache(tmp_path / "cache", made_by()).index) == 1
    assert len(cache.index) == 2


def test_shards_of_another_user_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, "ab")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("not the owner")

    monkeypatch.setattr(os, "utime", refuse)
    assert filled(tmp_path, "ab").filled.found == 2


def test_kept_in_half_precision_when_asked(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    place = (tmp_path, VideoPart(video="a"))
    cache = FeatureCache(tmp_path / "cache", made_by(dtype="float16"))
    fill(cache, [place], Prepare(), nn.ModuleDict({"video": Double()}), device=CPU)
    features = cache.get(place)["video"].features
    assert features is not None
    assert features[""].dtype == torch.float16


def test_a_trained_encoder_is_refused() -> None:
    encoder = Double()
    encoder.weight.requires_grad_(True)
    with pytest.raises(CacheError, match="trains encoders.video.weight"):
        recipe(None, nn.ModuleDict({"video": encoder}), "fp32")


def filled(tmp_path: Path, names: str, max_bytes: int | None = None) -> FeatureCache:
    """A cache after a run that needs the files of these one-letter names; a shard a file."""
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 50)
    cache = FeatureCache(tmp_path / "cache", made_by())
    places = [(tmp_path, VideoPart(video=name)) for name in names]
    encoders = nn.ModuleDict({"video": Double()})
    fill(cache, places, Prepare(), encoders, device=CPU, batch_size=1, max_bytes=max_bytes)
    return cache


def used_at(cache: FeatureCache, seconds: int) -> None:
    """As if the shards of a cache had been used last at this time."""
    for shard in cache.shards(cache.index):
        os.utime(cache.folder / shard, (seconds, seconds))


def test_what_was_used_longest_ago_leaves_and_what_is_needed_stays(tmp_path: Path) -> None:
    first = filled(tmp_path, "ab")
    used_at(first, 1000)
    size = sum(p.stat().st_size for p in first.folder.glob("*.safetensors"))
    limit = size * 2  # room for four shards
    del first
    second = filled(tmp_path, "cd", limit)
    assert (second.filled.wanted, second.filled.found, second.filled.encoded) == (2, 0, 2)
    assert len(second.index) == 4, "there was room"
    used_at(second, 2000)
    del second
    third = filled(tmp_path, "ae", limit)
    assert (third.filled.found, third.filled.encoded) == (1, 1)
    left = {key for name in "ae" for key in [third.key((tmp_path, VideoPart(video=name)))]}
    assert left <= third.index.keys()
    assert third.get((tmp_path, VideoPart(video="a")))["video"].features is not None
    assert sum(p.stat().st_size for p in third.folder.glob("*.safetensors")) <= limit


def test_a_run_that_needs_more_than_there_is_room_is_told_how_much_after_one_shard(tmp_path: Path) -> None:
    size = sum(p.stat().st_size for p in filled(tmp_path, "a").folder.glob("*.safetensors"))
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(CacheError, match=f"take {5 * size / 1e9:.6f} GB .* Raise it"):
        filled(tmp_path, "abcde", 3 * size)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1


def test_nothing_leaves_while_another_run_reads(tmp_path: Path) -> None:
    cache = filled(tmp_path, "abc")
    shard = next(cache.folder.glob("*.safetensors"))
    limit = 2 * shard.stat().st_size
    other = Use(cache.folder)
    with pytest.raises(CacheError, match="another run reads from it"):
        make_room(cache.folder, cache.use, {shard.name}, 0, limit)
    del other
    assert len(make_room(cache.folder, cache.use, {shard.name}, 0, limit)) == 1
    assert shard.is_file()
    cache.read_index()
    assert len(cache.index) == 2


def seen(clip: dict[str, EncoderInput]) -> Tensor:
    """The features of a clip."""
    features = clip["video"].features
    assert features is not None
    return features[""]


def fill_at_once(folder: Path, names: str, all_ready: Any) -> None:
    """One of several runs that know nothing of each other and start at the same moment."""
    places = [(folder, VideoPart(video=name)) for name in names]
    cache = FeatureCache(folder / "cache", made_by())
    all_ready.wait(60)
    fill(cache, places, Prepare(), nn.ModuleDict({"video": Double()}), device=CPU, batch_size=2)
    for name, place in zip(names, places, strict=True):
        t = (folder / name).stat().st_size
        torch.testing.assert_close(seen(cache.get(place)), 2 * torch.arange(t * 6.0).view(t, 2, 3))


def test_runs_that_fill_one_folder_at_once_read_what_they_would_alone(tmp_path: Path) -> None:
    for number, name in enumerate("abcdefgh", start=1):
        (tmp_path / name).write_bytes(name.encode() * number)
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(3)
    wanted = ("abcdef", "abcdef", "hgfedc")  # the second would write the very files of the first
    runs = [context.Process(target=fill_at_once, args=(tmp_path, names, ready)) for names in wanted]
    for run in runs:
        run.start()
    for run in runs:
        run.join(120)
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert list((tmp_path / "cache").glob(".*.partial")) == []
    after = FeatureCache(tmp_path / "cache", made_by())
    assert (
        fill(after, [(tmp_path, VideoPart(video=n)) for n in "abcdefgh"], Prepare(), nn.ModuleDict(), device=CPU) == 0
    )


def told_of(tmp_path: Path, decoding: float, encoding: float) -> str:
    """The line about a cache of which three of four clips were there, with what these took; the fourth is as long."""
    filled(tmp_path, "abc")
    for path in (tmp_path / "cache").glob("*.safetensors"):
        seconds_of(path).write_text(json.dumps([decoding, encoding]))
    cache = filled(tmp_path, "abcd")
    cache.costs = dict.fromkeys(cache.costs, (decoding, encoding))
    return account(cache, [(tmp_path, VideoPart(video=name)) for name in "abcd"])


def test_the_account_tells_hits_and_times(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(logging.getLogger("avllm"), "handlers", [caplog.handler])
    told = told_of(tmp_path, 20.0, 30.0)
    size = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors"))
    assert told.startswith(f"features of 4 clips ({size / 1e9:.6f} GB): 3 were there (75.0%), the others took 0.")
    assert "each epoch is spared 80.0 s of decoding and 120.0 s of encoding, and reads for 0." in told
    assert "costs time" not in caplog.text


def test_a_cache_that_loses_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(logging.getLogger("avllm"), "handlers", [caplog.handler])
    assert "is spared 0.0 s of decoding and 0.0 s of encoding" in told_of(tmp_path, 0.0, 0.0)
    assert "making them 0.0 ms: the cache costs time. Leave out data.cache" in caplog.text


def test_what_clips_took_is_kept_beside_their_shard(tmp_path: Path) -> None:
    cache = filled(tmp_path, "a")
    (kept,) = cache.costs.values()
    assert kept[0] >= 0 < kept[1]
    assert FeatureCache(tmp_path / "cache", made_by()).costs == cache.costs
