"""Check odd manifests and files: each gets its reason, and nothing hangs or fails."""

from __future__ import annotations

import codecs
import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.check.checked_rows import about, reasons, reasons_of, words
from PIL import Image
from tiny import row, text, write_clip, write_rows
from typer.testing import CliRunner

from avllm.cli.main import app
from avllm.data.check import run as check_module
from avllm.data.check.file import examine, thumbnail
from avllm.data.check.files import ExamineOptions, gather
from avllm.data.check.histogram import bin_edges, histogram, ticks
from avllm.data.check.rows import Ids, lines
from avllm.data.check.run import check
from avllm.data.check.uses import FileJob, PlainReader, Use
from avllm.data.items import read_quarantine
from avllm.data.manifest import ManifestError, read_manifest
from avllm.errors import UserError

INVOKE = CliRunner().invoke


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", (200, 30, 30), 400.0)


def picture_row(path: Path | str) -> dict[str, Any]:
    """Return a row about a picture."""
    content = [{"type": "image", "image": str(path)}, text("what ?")]
    return {**row(str(path), content, "red"), "licence": "x"}


# ---- lines --------------------------------------------------------------------------------------


def test_lines_that_are_no_rows_are_counted_and_the_others_read(tmp_path: Path) -> None:
    good = [
        json.dumps(words(id)).encode()
        for id in ("first", "\u2028 second", "[bold]third[/]", "last")
    ]
    bad = [
        *(
            b"[" * 100_000,
            b'{"a":' * 5_000,
            b"null",
            b"\xff\xfe",
            b"\x00",
            b'{"id": "half \\ud800"}',
            b'{"id": 5}',
        ),
        b'{"id": "long", "x": "' + b"y" * 2_000_000 + b'"}',
    ]
    manifest = tmp_path / "m.jsonl"
    manifest.write_bytes(codecs.BOM_UTF8 + b"\r\n".join([*good[:-1], b" \t", *bad, good[-1]]))
    report = check([manifest], output=tmp_path / "out")
    assert report.rows == {str(manifest): 12}
    assert report.reasons == {"malformed": 8}
    assert report.to_fix == {str(manifest): list(range(5, 13))}
    assert {f.id for f in report.examples["malformed"]} == {"", "long"}


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(codecs.BOM_UTF8 + json.dumps(words("a")).encode())
    assert [sample.id for sample in read_manifest(tmp_path / "m.jsonl")] == ["a"]


def test_a_manifest_given_twice_is_read_once(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "m.jsonl", [words("a")])
    assert check([manifest, manifest]).rows == {str(manifest): 1}


def test_a_manifest_that_changes_meanwhile_is_an_error(
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest = write_rows(tmp_path / "m.jsonl", [about(clip, "a")])
    really = check_module.same_bytes

    def meanwhile(*given: Any) -> dict[str, str]:
        write_rows(manifest, [about(clip, "a"), about(tmp_path / "new.mp4", "b")])
        return really(*given)

    monkeypatch.setattr(check_module, "same_bytes", meanwhile)
    with pytest.raises(ManifestError, match=r"m.jsonl line 2") as raised:
        check([manifest])
    assert raised.value.reason == "changed"


def test_only_repeated_ids_are_held(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "m.jsonl", [words(id) for id in ("a", "b", "a", "c", "a")])
    ids = Ids()
    problems_by_line = {}
    for line in list(ids.counting(lines([manifest]))):
        problems_by_line[line.number] = list(ids.problems(line))
    assert {number for number, problems in problems_by_line.items() if problems} == {3, 5}
    for number in (3, 5):
        (problem,) = problems_by_line[number]
        assert problem.reason == "duplicate_id"
        assert "'a'" in problem.detail
        assert f"{manifest} line 1" in problem.detail
    assert list(ids._first) == ["a"]


def test_uses_of_files_are_gathered(clip: Path, tmp_path: Path) -> None:
    parts = [{"type": "video", "video": "a.mp4", "start": float(n % 3)} for n in range(6)]
    rows = [
        row("1", [*parts, text("?")], "x"),
        row("2", [{"type": "audio", "audio": "./a.mp4"}, text("?")], "x"),
    ]
    rows.append(row("3", [{"type": "audio", "audio": "b.mp4"}, text("?")], "x"))
    uses = gather(lines([write_rows(tmp_path / "m.jsonl", rows)]))
    assert uses == {
        str(tmp_path / "a.mp4"): (
            Use("video", 0.0),
            Use("video", 1.0),
            Use("video", 2.0),
            Use("audio"),
        ),
        str(tmp_path / "b.mp4"): (Use("audio"),),
    }


# ---- places -------------------------------------------------------------------------------------


def test_odd_names_are_names(clip: Path, tmp_path: Path) -> None:
    names = [
        *("sp ace/ünï.mp4", "quo'te\".mp4", "a#b%20.mp4", "-dash.mp4"),
        *("new\nline.mp4", "~nobody.mp4", "[b]x[/b].MP4"),
    ]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(clip.read_bytes() + bytes(number))
    rows = [about(Path(name), str(number)) for number, name in enumerate(names)]
    report = check([write_rows(tmp_path / "m.jsonl", rows)], output=tmp_path / "out")
    assert reasons(report) == {}
    assert check([tmp_path / "m.jsonl"], output=tmp_path / "out").reused == len(names)


def test_folders_pipes_and_loops_are_missing_files(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "to nothing.mp4").symlink_to("nothing.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.mp4"))
    names = [
        "folder.mp4",
        "to nothing.mp4",
        "loop.mp4",
        "pipe.mp4",
        "socket.mp4",
        "/dev/zero",
        "n\0l.mp4",
        "x" * 5000,
    ]
    names += ["gone.tar#0+9/a.mp4", "~nobody/a.mp4"]
    rows = [*(about(Path(name), name) for name in names), picture_row("pipe.png")]
    report = check([write_rows(tmp_path / "m.jsonl", rows)], output=tmp_path / "out")
    assert reasons(report) == dict.fromkeys([*names, "pipe.png"], {"missing"})
    details = {finding.id: finding.detail for finding in report.examples["missing"]}
    assert "folder" in details["folder.mp4"]
    assert details["loop.mp4"] != details["folder.mp4"]
    assert len(read_quarantine([tmp_path / "out/quarantine.txt"])) == len(rows)


