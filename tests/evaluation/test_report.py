"""The page of an evaluation: whole, bounded, with nothing from outside, whatever the texts."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from avllm.cli.main import app
from avllm.data.manifest import write_manifest
from avllm.data.schema import Sample
from avllm.evaluation.benchmarks.base import Prediction, failed_score, score_by_form
from avllm.evaluation.conditions import AS_IS, Condition
from avllm.evaluation.report import page as report
from avllm.evaluation.report.confusion import NOT_ASKED, OTHER, confusion
from avllm.evaluation.report.page import About, write_report
from avllm.evaluation.report.pictures import spectrogram, strip
from avllm.evaluation.results import Result

HOSTILE = '"><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>'


class Page(HTMLParser):
    """Collect the tags, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def attributes(self, name: str) -> list[str]:
        return [str(attributes[name]) for _, attributes in self.tags if name in attributes]


def prediction(
    identity: str, truth: str, answer: str, failed: bool = False, kind: str = "colour", **more: Any
) -> Prediction:
    messages = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": truth}]
    row = {
        "id": identity,
        "kind": kind,
        "messages": messages,
        "choices": ["red", "blue", "white"],
        **more,
    }
    sample = Sample.model_validate(row)
    score = score_by_form(sample, answer, 3.0, "unanswerable")
    return Prediction(sample, answer, failed_score(score) if failed else score, failed=failed)


def test_confusions_by_hand() -> None:
    given = [
        ("red", "red"),
        ("red", "It is blue."),
        ("red", "B"),
        ("blue", "(b)"),
        ("blue", "no idea"),
        ("red", "A"),
    ]
    rows = [prediction(str(number), *pair) for number, pair in enumerate(given)]
    matrix = confusion([*rows, prediction("lost", "blue", "", failed=True)])
    assert matrix is not None
    assert matrix.truths == ["red", "blue"]
    assert matrix.answers == ["red", "blue", OTHER, NOT_ASKED]
    assert matrix.counts == {
        ("red", "red"): 2,
        ("red", "blue"): 2,
        ("blue", "blue"): 1,
        ("blue", OTHER): 1,
        ("blue", NOT_ASKED): 1,
    }
    assert matrix.of_truth("blue") == 3


def test_many_truths_are_counted_by_their_letters() -> None:
    rows = []
    for number in range(40):
        choices = [f"thing {number}", f"other {number}"]
        rows.append(prediction(str(number), choices[number % 2], "A", choices=choices))
    matrix = confusion(rows)
    assert matrix is not None
    assert matrix.counts == {("A", "A"): 20, ("B", "A"): 20}
    free = [prediction(str(number), f"thing {number}", "A", choices=None) for number in range(40)]
    assert confusion(free) is None
    assert confusion([prediction("t", "1.5", "2", seconds=1.5)]) is None


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    truth = {"choices": [HOSTILE, "blue"]}
    rows = [
        prediction(HOSTILE, HOSTILE, "blue", kind=HOSTILE, **truth),
        prediction(
            "\u202eevil\x00", "blue", HOSTILE + "\ud800", kind=HOSTILE, source=HOSTILE, **truth
        ),
    ]
    failed = [{"id": HOSTILE, "reason": HOSTILE, "detail": HOSTILE}]
    results = {c.name: Result(c, rows, failed=failed) for c in (AS_IS, Condition(swap="video"))}
    path = tmp_path / "report.html"
    write_report(path, results, About(HOSTILE, HOSTILE, {HOSTILE: HOSTILE}), lambda sample: [])
    html = path.read_text()
    page = Page(html)
    assert {tag for tag, _ in page.tags}.isdisjoint(
        {"script", "iframe", "object", "link", "base", "form", "a"}
    )
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.attributes("src") == []
    assert page.text.count("<script>alert(1)</script>") >= 10
    assert "\x00" not in html
    assert "default-src 'none'" in html


def test_the_number_of_rows_and_pictures_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "ROWS", 50)
    rows = [prediction(f"row {number}", "red", "blue") for number in range(200)]
    drawn: list[str] = []

    def draw(sample: Sample) -> list[str]:
        drawn.append(sample.id)
        return []

    write_report(tmp_path / "r.html", {"as_is": Result(AS_IS, rows)}, About("c", "m", {}), draw)
    assert len(set(drawn)) == len(drawn) == report.WRONG
    page = Page((tmp_path / "r.html").read_text())
    assert sum(1 for tag, _ in page.tags if tag == "tr") < 50 + 4 * report.WRONG + 20


def test_pictures_are_small() -> None:
    frames = torch.randint(0, 255, (30, 400, 600, 3), dtype=torch.uint8)
    assert strip(frames).size == (6 * 108 + 5 * 3, 72)
    bands = torch.zeros(80, 3000)
    bands[0] = 1.0
    drawn = spectrogram(bands)
    assert drawn.size == (320, 64)
    assert drawn.getpixel((0, 63)) > 100 > drawn.getpixel((0, 0))  # low bands are below


def test_a_report_of_a_model_holds_its_figures_and_media(
    checkpoint: Path, questions: Path, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "report.html"
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    rows[0]["id"] = HOSTILE
    manifest = questions.parent / "hostile.jsonl"
    write_manifest(manifest, rows)
    more = [
        "--without",
        "audio",
        "--swap",
        "video",
        "--max-new-tokens",
        "3",
        "--report",
        str(path),
        "--json",
    ]
    done = CliRunner().invoke(
        app, ["eval", str(checkpoint), str(manifest), *more], catch_exceptions=False
    )
    figures = json.loads(done.stdout)["conditions"]
    page = Page(path.read_text())
    for name in ("unchanged", "without audio", "swapped video"):
        assert name in page.text
    assert f"{100 * figures['swapped_video']['kinds']['seen.colour']['accuracy']:.1f}%" in page.text
    sources = page.attributes("src")
    assert 2 <= len(sources) <= 2 * report.WRONG
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for source in sources:
        Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).verify()
    assert "script" not in {tag for tag, _ in page.tags}
    assert path.stat().st_size < 2_000_000
