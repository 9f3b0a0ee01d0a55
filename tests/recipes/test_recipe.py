"""Test the frame of recipes: command line, layout, media, ids, paths, drops, and readers."""

from __future__ import annotations

import gzip
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer

from avllm.data.manifest import read_manifest
from avllm.data.schema import RowError, resolve
from avllm.data.store.append_only import LockedError
from avllm.recipes import frame as recipe
from avllm.recipes import readers
from avllm.recipes.about import check_layout
from avllm.recipes.captions import PROMPTS, caption_messages, caption_prompt, caption_samples
from avllm.recipes.frame import (
    Dataset,
    Drop,
    RecipeError,
    RecipeReport,
    RecipeRow,
    Record,
    make,
    read_csv,
    read_json,
    read_jsonl,
    rows_of,
)
from avllm.recipes.table import page, read_about

ABOUT = Dataset(
    title="Clips",
    licence="CC0",
    size="three",
    where="https://example.org/clips",
    layout="""
        clips.jsonl | old.jsonl  the rows
        [videos/  the media]
    """,
    citation="Doe, 2020",
)


def rows(
    source: Path,
    prefix: Annotated[str, typer.Option(help="What ids begin with.")] = "clip",
    mode: Literal["short", "long"] = "short",
    end: float | None = None,
) -> Iterator[RecipeRow | Drop]:
    for record in read_jsonl(source / "clips.jsonl"):
        if not record.text("caption"):
            yield Drop("empty_caption", record.where, record.text("id"))
            continue
        part = {"type": "video", "video": record["file"]} | ({"end": end} if end else {})
        caption = record.text("caption") * (2 if mode == "long" else 1)
        for sample in caption_samples(f"{prefix}-{record.text('id')}", part, [caption], True):
            yield RecipeRow(sample | record.get("more", {}), record.get("split", "train"))