def test_a_store_that_cannot_be_reached_is_asked_again_the_next_time(
    clip: Path,
    tmp_path: Path,
) -> None:
    rows = [
        about(clip, "here"),
        {**about(clip, "there"), "messages": about(Path("x"), "x")["messages"]},
    ]
    rows[1]["messages"][0]["content"][0]["video"] = "nosuch://bucket/a.mp4"
    manifest = write_rows(tmp_path / "m.jsonl", rows)
    for reused in (0, 1):
        report = check([manifest], output=tmp_path / "out")
        assert reasons(report) == {"there": {"unreachable"}}
        assert "nosuch://bucket/a.mp4" in report.examples["unreachable"][0].detail
        assert report.reused == reused


def test_a_link_is_no_other_file(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "link.mp4").symlink_to(clip)
    (tmp_path / "copy.mp4").write_bytes(clip.read_bytes())
    rows = [about(clip, "file"), about(Path("link.mp4"), "link"), about(Path("copy.mp4"), "copy")]
    assert reasons(check([write_rows(tmp_path / "m.jsonl", rows)])) == {"copy": {"duplicate_media"}}


# ---- files --------------------------------------------------------------------------------------


def test_pictures_of_every_mode_are_good(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    picture = Image.fromarray(x)
    made = {
        "cmyk.jpg": picture.convert("CMYK"),
        "16 bits.png": Image.fromarray(x[..., 0].astype(np.uint16) << 8),
        "palette.png": picture.convert("P"),
        "two colours.png": picture.convert("1"),
        "alpha.png": picture.convert("LA"),
        "floats.tiff": picture.convert("F"),
        "one.png": Image.new("RGB", (1, 1)),
        "wide.bmp": Image.new("RGB", (20_000, 2)),
    }
    for name, image in made.items():
        image.save(tmp_path / name)
    turned = Image.Exif()
    turned[0x112] = 6
    picture.save(tmp_path / "turned.jpg", exif=turned)
    picture.save(tmp_path / "moving.gif", save_all=True, append_images=[picture.rotate(90)])
    names = [*made, "turned.jpg", "moving.gif"]
    report = check([write_rows(tmp_path / "m.jsonl", [picture_row(name) for name in names])])
    assert reasons(report) == {"moving.gif": {"animation"}}
    assert (list(report.values["frames"]), "seconds" in report.values) == (
        [1.0] * len(names),
        False,
    )


def test_a_picture_that_is_also_asked_for_as_a_film(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    job = FileJob(str(tmp_path / "a.png"), (Use("image"), Use("video")))
    result = examine(PlainReader(), "sample", job)
    assert [reasons_of(use) for use in result["uses"]] == [[], ["undecodable"]]
    assert result["problems"] == []


def test_absurd_rates_are_found_with_and_without_decoding(clip: Path, tmp_path: Path) -> None:
    data = bytearray(b"RIFF" + bytes(4) + b"WAVEfmt " + bytes([16, 0, 0, 0, 1, 0, 1, 0]))
    data += (1).to_bytes(4, "little") + (2).to_bytes(4, "little") + bytes([2, 0, 16, 0]) + b"data"
    data += (20_000).to_bytes(4, "little") + bytes(20_000)
    data[4:8] = (len(data) - 8).to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(data)
    for decode in ("headers", "sample"):
        result = examine(PlainReader(), decode, FileJob(str(tmp_path / "a.wav"), (Use("audio"),)))
        (use,) = result["uses"]
        assert reasons_of(use) == ["absurd_header"]
        assert re.findall(r"\d+", use["problems"][0].detail) == ["1", "1000", "1000000"]
        assert "seconds" not in use


def test_details_name_the_decoder_and_not_the_path(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("this is no film\n" * 200)
    job = FileJob(str(path), (Use("video"), Use("image")))
    film, picture = examine(PlainReader(), "sample", job)["uses"]
    for use, decoder in ((film, "libav"), (picture, "Pillow")):
        (problem,) = use["problems"]
        assert problem.reason == "undecodable"
        assert decoder in problem.detail
        assert str(path) not in problem.detail


# ---- page and terminal --------------------------------------------------------------------------


def test_examples_are_of_many_files_and_have_thumbnails(clip: Path, tmp_path: Path) -> None:
    rows = []
    for number in range(3):
        (tmp_path / f"{number}.avi").write_bytes(clip.read_bytes() + bytes(number))
        rows += [about(Path(f"{number}.avi"), f"{number}-{n}") for n in range(30)]
    report = check([write_rows(tmp_path / "m.jsonl", rows)], output=tmp_path / "out")
    paths = [finding.path for finding in report.examples["wrong_extension"]]
    assert report.reasons["wrong_extension"] == 90
    assert [paths.count(str(tmp_path / f"{n}.avi")) for n in range(3)] == [5, 1, 1]
    assert report.thumbnails == {path: thumbnail(path) for path in paths}
    page = (tmp_path / "out/check.html").read_text()
    assert page.count("<img") == len(paths)
    assert f'<td class=file title="{tmp_path}/0.avi">0.avi</td>' in page
    assert "findings.jsonl" in page, "for the findings that are not shown"


def test_thumbnails_are_read_from_the_journal(
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "a.avi").write_bytes(clip.read_bytes())
    manifest = write_rows(tmp_path / "m.jsonl", [about(Path("a.avi"), "a")])
    first = check([manifest], output=tmp_path / "out").thumbnails
    monkeypatch.setattr(check_module, "thumbnail", None)  # would make them
    assert check([manifest], output=tmp_path / "out").thumbnails == first != {}


def test_a_long_id_does_not_fill_the_page(tmp_path: Path) -> None:
    rows = [words("x" * 5000, " "), words("<script>", " ")]
    check([write_rows(tmp_path / "m.jsonl", rows)], output=tmp_path / "out")
    page = (tmp_path / "out/check.html").read_text()
    assert "x" * 77 + "..." in page
    assert "x" * 78 not in page
    assert "<script>" not in page


def test_histograms() -> None:
    assert bin_edges(np.array([1.0, 8.0, 8.0])).tolist() == [n + 0.5 for n in range(9)]
    assert bin_edges(np.array([0.5])).tolist() == pytest.approx(np.linspace(0.5, 1.5, 31).tolist())
    far = np.append(np.linspace(1.0, 2.5, 1000), 3600.0)
    assert bin_edges(far)[-1] == pytest.approx(np.percentile(far, 99))
    assert "the last bar holds all from 2.437 on" in histogram("seconds", "s", far.tolist())
    assert histogram("seconds", "s", far.tolist()).count("<rect") == 30
    few = histogram("frames", "read", [1.0, 2.0, 2.0])
    assert re.findall(r"middle\">([^<]+)<", few) == ["1", "2"]
    assert ticks(0.5, 8.5) == [2.0, 4.0, 6.0, 8.0]
    assert ticks(-120.0, -16.4) == [-120.0, -100.0, -80.0, -60.0, -40.0, -20.0]
    for low, high in ((0.0, 1e-3), (-1.0, 1e6), (3.0, 3.7)):
        assert 3 <= len(ticks(low, high)) <= 8


def test_a_longest_row_without_anything_that_counts_is_refused(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "m.jsonl", [words("a")])
    with pytest.raises(UserError, match="--max-length 9 .*--preset"):
        INVOKE(app, ["data", "check", str(manifest), "--max-length", "9"], catch_exceptions=False)
    assert "--preset" in INVOKE(app, ["data", "check", str(manifest)]).stderr


def test_a_terminal_shows_names_and_examples_in_full(clip: Path, tmp_path: Path) -> None:
    rows = [
        about(clip, "a", kind="a.kind.with.a.long.name"),
        about(tmp_path / "[red]gone.mp4", "[/]odd", source="b"),
    ]
    manifest = write_rows(tmp_path / "m.jsonl", rows)
    output = INVOKE(app, ["data", "stats", str(manifest)], env={"COLUMNS": "80"}).stdout
    assert "a.kind.with.a.long.name" in output
    assert "tokens" not in output
    output = INVOKE(
        app,
        ["data", "check", str(manifest), "--workers", "1"],
        env={"COLUMNS": "80"},
    ).stdout
    assert [line.split()[:3] for line in output.splitlines() if line.startswith("error")] == [
        ["error", "missing", "1"],
    ]
    assert "[/]odd: " in output


def test_headers_need_no_decoding(clip: Path, tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "m.jsonl", [about(clip, "a")])
    report = check([manifest], options=ExamineOptions("headers"))
    assert (len(report.values["seconds"]), len(report.values["frames"])) == (1, 1)
