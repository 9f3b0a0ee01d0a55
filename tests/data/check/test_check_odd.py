"""`avllm data check` over manifests and files as nobody wants them: each is named, and nothing hangs or falls over."""

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
from data.check.checked_rows import about, reasons, words
from PIL import Image
from tiny import row, text, write_clip, write_rows
from typer.testing import CliRunner

from avllm.cli.main import app
from avllm.data.check import run as check_module
from avllm.data.check.file import Job, PlainReader, Use, examine, thumbnail
from avllm.data.check.files import Looking, gather
from avllm.data.check.histogram import bin_edges, histogram, ticks
from avllm.data.check.rows import Ids, lines
from avllm.data.check.run import check
from avllm.data.items import read_quarantine
from avllm.data.manifest import ManifestError, read_manifest

INVOKE = CliRunner().invoke


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", (200, 30, 30), 400.0)


def shown(path: Path | str) -> dict[str, Any]:
    """A row about a picture."""
    return {**row(str(path), [{"type": "image", "image": str(path)}, text("what ?")], "red"), "licence": "x"}


# ---- lines ----------------------------------------------------------------------------------------------------------


def test_lines_that_are_no_rows_are_counted_and_the_others_read(tmp_path: Path) -> None:
    good = [json.dumps(words(id)).encode() for id in ("first", "\u2028 second", "[bold]third[/]", "last")]
    bad = [
        *(b"[" * 100_000, b'{"a":' * 5_000, b"null", b"\xff\xfe", b"\x00", b'{"id": "half \\ud800"}', b'{"id": 5}'),
        b'{"id": "long", "x": "' + b"y" * 2_000_000 + b'"}',
    ]
    manifest = tmp_path / "m.jsonl"
    manifest.write_bytes(codecs.BOM_UTF8 + b"\r\n".join([*good[:-1], b" \t", *bad, good[-1]]))
    report = check([manifest], output=tmp_path / "out")
    assert report.rows == {str(manifest): 12}
    assert report.reasons == {"malformed": 8}
    assert report.to_mend == {str(manifest): list(range(5, 13))}
    assert {f.id for f in report.examples["malformed"]} == {"", "long"}


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(codecs.BOM_UTF8 + json.dumps(words("a")).encode())
    assert [sample.id for sample in read_manifest(tmp_path / "m.jsonl")] == ["a"]


def test_a_manifest_given_twice_is_read_once(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "m.jsonl", [words("a")])
    assert check([manifest, manifest]).rows == {str(manifest): 1}


def test_a_manifest_that_changes_meanwhile_is_an_error(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_rows(tmp_path / "m.jsonl", [about(clip, "a")])
    really = check_module.same_bytes

    def meanwhile(*given: Any) -> dict[str, str]:
        write_rows(manifest, [about(clip, "a"), about(tmp_path / "new.mp4", "b")])
        return really(*given)

    monkeypatch.setattr(check_module, "same_bytes", meanwhile)
    with pytest.raises(ManifestError, match=r"m.jsonl line 2 is another row than when the check began"):
        check([manifest])


def test_ids_that_stand_once_are_not_kept(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "m.jsonl", [words(id) for id in ("a", "b", "a", "c", "a")])
    ids = Ids()
    rows = list(ids.counting(lines([manifest])))
    found = [[detail for _, detail in ids.problems(line)] for line in rows]
    told = f"id 'a' stands already in {manifest} line 1"
    assert found == [[], [], [told], [], [told]]
    assert list(ids._first) == ["a"]


def test_uses_of_files_are_gathered(clip: Path, tmp_path: Path) -> None:
    parts = [{"type": "video", "video": "a.mp4", "start": float(n % 3)} for n in range(6)]
    rows = [row("1", [*parts, text("?")], "x"), row("2", [{"type": "audio", "audio": "./a.mp4"}, text("?")], "x")]
    rows.append(row("3", [{"type": "audio", "audio": "b.mp4"}, text("?")], "x"))
    found = gather(lines([write_rows(tmp_path / "m.jsonl", rows)]))
    a, b = str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")
    assert found == {a: (*(Use("video", float(n)) for n in range(3)), Use("audio")), b: (Use("audio"),)}


# ---- places ---------------------------------------------------------------------------------------------------------


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


def test_what_is_no_file_is_missing(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "to nothing.mp4").symlink_to("nothing.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.mp4"))
    names = ["folder.mp4", "to nothing.mp4", "loop.mp4", "pipe.mp4", "socket.mp4", "/dev/zero", "n\0l.mp4", "x" * 5000]
    names += ["gone.tar#0+9/a.mp4", "~nobody/a.mp4"]
    rows = [*(about(Path(name), name) for name in names), shown("pipe.png")]
    report = check([write_rows(tmp_path / "m.jsonl", rows)], output=tmp_path / "out")
    assert reasons(report) == dict.fromkeys([*names, "pipe.png"], {"missing"})
    details = {f.id: f.detail for f in report.examples["missing"]}
    assert details["folder.mp4"].startswith("it is a folder, a pipe or a device")
    assert details["loop.mp4"].startswith("no such file")
    assert len(read_quarantine([tmp_path / "out/quarantine.txt"])) == len(rows)


