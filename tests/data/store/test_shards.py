"""Check that shards give back what was packed into them, on a disk and in a store."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from pydantic import ValidationError
from tiny import World, make_world, settings
from tiny import row as chat
from tiny import text as said
from typer.testing import CliRunner

from avllm.cli.main import app
from avllm.config import RunConfig
from avllm.data.cache.store import file_hash
from avllm.data.check.run import check
from avllm.data.dataset import SampleDataset
from avllm.data.index import Manifest
from avllm.data.loader import Collate, Cut, MicroBatches, build_loader
from avllm.data.manifest import digest, read_manifest, write_manifest
from avllm.data.media.load import MediaError, load_video, probe
from avllm.data.media.sampling import Sampling
from avllm.data.mixture import Order
from avllm.data.schema import VideoPart, resolve
from avllm.data.store.append_only import AppendOnly
from avllm.data.store.shards import ShardError, pack_shards, parse_size
from avllm.data.store.storage import StoreError, byte_range_of, open_bytes, size_of, url_of
from avllm.errors import UserError
from avllm.training.start import Parts, build_parts

SAMPLING = Sampling(num_frames=4)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Four clips, two questions about each."""
    return make_world(tmp_path_factory.mktemp("world"), clips=4)


@pytest.fixture(scope="module")
def packed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The questions in several small shards."""
    folder = tmp_path_factory.mktemp("packed")
    (report,) = pack_shards([world.questions], folder, shard_size=12_000)
    assert report.rows == 8
    assert report.shards == len(list(folder.glob("*.tar"))) > 1
    assert report.dropped == {}
    return report.manifest


@pytest.fixture
def remote(packed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The shards in a store that is no file system of this machine's."""
    monkeypatch.setenv("AVLLM_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    for file in packed.parent.glob("questions*"):
        store.pipe_file(f"/bucket/set/{file.name}", file.read_bytes())
    yield "memory://bucket/set/questions.jsonl"
    store.rm("/bucket", recursive=True)


@pytest.fixture(scope="module")
def parts(world: World, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """A tiny model's processor."""
    return build_parts(RunConfig.model_validate(settings(world, tmp_path_factory.mktemp("run"))))


def reason_of(call: Callable[[], object]) -> tuple[type[UserError], str]:
    """Return type and reason of the error that a call raises."""
    with pytest.raises(UserError) as raised:
        call()
    return type(raised.value), raised.value.reason


def test_members_and_urls_are_located() -> None:
    assert byte_range_of("a/b.mp4") is None
    assert byte_range_of("set/x-000001.tar#512+77/000.0.mp4") == ("set/x-000001.tar", 512, 77)
    assert url_of(Path("s3://bucket/a/b.mp4")) == "s3://bucket/a/b.mp4"
    assert byte_range_of(Path("s3://bucket/a/b.tar#5+6/c.wav")) == ("s3://bucket/a/b.tar", 5, 6)
    assert url_of("c:/film.mp4") is None
    root = Path("gs://bucket/set")
    member = VideoPart(video="x.tar#5+6/c.mp4")
    assert url_of(resolve(member, root)) == "gs://bucket/set/x.tar#5+6/c.mp4"
    assert url_of(resolve(VideoPart(video="s3://other/c.mp4"), root)) == "s3://other/c.mp4"


def test_a_file_url_is_a_file_of_this_machine(world: World, packed: Path, tmp_path: Path) -> None:
    url = packed.as_uri()
    assert url.startswith("file:///")
    assert (url_of(url), byte_range_of(Path(url)), size_of(url)) == (
        None,
        None,
        packed.stat().st_size,
    )
    assert read_manifest(url) == read_manifest(packed)
    assert (Manifest(url).root, list(Manifest(url))) == (packed.parent, read_manifest(packed))
    with open_bytes(url) as file:
        assert file.read() == packed.read_bytes()
    (part,) = read_manifest(packed)[0].media
    member = packed.parent / part.path
    assert byte_range_of(f"{packed.parent.as_uri()}/{part.path}") == byte_range_of(member)
    for path, root in (
        (f"{packed.parent.as_uri()}/{part.path}", None),
        (part.path, Path(packed.parent.as_uri())),
    ):
        assert resolve(VideoPart(video=path), root) == member
        assert probe(resolve(VideoPart(video=path), root)) == probe(member)
    clip = world.questions.parent / "000.mp4"
    row = chat("one", [{"type": "video", "video": clip.as_uri()}], "red")
    write_manifest(tmp_path / "one.jsonl", [row])
    done = CliRunner().invoke(app, ["data", "check", (tmp_path / "one.jsonl").as_uri(), "--json"])
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["files"], report["rows_with_errors"]) == (1, 0)


def test_shards_have_the_layout_of_webdataset(world: World, packed: Path) -> None:
    original = read_manifest(world.questions)
    rows = read_manifest(packed)
    for source_row, row in zip(original, rows, strict=True):
        assert row.model_copy(update={"messages": source_row.messages}) == source_row
    rows_as_json = [row.model_dump(mode="json", exclude_none=True) for row in rows]
    members: dict[str, set[str]] = {}
    for path in sorted(packed.parent.glob("questions-*.tar")):
        assert path.stat().st_size <= 20_480, "a tar file is filled up to a multiple of 10 kB"
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                members.setdefault(key, set()).add(extension)
                content = tar.extractfile(member)
                assert content is not None
                if extension == "json":
                    assert json.loads(content.read()) in rows_as_json
    assert len(members) == 8
    with_media = [kinds for kinds in members.values() if kinds == {"json", "0.mp4"}]
    assert len(with_media) == 4, "each file once, with its first row"
    for before, after in zip(original, rows, strict=True):
        file = resolve(after.media[0], packed.parent)
        source = resolve(before.media[0], world.questions.parent)
        with open_bytes(file) as stream:
            assert stream.read() == source.read_bytes()
        assert file_hash(file) == file_hash(source), "so features that are cached are found again"


def assert_same_clip(a: Path, b: Path, backend: str = "auto") -> None:
    first, second = (load_video(p, sampling=SAMPLING, rate=8000, backend=backend) for p in (a, b))
    assert first.duration == second.duration
    assert torch.equal(first.frames.x, second.frames.x)  # type: ignore[union-attr]
    assert (first.sound is None) == (second.sound is None)
    if first.sound is not None and second.sound is not None:
        assert torch.equal(first.sound.x, second.sound.x)


@pytest.mark.parametrize("backend", ["auto", "decord"])
def test_media_in_a_shard_and_at_a_url_decode_alike(
    world: World,
    packed: Path,
    remote: str,
    backend: str,
) -> None:
    if backend != "auto":
        pytest.importorskip(backend)
    rows = zip(read_manifest(world.questions), read_manifest(packed), strict=True)
    for before, after in list(rows)[::2]:
        source = resolve(before.media[0], world.questions.parent)
        member = resolve(after.media[0], packed.parent)
        far = resolve(after.media[0], Manifest(remote).root)
        assert byte_range_of(far) is not None
        assert probe(member) == probe(source) == probe(far)
        assert_same_clip(source, member, backend)
        assert_same_clip(source, far, backend)


def test_missing_and_truncated_members_have_their_reasons(
    packed: Path,
    remote: str,
    tmp_path: Path,
) -> None:
    (part,) = read_manifest(packed)[0].media
    for root in (tmp_path, Path("memory://bucket/nowhere")):
        media = resolve(part, root)
        assert reason_of(lambda media=media: probe(media)) == (MediaError, "missing")
    shard, rest = part.path.split("#")
    short = tmp_path / shard
    offset, size = (int(n) for n in rest.split("/")[0].split("+"))
    short.write_bytes((packed.parent / shard).read_bytes()[: offset + size - 100])
    assert size_of(tmp_path / part.path) == size - 100
    assert reason_of(lambda: probe(tmp_path / part.path)) == (MediaError, "truncated")
    with pytest.raises(FileNotFoundError, match="memory://bucket/none.jsonl"):
        Manifest("memory://bucket/none.jsonl")
    assert size_of("memory://bucket/set") is None, "a folder"
    assert read_manifest(remote) == read_manifest(packed)
    assert digest(remote) == digest(packed)


def test_a_store_that_does_not_answer_is_no_missing_file(
    packed: Path,
    remote: str,
    monkeypatch: Any,
) -> None:
    def no_answer(*_: object, **__: object) -> None:
        raise PermissionError("no credentials")

    (part,) = read_manifest(packed)[0].media
    for ask in (Manifest, size_of, lambda url: file_hash(resolve(part, Path(url).parent))):
        with monkeypatch.context() as patched:
            patched.setattr(MemoryFileSystem, "info", no_answer)
            with pytest.raises(PermissionError, match="no credentials"):
                ask(remote)


def test_a_store_whose_package_is_missing_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    unknown = lambda: Manifest("nosuch://a/b.jsonl")  # noqa: E731
    assert reason_of(unknown) == (StoreError, "unknown_protocol")
    monkeypatch.setattr(fsspec.core, "url_to_fs", not_installed)
    for url, package in (("s3://a/b.jsonl", "s3fs"), ("gs://a/b.mp4", "gcsfs")):
        with pytest.raises(StoreError, match=f"{url}.*pip install {package}") as raised:
            size_of(url)
        assert raised.value.reason == "package_missing"


@pytest.mark.parametrize("url", ["s3://bucket/out", Path("memory://bucket/out")])
def test_local_outputs_refuse_urls(
    world: World,
    url: Any,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    for write in (
        lambda: check([world.questions], output=Path(url)),
        lambda: write_manifest(url, []),
        lambda: AppendOnly(url),
    ):
        with pytest.raises(StoreError, match="://bucket/out") as raised:
            write()
        assert raised.value.reason == "not_local"
    with_remote_cache = settings(world, tmp_path / "run", data__cache=str(url))
    for run_settings in (with_remote_cache, settings(world, Path(url))):
        with pytest.raises(ValidationError, match=r"://?bucket/out"):
            RunConfig.model_validate(run_settings)
    assert list(tmp_path.iterdir()) == []


def test_a_remote_manifest_that_changed_is_fetched_again(remote: str, monkeypatch: Any) -> None:
    # as http does, whose mark never changes
    monkeypatch.setattr(MemoryFileSystem, "ukey", lambda self, path: "always the same")
    store = fsspec.filesystem("memory")
    assert len(Manifest(remote)) == 8
    first_row = store.cat_file("/bucket/set/questions.jsonl").split(b"\n")[0]
    store.pipe_file("/bucket/set/questions.jsonl", first_row)
    assert len(Manifest(remote)) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_training_reads_the_same_batches(
    world: World,
    packed: Path,
    remote: str,
    parts: Parts,
    workers: int,
) -> None:
    batches_by_manifest = []
    for manifest in (world.questions, packed, remote):
        dataset = SampleDataset([manifest], parts.processor, pack=True)
        order = Order(dataset.items.sizes, [1.0], seed=0)
        streams = []
        for rank in (0, 1):
            batches = MicroBatches(order, Cut(1, 1, 2, rank), 1, 4)
            loader = build_loader(dataset, batches, Collate(parts.processor.collate, None), workers)
            streams += [(m.batch.ids, m.batch.input_ids, m.batch.streams) for (m,) in loader]
        batches_by_manifest.append(streams)
    first, *others = batches_by_manifest
    for other in others:
        for (ids, tokens, media), (ids2, tokens2, media2) in zip(first, other, strict=True):
            assert ids == ids2
            assert torch.equal(tokens, tokens2)
            assert media.keys() == media2.keys()
            for name, stream in media.items():
                for key, tensor in stream.inputs.items():
                    assert torch.equal(tensor, media2[name].inputs[key])


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@contextmanager
def interrupted_third_shard(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Press Ctrl-C after the first member of the third shard, and expect it to pass through."""
    add_member = tarfile.TarFile.addfile

    def add_or_stop(tar: tarfile.TarFile, info: tarfile.TarInfo, content: Any = None) -> None:
        if "-000002.tar" in str(tar.name) and tar.offset > 0:
            raise KeyboardInterrupt
        add_member(tar, info, content)

    with monkeypatch.context() as patched:
        patched.setattr(tarfile.TarFile, "addfile", add_or_stop)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_packing_continues_after_an_interruption(
    world: World,
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with interrupted_third_shard(monkeypatch):
        pack_shards([world.questions], tmp_path, shard_size=12_000)
    names = {path.name for path in tmp_path.glob("questions*")}
    assert "questions-000001.tar" in names
    assert not names & {"questions.jsonl", "questions-000002.tar"}
    before = (tmp_path / "questions-000000.tar").stat().st_mtime_ns
    other_size = reason_of(lambda: pack_shards([world.questions], tmp_path, shard_size=13_000))
    assert other_size == (ShardError, "other_unfinished")
    pack_shards([world.questions], tmp_path, shard_size=12_000)
    assert (tmp_path / "questions-000000.tar").stat().st_mtime_ns == before
    assert digests(tmp_path) == digests(packed.parent)


def test_shards_are_packed_into_a_store(
    world: World,
    packed: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stop, continue from a new view of the store, and ask again when it is done."""
    monkeypatch.chdir(packed.parent.parent)
    before = set(Path().iterdir())
    url = "memory://out/set"
    store = fsspec.filesystem("memory")
    with interrupted_third_shard(monkeypatch):
        pack_shards([world.questions], url, shard_size=12_000)
    assert not store.exists("/out/set/questions.jsonl")
    other_size = reason_of(lambda: pack_shards([world.questions], url, shard_size=13_000))
    assert other_size == (ShardError, "other_unfinished")
    first = store.info("/out/set/questions-000000.tar")["created"]
    arguments = [
        "data",
        "pack",
        str(world.questions),
        "--output",
        url,
        "--shard-size",
        "12kB",
        "--json",
    ]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    (report,) = json.loads(done.stdout.splitlines()[-1])["packed"]
    assert (report["rows"], report["manifest"]) == (8, "memory://out/set/questions.jsonl")
    assert store.info("/out/set/questions-000000.tar")["created"] == first
    stored = {}
    for name in store.find("/out/set"):
        stored[Path(name).name] = hashlib.sha256(store.cat_file(name)).hexdigest()
    assert stored == digests(packed.parent)
    (again,) = pack_shards([world.questions], url, shard_size=12_000)
    for count in ("rows", "shards", "size"):
        assert getattr(again, count) == report[count]
    assert read_manifest(url + "/questions.jsonl") == read_manifest(packed)
    itself = reason_of(lambda: pack_shards([url + "/questions.jsonl"], url, shard_size=12_000))
    assert itself == (ShardError, "own_folder")
    assert set(Path().iterdir()) == before
    store.rm("/out", recursive=True)


def test_finished_shards_are_left_alone_and_never_written_over(
    world: World,
    tmp_path: Path,
) -> None:
    first = pack_shards([world.captions], tmp_path, shard_size=12_000)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    second = pack_shards([world.captions, world.questions], tmp_path, shard_size=12_000)
    assert second[0] == first[0]
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before
    other_size = reason_of(lambda: pack_shards([world.captions], tmp_path, shard_size=13_000))
    assert other_size == (ShardError, "other_shards")
    other = tmp_path / "data" / "captions.jsonl"
    write_manifest(other, [chat("none", [said("what ?")], "blue")])
    with pytest.raises(ShardError, match=r"captions\.jsonl") as raised:
        pack_shards([other], tmp_path, shard_size=12_000)
    assert raised.value.reason == "other_shards"
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before


def test_rows_whose_files_are_missing_are_left_out_and_named(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.questions.parent, tmp_path / "data")
    manifest = tmp_path / "data" / "questions.jsonl"
    (tmp_path / "data" / "001.mp4").unlink()
    (tmp_path / "data" / "002.mp4").write_bytes(b"")
    (report,) = pack_shards([manifest], tmp_path / "out")
    assert (report.rows, report.shards) == (4, 1)
    assert report.dropped == {"missing": 2, "zero_byte": 2}
    lines = (tmp_path / "out" / "questions.dropped.jsonl").read_text().splitlines()
    dropped = [json.loads(line) for line in lines]
    assert [d["id"] for d in dropped] == ["colour-1", "pitch-1", "colour-2", "pitch-2"]
    assert dropped[0]["detail"].endswith("001.mp4")
    assert len(read_manifest(report.manifest)) == 4


def test_manifests_that_cannot_be_packed_have_their_reasons(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.questions.parent, tmp_path / "data")
    manifest = tmp_path / "data" / "questions.jsonl"
    same_name = reason_of(lambda: pack_shards([manifest, world.questions], tmp_path / "out"))
    assert same_name == (ShardError, "same_name")
    own_folder = reason_of(lambda: pack_shards([manifest], tmp_path / "data"))
    assert own_folder == (ShardError, "own_folder")
    for clip in (tmp_path / "data").glob("*.mp4"):
        clip.unlink()
    no_rows = reason_of(lambda: pack_shards([manifest], tmp_path / "out"))
    assert no_rows == (ShardError, "no_rows")


def test_the_command_packs_and_reports(world: World, packed: Path, tmp_path: Path) -> None:
    arguments = [
        "data",
        "pack",
        str(world.questions),
        "--output",
        str(tmp_path),
        "--shard-size",
        "12kB",
        "--json",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    (report,) = json.loads(done.stdout.splitlines()[-1])["packed"]
    assert (report["rows"], report["dropped"]) == (8, {})
    assert report["manifest"] == str(tmp_path / "questions.jsonl")
    assert digests(tmp_path) == digests(packed.parent)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GB", 10**9), ("1.5 mb", 1_500_000), ("77", 77), ("2T", 2 * 10**12)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    for wrong in ("", "0", "GB", "-1GB", "1XB"):
        assert reason_of(lambda wrong=wrong: parse_size(wrong)) == (ShardError, "no_size")


def test_several_files_of_a_row_and_rows_of_text(world: World, tmp_path: Path) -> None:
    clip = {"type": "video", "video": "000.mp4", "end": 0.5}
    two = [clip, {"type": "audio", "audio": "001.mp4"}, {**clip, "end": 0.25}]
    rows = [chat("two", [*two, said("which ?")], "red"), chat("none", [said("what ?")], "blue")]
    manifest = world.questions.parent / "mixed.jsonl"
    write_manifest(manifest, rows)
    (report,) = pack_shards([manifest], tmp_path)
    with tarfile.open(tmp_path / "mixed-000000.tar") as tar:
        assert tar.getnames() == [
            "000000000.0.mp4",
            "000000000.1.mp4",
            "000000000.json",
            "000000001.json",
        ]
    first, second = read_manifest(report.manifest)
    a, b, c = first.media
    assert (a.path, a.end, c.end) == (c.path, 0.5, 0.25)  # type: ignore[union-attr]
    assert a.path != b.path
    assert second.media == []