def line(name: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "file": f"videos/{name}.mp4", "caption": f"what {name} shows"} | fields


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a source of these lines with their media, some ``without``."""

    def written(*lines: dict[str, Any], without: tuple[str, ...] = ()) -> Path:
        source = tmp_path / "source"
        (source / "videos").mkdir(parents=True, exist_ok=True)
        (source / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        for row in lines:
            if row["file"] not in without and not os.path.isabs(row["file"]):
                (source / row["file"]).write_bytes(b"x")
        return source

    return written


def run(source: Path, output: Path, **options: Any) -> RecipeReport:
    return make(ABOUT, rows, source, output, name="clips", **options)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_rows_get_source_licence_and_paths_from_the_manifest(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere" / "c.mp4"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(b"x")
    own = {"licence": "mine", "meta": {"nothing": None}}
    source = write(line("a"), line("b", more=own, split="test"), line("c", file=str(elsewhere)))
    output = tmp_path / "deep" / "out"
    assert run(source, output).rows == {"train": 2, "test": 1}
    a, c = read_manifest(output / "train.jsonl")
    (b,) = read_manifest(output / "test.jsonl")
    assert (a.source, a.licence, b.licence, b.meta) == ("clips", "CC0", "mine", {"nothing": None})
    assert [s.media[0].path for s in (a, b, c)] == [
        "../../source/videos/a.mp4",
        "../../source/videos/b.mp4",
        "../../elsewhere/c.mp4",
    ]
    assert resolve(c.media[0], output).samefile(elsewhere)
    assert list(lines_of(output / "train.jsonl")[0])[0] == "id"


def test_missing_media_are_named_once_and_their_rows_dropped(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    gone = "videos/b.mp4"
    source = write(line("a"), line("b"), line("b2", file=gone), without=(gone,))
    report = run(source, tmp_path / "out")
    assert (report.rows, report.dropped, report.missing_files) == (
        {"train": 1},
        {"missing_media": 2},
        1,
    )
    assert (tmp_path / "out" / "missing.txt").read_text() == f"{gone}\n"
    dropped = lines_of(tmp_path / "out" / "dropped.jsonl")
    assert dropped == [
        {"reason": "missing_media", "where": f"clip-{name}", "detail": gone} for name in ("b", "b2")
    ]


def test_an_empty_file_is_as_good_as_none(write: Callable[..., Path], tmp_path: Path) -> None:
    source = write(line("a"), line("b"), line("c"), without=("videos/c.mp4",))
    (source / "videos/b.mp4").write_bytes(b"")
    report = run(source, tmp_path / "out")
    assert (report.rows, report.missing_files) == ({"train": 1}, 2)
    assert report.dropped == {"empty_media": 1, "missing_media": 1}
    assert (tmp_path / "out" / "missing.txt").read_text() == "videos/b.mp4\nvideos/c.mp4\n"
    (source / "videos/b.mp4").write_bytes(b"x")
    assert run(source, tmp_path / "out").rows == {"train": 2}


def test_a_row_that_the_schema_refuses_is_dropped_with_its_field(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    source = write(line("a"), line("b", more={"secnods": 3}), line("c", caption=""))
    report = run(source, tmp_path / "out")
    assert report.dropped == {"invalid_row": 1, "empty_caption": 1}
    invalid, empty = lines_of(tmp_path / "out" / "dropped.jsonl")
    assert (invalid["where"], empty["where"]) == ("clip-b", "clips.jsonl:3")
    assert "secnods" in invalid["detail"]


def test_ids_are_unique_over_all_splits_and_the_change_is_counted(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    source = write(line("a"), line("a", split="test"), line("a~2"), line("a"))
    report = run(source, tmp_path / "out")
    ids = [
        row["id"]
        for split in ("train", "test")
        for row in lines_of(tmp_path / "out" / f"{split}.jsonl")
    ]
    assert ids == ["clip-a", "clip-a~2~2", "clip-a~3", "clip-a~2"]
    assert report.numbered_ids == 3


def test_options_limit_and_account(write: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    report = run(write(*(line(name) for name in "abcd")), output, limit=2, mode="long", end=1.5)
    assert report.rows.total() == 2
    account = json.loads((output / "recipe.json").read_text())
    assert account["options"] == {"mode": "long", "end": 1.5, "limit": 2}
    assert account["about"]["where"] == ABOUT.where
    assert (account["rows"], account["dropped"]) == ({"train": 2}, {})
    assert {p.name for p in output.iterdir()} == {
        "train.jsonl",
        "dropped.jsonl",
        "missing.txt",
        "recipe.json",
    }
    assert lines_of(output / "train.jsonl")[0]["messages"][0]["content"][0]["end"] == 1.5


def test_a_run_replaces_what_the_last_one_wrote_and_a_failed_run_nothing(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    run(write(line("a"), line("b", split="test")), output)
    run(write(line("a")), output)
    assert not (output / "test.jsonl").exists()
    before = {p.name: p.read_bytes() for p in output.iterdir()}
    source = write(line("z"))
    with (source / "clips.jsonl").open("a") as file:
        file.write('{"id": "cut off')
    with pytest.raises(RecipeError) as caught:
        run(source, output)
    assert caught.value.reason == "no_json"
    assert "clips.jsonl line 2" in str(caught.value)
    assert {p.name: p.read_bytes() for p in output.iterdir() if p.suffix != ".partial"} == before


def test_another_recipes_folder_is_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    source = write(line("a"))
    run(source, tmp_path / "out")
    with pytest.raises(RecipeError) as caught:
        make(ABOUT, rows, source, tmp_path / "out", name="sounds")
    assert caught.value.reason == "other_recipe"


def test_a_folder_is_written_by_one_run_at_a_time(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    source, output = write(line("a"), line("b", caption=""), line("c")), tmp_path / "out"

    def disturbed(source: Path) -> Iterator[RecipeRow | Drop]:
        for item in rows(source):
            yield item
            with pytest.raises(LockedError, match=r"dropped\.jsonl\.partial"):
                run(source, output)

    assert make(ABOUT, disturbed, source, output, name="clips").rows == {"train": 2}
    assert [drop["where"] for drop in lines_of(output / "dropped.jsonl")] == ["clips.jsonl:2"]
    assert len(read_manifest(output / "train.jsonl")) == 2
    assert run(source, output).rows == {"train": 2}


def test_nothing_kept_is_an_error_that_says_why(write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        run(write(line("a", caption=" ")), tmp_path / "out")
    assert caught.value.reason == "no_rows"
    for words in ("1 empty_caption", "clips.jsonl:1: a"):  # the count, and the first row
        assert words in str(caught.value)
    with pytest.raises(RecipeError) as caught:
        run(write(), tmp_path / "out")
    assert caught.value.reason == "no_rows"
    assert not (tmp_path / "out" / "recipe.json").exists()


def test_layout_takes_either_file_and_globs_and_names_what_lacks(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"https://example\.org/clips") as caught:
        check_layout(ABOUT, tmp_path / "nowhere")
    assert caught.value.reason == "no_folder"
    with pytest.raises(RecipeError, match=r"clips\.jsonl or old\.jsonl") as caught:
        check_layout(ABOUT, tmp_path)
    assert caught.value.reason == "absent_files"
    (tmp_path / "old.jsonl").touch()
    check_layout(ABOUT, tmp_path)
    deep = Dataset(**(vars(ABOUT) | {"layout": "parts/*/x.csv  one a part"}))
    with pytest.raises(RecipeError, match=r"parts/\*/x\.csv") as caught:
        check_layout(deep, tmp_path)
    assert caught.value.reason == "absent_files"
    (tmp_path / "parts" / "7").mkdir(parents=True)
    (tmp_path / "parts" / "7" / "x.csv").touch()
    check_layout(deep, tmp_path)


def command(*argv: str) -> int:
    """Run the command line and return its exit status."""
    with pytest.raises(SystemExit) as ended:
        recipe.main(ABOUT, rows, list(argv))
    return int(ended.value.code or 0)


def test_the_command_line_is_made_from_the_parameters(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = (
        str(write(line("a"), line("b"), without=("videos/b.mp4",))),
        str(tmp_path / "out"),
    )
    assert command(source, "--output", output, "--prefix", "x", "--mode", "long", "--json") == 1
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["dropped"] == {"missing_media": 1}
    assert "1 media files are missing" in err
    assert "missing.txt" in err
    assert command(source, "--output", output, "--prefix", "x", "--allow-missing") == 0
    assert [s.id for s in read_manifest(tmp_path / "out" / "train.jsonl")] == ["x-a"]
    assert command(source, "--output", output, "--mode", "wide") == 2
    assert command(str(tmp_path / "nowhere"), "--output", output) == 1
    assert "is not a folder" in capsys.readouterr().err
    assert command("--help") == 0
    said = capsys.readouterr().out
    assert all(
        word in said
        for word in ("--prefix", "What ids begin with.", "clips.jsonl | old.jsonl", "--limit")
    )


def test_a_recipe_that_writes_media_is_given_the_output_folder(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    def made(source: Path, output: Path) -> Iterator[RecipeRow | Drop]:
        (output / "made.wav").write_bytes(b"x")
        for sample in caption_samples(
            "a", {"type": "audio", "audio": str(output / "made.wav")}, ["x"], True
        ):
            yield RecipeRow(sample)

    make(ABOUT, made, write(), tmp_path / "out", name="made")
    (sample,) = read_manifest(tmp_path / "out" / "train.jsonl")
    assert sample.media[0].path == "made.wav"
    assert [p.name for p in recipe.own_options(made)] == []


def test_what_is_wrong_with_one_record_is_a_drop() -> None:
    records = [Record({"n": n}, f"f:{n}") for n in (1, "x", 3, 4)]

    def build(record: Record) -> RecipeRow | Drop | list[RecipeRow | Drop]:
        number = int(record.number("n"))
        if number == 3:
            raise RowError("odd", "it is three")
        return (
            Drop("even", record.where)
            if number == 4
            else [RecipeRow({"id": "a"}), RecipeRow({"id": "b"})]
        )

    first, second, malformed, *drops = rows_of(records, build)
    assert [first, second] == [RecipeRow({"id": "a"}), RecipeRow({"id": "b"})]
    assert drops == [Drop("odd", "f:3", "it is three"), Drop("even", "f:4")]
    assert isinstance(malformed, Drop)
    assert (malformed.reason, malformed.where) == ("malformed_row", "f:x")


# Readers


def test_csv_knows_its_columns_lines_and_quirks(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes('\ufeffid,text,more\n1,"two\nlines, one field",x\n\n2,b,\n'.encode())
    records = list(read_csv(table, ("id", "text")))
    assert [dict(r) for r in records] == [
        {"id": "1", "text": "two\nlines, one field", "more": "x"},
        {"id": "2", "text": "b", "more": ""},
    ]
    assert [r.where for r in records] == ["t.csv:3", "t.csv:5"]
    with pytest.raises(RecipeError, match=r"t\.csv.* label") as caught:
        list(read_csv(table, ("id", "label")))
    assert caught.value.reason == "no_column"
    table.write_text("a,1,x,y\n")
    (long,) = read_csv(table, ("name", "n"), header=False)
    assert (dict(long), long.surplus) == ({"name": "a", "n": "1"}, ["x", "y"])
    table.write_text("# remark\na\t1\nb\n")
    (whole, short) = read_csv(table, ("name", "n"), delimiter="\t", header=False, comment="#")
    assert (whole.number("n"), whole.problem, short.where) == (1.0, "", "t.csv:3")
    assert short.problem
    assert list(rows_of([short], lambda _: RecipeRow({}))) == [
        Drop("malformed_row", "t.csv:3", short.problem)
    ]


def test_records_name_row_and_field(tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    table.write_text('{"n": 3, "text": null, "tags": ["a"]}\n\n{"n": "x"}\n')
    first, second = read_jsonl(table)
    assert (first.text("n"), first.text("text"), first.array("tags"), first.number("n")) == (
        "3",
        "",
        ["a"],
        3.0,
    )
    for ask, reason, place in [
        (lambda: second["text"], "no_field", r"t\.jsonl:3: .*'text'"),
        (lambda: second.number("n"), "field_type", r"t\.jsonl:3: .*'n'"),
        (lambda: first.text("tags"), "field_type", r"t\.jsonl:1: .*'tags'"),
        (lambda: first.array("n"), "field_type", r"t\.jsonl:1: .*'n'"),
    ]:
        with pytest.raises(RecipeError, match=place) as caught:
            ask()
        assert caught.value.reason == reason
    table.write_text("[1]\n")
    with pytest.raises(RecipeError, match=r"t\.jsonl:1") as caught:
        list(read_jsonl(table))
    assert caught.value.reason == "no_object"


VALUES: list[Any] = [
    {"id": 1, "s": 'a "b" ]}, \\ é', "n": [1.5e3, -2, None]},
    {"id": 22},
    {"id": 333, "deep": {"x": [[]]}},
]


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_json_is_streamed_whatever_the_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(readers, "CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(VALUES, indent=1, ensure_ascii=False), encoding="utf-8")
    assert [(dict(r), r.where) for r in read_json(path)] == [
        (v, f"a.json[{n}]") for n, v in enumerate(VALUES)
    ]
    path.write_text(json.dumps({"version": {"data": [0]}, "n": 12.25, "data": VALUES, "rest": 1}))
    assert [dict(r) for r in read_json(path, "data")] == VALUES
    path.write_text(json.dumps({"v_a": VALUES[0], "v_b": 17}))
    assert [(r.key, dict(r), r.where) for r in read_json(path)] == [
        ("v_a", VALUES[0], 'a.json["v_a"]'),
        ("v_b", {"value": 17}, 'a.json["v_b"]'),
    ]
    path.write_text("[12")
    with pytest.raises(RecipeError) as caught:
        list(read_json(path))
    assert caught.value.reason == "no_json"
    path.write_text("[]")
    assert list(read_json(path)) == []
    path.write_text("{}")
    assert list(read_json(path)) == []


@pytest.mark.parametrize("text", ["", '"text"', '[{"a": 1} {"a": 2}]', '[{"a": 1}, ', '[{"a": tru'])
def test_json_that_is_broken_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        list(read_json(path))
    assert caught.value.reason == "no_json"
    assert str(path) in str(caught.value)


def test_a_field_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"info": 1, "rows": []}')
    with pytest.raises(RecipeError, match="'data'.* info, rows") as caught:
        list(read_json(path, "data"))
    assert caught.value.reason == "no_field"


def test_files_are_read_out_of_zip_and_gzip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("inner/a.jsonl", '{"x": "é"}\n')
    with gzip.open(tmp_path / "a.json.gz", "wt", encoding="utf-8") as file:
        file.write('[{"x": "é"}]')
    (zipped,) = read_jsonl(tmp_path / "a.zip" / "inner" / "a.jsonl")
    (gzipped,) = read_json(tmp_path / "a.json.gz")
    assert zipped == gzipped == {"x": "é"}
    (tmp_path / "b.zip").write_text("no zip")
    for name, reason in {
        "a.zip/b.json": "no_member",
        "b.zip/b.json": "broken_zip",
        "c.json": "no_file",
    }.items():
        with pytest.raises(RecipeError) as caught:
            list(read_json(tmp_path / name))
        assert caught.value.reason == reason
        assert Path(name).parts[0] in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.csv.gz", gzip.compress(b"id,text\n1,a\n", mtime=0)[:-9]),
        ("latin.csv", "id,text\n1,caf\xe9\n".encode("iso-8859-1")),
        ("quote.csv", b'id,text\n1,"' + b"x" * 200_000),
    ],
    ids=["cut.csv.gz", "latin.csv", "quote.csv"],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=name) as caught:
        list(read_csv(tmp_path / name, ("id", "text")))
    assert caught.value.reason == "unreadable"


def test_media_are_found_by_their_ids(tmp_path: Path) -> None:
    for name in ("b/x.1.WAV", "a/x.1.flac", "a/y.txt", "-z.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert recipe.files_by_stem(tmp_path, tmp_path, (".wav", ".flac")) == {
        "-z": "-z.wav",
        "x.1": "a/x.1.flac",
    }
    assert recipe.first_file(tmp_path, ("c/q.wav", "a/y.txt")) == "a/y.txt"
    assert recipe.first_file(tmp_path, ("c/q.wav", "d/q.wav")) == "c/q.wav"


# Captions


def test_prompts_are_varied_and_follow_from_the_key() -> None:
    assert len({caption_prompt("video", str(n)) for n in range(100)}) == len(PROMPTS["video"])
    assert (
        caption_prompt("audio", "clotho-1")
        == caption_prompt("audio", "clotho-1")
        == PROMPTS["audio"][2]
    )
    assert all(len(set(choices)) == len(choices) for choices in PROMPTS.values())


def test_captions_are_rows_in_training_and_answers_in_evaluation() -> None:
    part = {"type": "audio", "audio": "a.wav"}
    training = list(caption_samples("a", part, ["one", "two"], True))
    assert [s["id"] for s in training] == ["a-0", "a-1"]
    assert [s["messages"][1]["content"][0]["text"] for s in training] == ["one", "two"]
    (single,) = caption_samples("a", part, ["one"], True)
    assert single == {"id": "a", "messages": caption_messages(part, "one", "a")}
    (row,) = caption_samples("a", part, ["one", "two", "three"], False)
    assert (row["id"], row["answers"]) == ("a", ["two", "three"])
    assert row["messages"] == caption_messages(part, "one", None)
    (row,) = caption_samples("a", part, ["one"], False)
    assert "answers" not in row


# The table


def test_the_table_is_made_from_abouts_that_are_text(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text(
        'ABOUT = Dataset(title="B|b", licence="x", size="y", where="z", layout="", citation="")'
    )
    (tmp_path / "a.py").write_text("VERSION = 1\n")
    text = page("head\n<!-- table of recipes -->\nold\n<!-- end of table -->\ntail\n", tmp_path)
    assert (
        "| `b.py` | B\\|b | x | y | z | `python data_recipes/b.py SOURCE --output DIR` |\n" in text
    )
    assert text.startswith("head\n")
    assert text.endswith("tail\n")
    assert "old" not in text
    assert page(text, tmp_path) == text
    with pytest.raises(RecipeError) as caught:
        page("head", tmp_path)
    assert caught.value.reason == "no_place"
    (tmp_path / "c.py").write_text("ABOUT = Dataset(title=NAME)")
    with pytest.raises(RecipeError) as caught:
        read_about(tmp_path / "c.py")
    assert caught.value.reason == "about_not_text"