def test_a_store_that_cannot_be_reached_is_asked_again_the_next_time(clip: Path, tmp_path: Path) -> None:
    rows = [about(clip, "here"), {**about(clip, "there"), "messages": about(Path("x"), "x")["messages"]}]
    rows[1]["messages"][0]["content"][0]["video"] = "nosuch://bucket/a.mp4"
    manifest = write_rows(tmp_path / "m.jsonl", rows)
    for reused in (0, 1):
        report = check([manifest], output=tmp_path / "out")
        assert reasons(report) == {"there": {"unreachable"}}
        assert "Protocol not known" in report.examples["unreachable"][0].detail
        assert report.reused == reused


def test_a_link_is_no_other_file(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "link.mp4").symlink_to(clip)
    (tmp_path / "copy.mp4").write_bytes(clip.read_bytes())
    rows = [about(clip, "file"), about(Path("link.mp4"), "link"), about(Path("copy.mp4"), "copy")]
    assert reasons(check([write_rows(tmp_path / "m.jsonl", rows)])) == {"copy": {"duplicate_media"}}


# ---- files ----------------------------------------------------------------------------------------------------------


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
    report = check([write_rows(tmp_path / "m.jsonl", [shown(name) for name in names])])
    assert reasons(report) == {}
    assert (list(report.values["frames"]), "seconds" in report.values) == ([1.0] * len(names), False)


def test_a_picture_that_is_also_asked_for_as_a_film(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    found = examine(PlainReader(), "sample", Job(str(tmp_path / "a.png"), (Use("image"), Use("video"))))
    assert [[reason for reason, _ in use["problems"]] for use in found["uses"]] == [[], ["undecodable"]]
    assert found["problems"] == []


def test_headers_tell_rates_that_nothing_has(clip: Path, tmp_path: Path) -> None:
    data = bytearray(b"RIFF" + bytes(4) + b"WAVEfmt " + bytes([16, 0, 0, 0, 1, 0, 1, 0]))
    data += (1).to_bytes(4, "little") + (2).to_bytes(4, "little") + bytes([2, 0, 16, 0]) + b"data"
    data += (20_000).to_bytes(4, "little") + bytes(20_000)
    data[4:8] = (len(data) - 8).to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(data)
    for decode in ("headers", "sample"):
        found = examine(PlainReader(), decode, Job(str(tmp_path / "a.wav"), (Use("audio"),)))
        ((reason, detail),) = found["uses"][0]["problems"]
        assert (reason, detail) == ("absurd_header", "the header declares 1 samples a second; expected 1000 to 1000000")
        assert "seconds" not in found["uses"][0]


def test_details_are_words(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("this is no film\n" * 200)
    found = examine(PlainReader(), "sample", Job(str(tmp_path / "a.mp4"), (Use("video"), Use("image"))))
    assert [detail for use in found["uses"] for _, detail in use["problems"]] == [
        "libav: Invalid data found when processing input",
        "it is no picture of a form that Pillow knows",
    ]


# ---- what is said ---------------------------------------------------------------------------------------------------


def test_examples_are_of_many_files_and_have_thumbnails(clip: Path, tmp_path: Path) -> None:
    rows = []
    for number in range(3):
        (tmp_path / f"{number}.avi").write_bytes(clip.read_bytes() + bytes(number))
        rows += [about(Path(f"{number}.avi"), f"{number}-{n}") for n in range(30)]
    report = check([write_rows(tmp_path / "m.jsonl", rows)], output=tmp_path / "out")
    found = [f.path for f in report.examples["wrong_extension"]]
    assert report.reasons["wrong_extension"] == 90
    assert [found.count(str(tmp_path / f"{n}.avi")) for n in range(3)] == [5, 1, 1]
    assert report.thumbnails == {path: thumbnail(path) for path in found}
    page = (tmp_path / "out/check.html").read_text()
    assert page.count("<img") == len(found)
    assert f'<td class=file title="{tmp_path}/0.avi">0.avi</td>' in page
    assert "Some of them, findings.jsonl has all" in page


def test_thumbnails_are_kept_in_the_journal(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.avi").write_bytes(clip.read_bytes())
    manifest = write_rows(tmp_path / "m.jsonl", [about(Path("a.avi"), "a")])
    first = check([manifest], output=tmp_path / "out").thumbnails
    monkeypatch.setattr(check_module, "thumbnail", None)  # what would make them
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
    with pytest.raises(ValueError, match="--max-length 9 is given, and nothing that counts tokens"):
        INVOKE(app, ["data", "check", str(manifest), "--max-length", "9"], catch_exceptions=False)
    told = INVOKE(app, ["data", "check", str(manifest)])
    assert "tokens were not counted: give --preset" in " ".join(told.stderr.split())


def test_what_a_terminal_shows_is_not_cut_where_it_matters(clip: Path, tmp_path: Path) -> None:
    rows = [about(clip, "a", kind="a.kind.with.a.long.name"), about(tmp_path / "[red]gone.mp4", "[/]odd", source="b")]
    manifest = write_rows(tmp_path / "m.jsonl", rows)
    told = INVOKE(app, ["data", "stats", str(manifest)], env={"COLUMNS": "80"}).stderr
    assert "a.kind.with.a.long.name" in told
    assert "tokens" not in told
    told = INVOKE(app, ["data", "check", str(manifest), "--workers", "1"], env={"COLUMNS": "80"}).stderr
    assert [line.split()[:3] for line in told.splitlines() if line.startswith("error")] == [["error", "missing", "1"]]
    assert "[/]odd: no such file" in told


def test_headers_need_no_decoding(clip: Path, tmp_path: Path) -> None:
    found = check([write_rows(tmp_path / "m.jsonl", [about(clip, "a")])], looking=Looking("headers"))
    assert (len(found.values["seconds"]), len(found.values["frames"])) == (1, 1)
