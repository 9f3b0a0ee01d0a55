"""Check the feature cache: its keys, its entries, its limit, and damaged files."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import multiprocessing
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from avllm.data.cache import hashes as cache_hashes
from avllm.data.cache import shard_file
from avllm.data.cache import store as cache_store
from avllm.data.cache.account import account
from avllm.data.cache.disk import FolderInUse, cost_file, make_room
from avllm.data.cache.fill import CacheError, ClipEncoding, FeatureCache, fill, recipe
from avllm.data.cache.hashes import Hashes
from avllm.data.cache.store import Cost
from avllm.data.media.load import MediaError
from avllm.data.schema import RowError, VideoPart
from avllm.data.store.storage import sha256
from avllm.encoders.base import Encoder
from avllm.errors import WriteError
from avllm.tokens import EncoderInput

CPU = torch.device("cpu")


class Double(Encoder):
    """Return the input times the one weight."""

    stream = "video"
    layer_names = [""]

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {"": self.weight * inputs["x"][:, None]}  # (U, 1, P, D)


class Prepare:
    """Give a clip as many steps as its file has bytes, without decoding; count the calls."""

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
        return {
            "video": EncoderInput({"x": x}, torch.zeros(t, 2), torch.ones(t, 2, dtype=torch.bool)),
        }


def doubling(prepare: Prepare | None = None, **options: Any) -> ClipEncoding:
    """Return an encoding that doubles what it is given."""
    encoders = nn.ModuleDict({"video": Double()})
    return ClipEncoding(prepare or Prepare(), encoders, CPU, **options)


def made_by(**changes: object) -> dict[str, object]:
    """Return a recipe."""
    return {"encoders": "abc", "dtype": None, **changes}


def test_side_information_and_duration_are_kept_to_the_bit(tmp_path: Path) -> None:
    extra = {"boxes": torch.rand(3, 2, 4), "real": torch.tensor([[True, False]])}
    features = {"": torch.rand(3, 2, 6), "4": torch.rand(3, 2, 6)}
    whole = EncoderInput(
        {},
        torch.rand(3, 2),
        torch.ones(3, 2, dtype=torch.bool),
        features,
        extra,
        1.1,
    )
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
    prepare = Prepare()
    cache = FeatureCache(tmp_path / "cache", made_by())
    assert fill(cache, places, doubling(prepare, batch_size=2)) == 3
    assert prepare.calls == 4
    clip = cache.get(places[1])["video"]
    assert clip.features is not None
    torch.testing.assert_close(clip.features[""], 2 * torch.arange(24.0).view(4, 2, 3))
    assert clip.inputs == {}
    assert cache.get(places[2]) == {}
    with pytest.raises(MediaError) as raised:
        cache.get(places[4])
    assert raised.value.reason == "missing"
    again = FeatureCache(tmp_path / "cache", made_by())
    assert fill(again, places[:4], doubling(prepare)) == 0
    assert prepare.calls == 4


def test_content_interval_and_recipe_decide_a_key(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    shutil.copy(tmp_path / "a", tmp_path / "copy")
    cache = FeatureCache(tmp_path / "cache", made_by())

    def key(cache: FeatureCache, **part: object) -> str:
        return cache.key((tmp_path, VideoPart(**part)))  # type: ignore[arg-type]

    own = key(cache, video="a")
    assert own == key(cache, video="copy"), "the content counts, not the name"
    others = [
        key(cache, video="b"),
        key(cache, video="a", start=0.5),
        key(cache, video="a", sound="off"),
    ]
    others += [key(FeatureCache(tmp_path / "cache", made_by(encoders="other")), video="a")]
    others += [key(FeatureCache(tmp_path / "cache", made_by(dtype="float16")), video="a")]
    assert len({own, *others}) == 6


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of the files that are hashed."""
    names: list[str] = []
    hash_file = cache_hashes.file_hash

    def record(path: Path) -> str:
        names.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(cache_hashes, "file_hash", record)
    return names


