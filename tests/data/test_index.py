"""Rows stay on disk: the index finds, checks and groups them as reading the manifest would."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avllm.data import index as indexing
from avllm.data.dataset import MediaPlaces, SampleDataset
from avllm.data.index import Manifest, build_index
from avllm.data.items import Items, QuarantineError, group, read_quarantine
from avllm.data.manifest import ManifestError, read_manifest, write_manifest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes are kept in the test's folder."""
    monkeypatch.setenv("AVLLM_CACHE", str(tmp_path / "cache"))


def row(number: int, clip: str | None = None, **fields: Any) -> dict[str, Any]:
    media = [{"type": "video", "video": clip}] if clip else []
    content = [*media, {"type": "text", "text": "wer spricht? é" * (number % 5)}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": f"answer {number}"},
    ]
    return {"id": f"row-{number}", "source": "test", "messages": messages, **fields}


def write(path: Path, count: int = 60) -> Path:
    write_manifest(path, [row(n, f"{n * 7 % 11}.mp4" if n % 4 else None) for n in range(count)])
    return path


def test_rows_are_those_of_the_whole_manifest(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    lines = [json.dumps(row(n, "a.mp4")) for n in range(9)]
    path.write_text(
        "\n" + "\n\n".join(lines[:5]) + "\n  \n" + "\r\n".join(lines[5:]), encoding="utf-8"
    )
    whole, lazy = read_manifest(path), Manifest(path)
    assert list(lazy) == whole
    assert lazy[-2:] == whole[-2:]
    assert pickle.loads(pickle.dumps(lazy))[4] == whole[4]
    with pytest.raises(IndexError):
        lazy[9]


@pytest.mark.parametrize("chunk", [50, 997, 10**6])
def test_pieces_and_processes_change_nothing(tmp_path: Path, chunk: int) -> None:
    path = write(tmp_path / "m.jsonl")
    whole = build_index(path, "m", processes=1)
    assert np.array_equal(build_index(path, "m", processes=1, chunk=chunk), whole)
    assert whole["line"].tolist() == list(range(1, 61))


def test_several_processes_read_the_same_and_name_the_same_line(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl")
    assert np.array_equal(build_index(path, "m", 2, chunk=2000), build_index(path, "m", 1))
    with path.open("a") as file:
        file.write(json.dumps(row(99, startt=1)) + "\n")
    for processes in (1, 2):
        with pytest.raises(ManifestError, match=r"^m line 61: field startt: "):
            build_index(path, "m", processes, chunk=2000)


def test_ids_that_occur_twice_and_manifests_without_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_manifest(path, [row(1), row(2), row(3), row(2)])
    with pytest.raises(ManifestError, match=r"m.jsonl line 4: id 'row-2' .* line 2") as raised:
        Manifest(path)
    assert raised.value.reason == "duplicate_id"
    path.write_text("\n\n")
    with pytest.raises(ManifestError) as raised:
        Manifest(path)
    assert raised.value.reason == "empty"
    with pytest.raises(ManifestError) as raised:
        Manifest(tmp_path / "other.jsonl")
    assert raised.value.reason == "missing"


def test_an_index_is_kept_as_long_as_the_bytes_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, built = write(tmp_path / "m.jsonl"), []
    build = indexing.build_index
    monkeypatch.setattr(indexing, "STORED_FROM", 1)
    monkeypatch.setattr(indexing, "build_index", lambda *args: built.append(1) or build(*args))
    first = Manifest(path)
    assert isinstance(first.rows, np.memmap)
    assert np.array_equal(Manifest(path).rows, first.rows)
    os.utime(path, (1, 1))
    assert np.array_equal(Manifest(path).rows, first.rows)
    assert len(built) == 1, "another time and the same bytes"
    text = path.read_text()
    path.write_text(text.replace("row-3", "row-x"))
    assert Manifest(path)[3].id == "row-x"
    assert len(built) == 2
    kept = list((tmp_path / "cache" / "manifests").iterdir())
    assert len(kept) == 1, "the older one is gone"


def test_an_index_that_cannot_be_kept_is_told_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setattr(indexing, "STORED_FROM", 1)
    monkeypatch.setattr(indexing.LOG, "handlers", [caplog.handler])
    path = write(tmp_path / "m.jsonl")
    assert list(Manifest(path)) == read_manifest(path)
    (warning,) = {id(record): record for record in caplog.records}.values()
    assert str(path) in warning.getMessage()


def test_a_manifest_that_changes_under_a_run_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl")
    lazy = Manifest(path)
    path.write_text(path.read_text().replace("row-3", "row-x"))
    with pytest.raises(ManifestError, match="line 4") as raised:
        lazy[3]
    assert raised.value.reason == "changed"
    path.write_text(path.read_text()[5:])
    with pytest.raises(ManifestError, match="line 5") as raised:
        lazy[4]
    assert raised.value.reason == "changed"


def test_groups_are_those_that_a_dictionary_would_make() -> None:
    rng = np.random.default_rng(0)
    for largest in (1, 3, 32):
        keys = rng.integers(0, 12, 200).astype(np.uint64)
        ids = rng.permutation(200).astype(np.uint64)
        places_of: dict[Any, list[int]] = {}
        for place, key in enumerate(keys.tolist()):
            places_of.setdefault(key or f"alone {place}", []).append(place)
        expected = []
        for places in places_of.values():
            by_id = sorted(places, key=lambda place: ids[place])
            expected += [by_id[n : n + largest] for n in range(0, len(by_id), largest)]
        order, begins = group(keys, largest, ids)
        assert [part.tolist() for part in np.split(order, begins[1:])] == expected


@pytest.mark.parametrize("pack", [False, True])
def test_items_drawn_by_id_do_not_depend_on_the_order_of_the_file(
    tmp_path: Path, pack: bool
) -> None:
    """Which rows about a clip share an item, and their order in it, follow from the ids, too."""
    rows = [row(number, f"{number % 3}.mp4") for number in range(24)]
    drawn = []
    for name, order in (("a", rows), ("b", rows[::-1]), ("c", rows[7:] + rows[:7])):
        write_manifest(tmp_path / f"{name}.jsonl", order)
        items = Items([tmp_path / f"{name}.jsonl"], pack=pack, max_packed=3)
        numbers = items.drawn_by_id(0).tolist()
        drawn.append([[items.sample(place).id for place in items[n]] for n in numbers])
    assert len(drawn[0]) == (9 if pack else 24)
    assert drawn[1] == drawn[0]
    assert drawn[2] == drawn[0]


def test_items_of_several_manifests(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [write(tmp_path / "a.jsonl", 20), write(tmp_path / "other" / "b.jsonl", 13)]
    plain, packed = Items(paths), Items(paths, pack=True, max_packed=2)
    samples = [s for p in paths for s in read_manifest(p)]
    assert [plain.sample(place) for n in range(len(plain)) for place in plain[n]] == samples
    assert plain.sizes == plain.row_counts == packed.row_counts == [20, 13]
    assert sorted(place for n in range(len(packed)) for place in packed[n]) == list(range(33))
    for n in range(len(packed)):
        media = [packed.sample(place).media for place in packed[n]]
        assert all(m == media[0] for m in media)
        assert len(media) == 1 or (media[0] and len(media) == 2)
    assert packed.root(19) == tmp_path
    assert packed.root(20) == tmp_path / "other"
    firsts = [packed.sample(int(place)) for place in packed.distinct_media()]
    seen = {
        (packed.root(int(p)), s.media[0].path)
        for p, s in zip(packed.distinct_media(), firsts, strict=True)
    }
    assert (
        len(seen)
        == len(firsts)
        == len({(i < 20, s.media[0].path) for i, s in enumerate(samples) if s.media})
    )


def test_media_parts_of_several_datasets_are_read_when_asked_for(tmp_path: Path) -> None:
    two = [{"type": "video", "video": "a.mp4"}, {"type": "audio", "audio": "b.wav", "end": 2.0}]
    asked = [{"role": "user", "content": two}, {"role": "assistant", "content": "x"}]
    (tmp_path / "other").mkdir()
    first, second = tmp_path / "a.jsonl", tmp_path / "other" / "b.jsonl"
    write_manifest(
        first,
        [
            row(0, "0.mp4"),
            row(1),
            row(2, "0.mp4"),
            row(3, "1.mp4"),
            {"id": "two", "messages": asked},
        ],
    )
    write_manifest(second, [row(0), row(1, "1.mp4"), row(2, "0.mp4")])
    datasets = [SampleDataset([m], None, quarantine={"row-2": "silent"}) for m in (first, second)]  # type: ignore[arg-type]
    places = MediaPlaces([(dataset, None) for dataset in datasets])
    names = [(place[0].name, place[1].path) for place in places]
    assert names == [(tmp_path.name, n) for n in ("0.mp4", "1.mp4", "a.mp4", "b.wav")] + [
        ("other", "1.mp4")
    ]
    assert len(places) == 5
    assert pickle.loads(pickle.dumps(places))[3] == (tmp_path, read_manifest(first)[4].media[1])
    some = MediaPlaces(
        [
            (datasets[0], np.array([False, True, False, True])),
            (datasets[1], np.array([True, False])),
        ]
    )
    assert [place[1].path for place in some] == ["a.mp4", "b.wav"], "of the items that are meant"
    without = SampleDataset([second], None, quarantine={"row-1": "x", "row-2": "x"})  # type: ignore[arg-type]
    assert list(MediaPlaces([(without, None)])) == []


def test_rows_in_quarantine_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 20)
    (tmp_path / "q.txt").write_text("row-3\tsilent\nrow-77\tmissing\n\nrow-5\tzero byte\n")
    quarantine = read_quarantine([tmp_path / "q.txt"])
    assert quarantine == {"row-3": "silent", "row-77": "missing", "row-5": "zero byte"}
    for pack in (False, True):
        items = Items([path], pack=pack, quarantine=quarantine)
        left = sorted(items.sample(place).id for n in range(len(items)) for place in items[n])
        assert left == sorted({f"row-{n}" for n in range(20)} - {"row-3", "row-5"})
        assert [(b.id, b.source, b.manifest, b.reason) for b in items.quarantined] == [
            ("row-3", "test", str(path), "silent"),
            ("row-5", "test", str(path), "zero byte"),
        ]
        assert items.row_counts == [18]
        assert len(items.rows) == 18


def test_ids_of_a_quarantine_file_are_those_of_the_rows_whatever_they_hold(tmp_path: Path) -> None:
    ids = ["a\u2028b", "c\u0085d", " e", "f g"]
    write_manifest(
        tmp_path / "a.jsonl", [{**row(n), "id": id} for n, id in enumerate([*ids, "good"])]
    )
    (tmp_path / "q.txt").write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join(f"{id}\tsilent" for id in ids).encode()
    )
    items = Items([tmp_path / "a.jsonl"], quarantine=read_quarantine([tmp_path / "q.txt"]))
    assert [b.id for b in items.quarantined] == ids
    assert [items.sample(int(place)).id for place in items.rows] == ["good"]
    everything = dict.fromkeys([*ids, "good"], "silent")
    more = write(tmp_path / "more.jsonl", 20)
    for manifests in (
        [tmp_path / "a.jsonl"],
        [more, tmp_path / "a.jsonl"],
    ):  # one source that is gone is enough
        with pytest.raises(QuarantineError, match=r"5 rows of .*a.jsonl") as raised:
            Items(manifests, quarantine=everything)
        assert raised.value.reason == "no_rows"


def test_a_quarantine_file_names_its_mistakes(tmp_path: Path) -> None:
    with pytest.raises(QuarantineError) as raised:
        read_quarantine([tmp_path / "q.txt"])
    assert raised.value.reason == "missing"
    (tmp_path / "q.txt").write_text("row-3\tsilent\nrow-4 silent\n")
    with pytest.raises(QuarantineError, match=r"q.txt line 2: 'row-4 silent'") as raised:
        read_quarantine([tmp_path / "q.txt"])
    assert raised.value.reason == "malformed"