def test_a_file_is_hashed_once_for_all_its_intervals_and_runs(
    tmp_path: Path,
    hashed: list[str],
) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode())
    places = [(tmp_path, VideoPart(video="gone"))]
    for name, start in itertools.product("ab", (0.0, 0.5, 1.0)):
        places.append((tmp_path, VideoPart(video=name, start=start)))

    def keys(recipe: dict[str, object]) -> set[str]:
        cache = FeatureCache(tmp_path / "cache", recipe)
        fill(cache, places, doubling())
        return set(cache.keys.values())

    first = keys(made_by())
    assert (len(first), sorted(hashed)) == (7, ["a", "b", "gone"])
    hashed.clear()
    assert keys(made_by()) == first
    assert keys(made_by(encoders="other")).isdisjoint(first)
    assert hashed == ["gone", "gone"], "a missing file has no entry"
    hashed.clear()
    old = (tmp_path / "a").stat()
    (tmp_path / "a").write_bytes(b"c")
    os.utime(tmp_path / "a", ns=(old.st_atime_ns, old.st_mtime_ns))
    assert len(keys(made_by()) - first) == 3, "same size and time of modification, other bytes"
    assert sorted(hashed) == ["a", "gone"]


def remember(folder: Path, media: Path, number: int) -> None:
    """Hash files of which other processes hash some too."""
    files = [media / str(n) for n in range(number * 5, number * 5 + 20)]
    Hashes(folder).add(files, threads=2, progress_bar=False)


def test_processes_share_hashes_and_a_torn_line_is_cut(tmp_path: Path, hashed: list[str]) -> None:
    for n in range(50):
        (tmp_path / str(n)).write_bytes(b"%d" % n)
    file = tmp_path / "hashes.jsonl"
    file.write_text('{"path": "a process that di')
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=remember, args=(tmp_path, tmp_path, number)) for number in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    everything = Hashes(tmp_path)
    assert everything.add([tmp_path / str(n) for n in range(35)]) == 0
    assert everything[tmp_path / "7"] == sha256(tmp_path / "7")
    assert hashed == []
    for number, damage in enumerate(("[]\n", '{"path": "7"}\n', "no JSON\n")):
        damaged = tmp_path / f"damaged-{number}" / "hashes.jsonl"
        damaged.parent.mkdir()
        damaged.write_text(file.read_text() + damage)
        lines = len(damaged.read_text().splitlines())
        with pytest.raises(CacheError, match=f"{damaged} line {lines}") as raised:
            Hashes(damaged.parent).add([])
        assert raised.value.reason == "damaged_row"


def flip_feature(shard: Path, key: str) -> None:
    """Change the lowest bit of an entry's first feature."""
    content = bytearray(shard.read_bytes())
    header_size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_size])
    first = 8 + header_size + header[f"{key}/video/layer/"]["data_offsets"][0]
    content[first] ^= 1
    shard.write_bytes(content)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The log of this test."""
    monkeypatch.setattr(logging.getLogger("avllm"), "handlers", [caplog.handler])
    return caplog


def three_in_one_shard(tmp_path: Path) -> tuple[FeatureCache, list[Any]]:
    """Return a cache of three clips in one shard, and their places."""
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode() * 50)
    cache = FeatureCache(tmp_path / "cache", made_by())
    places = [(tmp_path, VideoPart(video=name)) for name in "abc"]
    fill(cache, places, doubling(num_workers=0))
    return cache, places


def test_a_damaged_shard_is_named_and_made_again(tmp_path: Path, log: Any) -> None:
    cache, places = three_in_one_shard(tmp_path)
    (shard,) = cache.folder.glob("*.safetensors")
    content = shard.read_bytes()
    flip_feature(shard, cache.key(places[1]))
    again = FeatureCache(tmp_path / "cache", made_by())
    assert fill(again, places, doubling()) == 3
    assert shard.name in log.text
    assert shard.read_bytes() == content
    assert fill(FeatureCache(tmp_path / "cache", made_by()), places, doubling()) == 0


def test_entries_that_a_run_does_not_need_stay_when_their_shard_is_damaged(tmp_path: Path) -> None:
    cache, places = three_in_one_shard(tmp_path)
    (shard,) = cache.folder.glob("*.safetensors")
    expected = [features_of(cache.get(place)).clone() for place in places]
    flip_feature(shard, cache.key(places[1]))
    again = FeatureCache(tmp_path / "cache", made_by())
    assert fill(again, places[1:], doubling()) == 2
    for place, features in zip(places, expected, strict=True):
        assert torch.equal(features_of(again.get(place)), features)
    assert not shard.exists()
    assert fill(FeatureCache(tmp_path / "cache", made_by()), places, doubling()) == 0
    # A run that had read the folder before finds the entries in their new shards.
    cache._checked.clear()
    cache._open_shards.clear()
    assert torch.equal(features_of(cache.get(places[0])), expected[0])


def test_a_damaged_entry_that_a_run_does_not_need_gets_no_new_checksum(tmp_path: Path) -> None:
    cache, places = three_in_one_shard(tmp_path)
    (shard,) = cache.folder.glob("*.safetensors")
    expected = features_of(cache.get(places[0])).clone()
    for place in places[:2]:
        flip_feature(shard, cache.key(place))
    again = FeatureCache(tmp_path / "cache", made_by())
    assert fill(again, places[1:], doubling()) == 2
    last = FeatureCache(tmp_path / "cache", made_by())
    assert fill(last, places, doubling()) == 1
    assert torch.equal(features_of(last.get(places[0])), expected)


def test_an_entry_that_is_damaged_during_a_run_is_a_bad_row(tmp_path: Path) -> None:
    cache, places = three_in_one_shard(tmp_path)
    (shard,) = cache.folder.glob("*.safetensors")
    flip_feature(shard, cache.key(places[1]))
    reader = FeatureCache(tmp_path / "cache", made_by())
    assert features_of(reader.get(places[0])).shape == (50, 2, 3)
    with pytest.raises(RowError, match=shard.name) as raised:
        reader.get(places[1])
    assert raised.value.reason == "damaged_features"


def test_a_complete_cache_is_read_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, places = three_in_one_shard(tmp_path)
    (tmp_path / "d").write_bytes(b"d")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    (shard,) = cache.folder.glob("*.safetensors")
    before = shard.stat()
    # As on a read-only mount, for a user who may do everything.
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "utime", refuse)
    reader = FeatureCache(tmp_path / "cache", made_by())
    assert fill(reader, places, doubling()) == 0
    assert torch.equal(features_of(reader.get(places[0])), features_of(cache.get(places[0])))
    with pytest.raises(CacheError, match="1 of 4 clips") as raised:
        fill(reader, [*places, (tmp_path, VideoPart(video="d"))], doubling())
    assert raised.value.reason == "read_only"
    assert shard.stat().st_mtime_ns == before.st_mtime_ns
    flip_feature(shard, reader.key(places[1]))
    with pytest.raises(CacheError, match="3 of 3 clips") as raised:
        fill(FeatureCache(tmp_path / "cache", made_by()), places, doubling())


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(shard_file, "save_file", refuse)
    with pytest.raises(WriteError, match=r"cache/\w{32}.safetensors.*No space left"):
        filled(tmp_path, "ab")
    assert list((tmp_path / "cache").glob("*.safetensors*")) == []
    assert list((tmp_path / "cache").glob(".*.partial")) == []


def test_damaged_files_are_named(tmp_path: Path, log: Any) -> None:
    shard, other = sorted(filled(tmp_path, "ab").folder.glob("*.safetensors"))
    cache = FeatureCache(tmp_path / "cache", made_by())
    places = [(tmp_path, VideoPart(video=name)) for name in "ab"]
    (damaged_place,) = [place for place in places if cache.index[cache.key(place)] == shard.name]
    content = shard.read_bytes()
    for damaged in (content[:-4], b"x" * 100, b""):
        shard.write_bytes(damaged)
        with pytest.raises(CacheError, match=shard.name) as raised:
            cache.get(damaged_place)
        assert raised.value.reason == "damaged_shard"
        log.clear()
        assert filled(tmp_path, "ab").filled.encoded == 1
        assert shard.name in log.text
        assert shard.read_bytes() == content
        cache._open_shards.clear()
        cache._checked.clear()
    cost_file(other).write_text("")
    with pytest.raises(CacheError, match=f"{other.stem}.json") as raised:
        FeatureCache(tmp_path / "cache", made_by())
    assert raised.value.reason == "damaged_times"


def test_few_shards_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_store, "OPEN_SHARDS", 2)
    cache = filled(tmp_path, "abcde")
    for name in "abcdeeba":
        clip = cache.get((tmp_path, VideoPart(video=name)))["video"]
        assert clip.features is not None
        torch.testing.assert_close(clip.features[""], 2 * torch.arange(300.0).view(50, 2, 3))
        assert len(cache._open_shards) <= 2


def test_a_shard_that_is_deleted_while_the_folder_is_read_is_missing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = filled(tmp_path, "ab")
    listed = cache_store.shards_of(tmp_path / "cache")
    listed[0].unlink()
    monkeypatch.setattr(cache_store, "shards_of", lambda folder: listed)
    assert len(FeatureCache(tmp_path / "cache", made_by()).index) == 1
    assert len(cache.index) == 2


def test_an_entry_of_two_shards_stays_when_one_is_deleted(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache", made_by())
    cache.put({"a": {}, "b": {}})
    cache.put({"b": {}, "c": {}})
    cache.read_index()
    holder = cache.index["b"]
    (tmp_path / "cache" / holder).unlink()
    cache.read_index()
    assert cache.index["b"] != holder
    assert len(cache.index) == 2


def test_shards_of_another_user_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, "ab")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("not the owner")

    monkeypatch.setattr(os, "utime", refuse)
    assert filled(tmp_path, "ab").filled.cached == 2


def test_features_are_stored_in_the_given_dtype(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    place = (tmp_path, VideoPart(video="a"))
    cache = FeatureCache(tmp_path / "cache", made_by(dtype="float16"))
    fill(cache, [place], doubling())
    features = cache.get(place)["video"].features
    assert features is not None
    assert features[""].dtype == torch.float16


def test_a_trained_encoder_is_refused() -> None:
    encoder = Double()
    encoder.weight.requires_grad_(True)
    with pytest.raises(CacheError, match="encoders.video.weight") as raised:
        recipe(None, nn.ModuleDict({"video": encoder}), "fp32")
    assert raised.value.reason == "trained_encoder"


def filled(tmp_path: Path, names: str, max_bytes: int | None = None) -> FeatureCache:
    """Return a cache after a run that needs files of these one-letter names, a shard each."""
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 50)
    cache = FeatureCache(tmp_path / "cache", made_by())
    places = [(tmp_path, VideoPart(video=name)) for name in names]
    fill(cache, places, doubling(batch_size=1), max_bytes=max_bytes)
    return cache


def used_at(cache: FeatureCache, seconds: int) -> None:
    """Set the time at which the shards of a cache were used last."""
    for shard in cache.shards(cache.index):
        os.utime(cache.folder / shard, (seconds, seconds))


def test_shards_used_longest_ago_are_deleted_and_needed_ones_stay(tmp_path: Path) -> None:
    first = filled(tmp_path, "ab")
    used_at(first, 1000)
    size = sum(p.stat().st_size for p in first.folder.glob("*.safetensors"))
    limit = size * 2  # room for four shards
    del first
    second = filled(tmp_path, "cd", limit)
    assert (second.filled.needed, second.filled.cached, second.filled.encoded) == (2, 0, 2)
    assert len(second.index) == 4, "there was room"
    used_at(second, 2000)
    del second
    third = filled(tmp_path, "ae", limit)
    assert (third.filled.cached, third.filled.encoded) == (1, 1)
    for name in "ae":
        assert third.key((tmp_path, VideoPart(video=name))) in third.index
    assert third.get((tmp_path, VideoPart(video="a")))["video"].features is not None
    assert sum(p.stat().st_size for p in third.folder.glob("*.safetensors")) <= limit


def test_a_run_that_needs_more_than_the_limit_is_refused_after_one_shard(tmp_path: Path) -> None:
    size = sum(p.stat().st_size for p in filled(tmp_path, "a").folder.glob("*.safetensors"))
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(CacheError, match=f"{5 * size / 1e9:.6f} GB") as raised:
        filled(tmp_path, "abcde", 3 * size)
    assert raised.value.reason == "too_large"
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1


def test_no_shard_is_deleted_while_another_run_reads(tmp_path: Path) -> None:
    cache = filled(tmp_path, "abc")
    shard = next(cache.folder.glob("*.safetensors"))
    limit = 2 * shard.stat().st_size
    other = FolderInUse(cache.folder)
    with pytest.raises(CacheError) as raised:
        make_room(cache.folder, cache.mark_in_use(), {shard.name}, 0, limit)
    assert raised.value.reason == "in_use"
    del other
    assert len(make_room(cache.folder, cache.mark_in_use(), {shard.name}, 0, limit)) == 1
    assert shard.is_file()
    cache.read_index()
    assert len(cache.index) == 2


def features_of(clip: dict[str, EncoderInput]) -> Tensor:
    """Return the features of a clip."""
    features = clip["video"].features
    assert features is not None
    return features[""]


def fill_at_once(folder: Path, names: str, all_ready: Any) -> None:
    """Fill the folder at the same moment as other runs that know nothing of this one."""
    places = [(folder, VideoPart(video=name)) for name in names]
    cache = FeatureCache(folder / "cache", made_by())
    all_ready.wait(60)
    fill(cache, places, doubling(batch_size=2))
    for name, place in zip(names, places, strict=True):
        t = (folder / name).stat().st_size
        torch.testing.assert_close(
            features_of(cache.get(place)),
            2 * torch.arange(t * 6.0).view(t, 2, 3),
        )


def test_runs_that_fill_one_folder_at_once_read_what_they_would_alone(tmp_path: Path) -> None:
    for number, name in enumerate("abcdefgh", start=1):
        (tmp_path / name).write_bytes(name.encode() * number)
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(3)
    needed = ("abcdef", "abcdef", "hgfedc")  # the second would write the very files of the first
    runs = [context.Process(target=fill_at_once, args=(tmp_path, names, ready)) for names in needed]
    for run in runs:
        run.start()
    for run in runs:
        run.join(120)
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert list((tmp_path / "cache").glob(".*.partial")) == []
    after = FeatureCache(tmp_path / "cache", made_by())
    places = [(tmp_path, VideoPart(video=name)) for name in "abcdefgh"]
    assert fill(after, places, ClipEncoding(Prepare(), nn.ModuleDict(), CPU)) == 0


def account_of(tmp_path: Path, decoding: float, encoding: float) -> str:
    """Return the account of a cache that held three of four clips, and what each took to make."""
    filled(tmp_path, "abc")
    for path in (tmp_path / "cache").glob("*.safetensors"):
        cost_file(path).write_text(json.dumps([decoding, encoding]))
    cache = filled(tmp_path, "abcd")
    cache.costs = dict.fromkeys(cache.costs, Cost(decoding, encoding))
    return account(cache, [(tmp_path, VideoPart(video=name)) for name in "abcd"])


def test_the_account_names_hits_and_times(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr(logging.getLogger("avllm"), "handlers", [caplog.handler])
    line = account_of(tmp_path, 20.0, 30.0)
    size = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors"))
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", line)]
    clips, gigabytes, cached, hit_rate, _, decoding, encoding, _ = numbers
    assert (clips, cached, hit_rate) == (4, 3, 75.0)
    assert gigabytes == pytest.approx(size / 1e9, abs=1e-6)
    assert (decoding, encoding) == (80.0, 120.0)
    assert caplog.records == []


def test_a_cache_that_costs_time_gets_a_warning(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr(logging.getLogger("avllm"), "handlers", [caplog.handler])
    account_of(tmp_path, 0.0, 0.0)
    (warning,) = {
        id(record): record for record in caplog.records
    }.values()  # two handlers, one record
    assert warning.levelno == logging.WARNING
    assert warning.args[1] == 0.0, "milliseconds to make a clip's features"


def test_the_cost_of_clips_lies_beside_their_shard(tmp_path: Path) -> None:
    cache = filled(tmp_path, "a")
    (cost,) = cache.costs.values()
    assert cost.decoding >= 0
    assert cost.encoding > 0
    assert FeatureCache(tmp_path / "cache", made_by()).costs == cache.costs


@pytest.mark.parametrize("name", ["file", "a\0b"])
def test_a_cache_that_can_be_no_folder_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="cannot be written"):
        FeatureCache(tmp_path / name, made_by())


def test_weights_in_the_folder_of_a_cache_are_not_its_shards(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    weights = tmp_path / "cache" / "model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1")
    cache = FeatureCache(tmp_path / "cache", made_by())
    deleted = make_room(cache.folder, cache.mark_in_use(), [], 0, 1)
    assert deleted == []
    assert weights.is_file()
