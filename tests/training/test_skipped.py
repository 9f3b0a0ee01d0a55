"""The account of rows that are left out: nothing of it is lost in a kill, whatever ids hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import row, text, write_rows

from avllm.data.items import Bad, Items
from avllm.training.progress import keep_until
from avllm.training.skipped import Skipped, SkipRateError, in_quarantine


def bad(id: str) -> Bad:
    """A row that was left out."""
    return Bad(id, "tiny", "m.jsonl", "missing", "é" * 5)


def ids(run: Path) -> list[tuple[int, str]]:
    """Step and id of each line."""
    lines = (run / "skipped.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [(json.loads(line)["step"], json.loads(line)["id"]) for line in lines]


def items(folder: Path, name: str, count: int, quarantine: dict[str, str]) -> Items:
    """Rows NAME-0, NAME-1, ..."""
    rows = [row(f"{name}-{n}", [text("what ?")], "red") for n in range(count)]
    return Items([write_rows(folder / f"{name}.jsonl", rows)], quarantine=quarantine)


def test_a_kill_loses_the_torn_line_alone(tmp_path: Path) -> None:
    first = Skipped(tmp_path, 0.5, 100, {}, 0, 0)
    first.set_aside([bad("q\u2028uarantined")])
    first.add([bad("line\u2028break")], 10, 1)
    first.add([bad("next\u0085line")], 10, 2)
    whole = (tmp_path / "skipped.jsonl").read_bytes()
    torn = json.dumps({"step": 2, **bad("torn").to_dict()}, ensure_ascii=False).encode()
    (tmp_path / "skipped.jsonl").write_bytes(
        whole + torn[: torn.rindex(b"\xa9")]
    )  # within a character
    again = Skipped(tmp_path, 0.5, 100, first.counts, first.seen, 2)
    again.set_aside([bad("q\u2028uarantined")])
    assert (tmp_path / "skipped.jsonl").read_bytes() == whole
    assert ids(tmp_path) == [
        (0, "q\u2028uarantined"),
        (1, "line\u2028break"),
        (2, "next\u0085line"),
    ]
    keep_until(tmp_path / "skipped.jsonl", 1)
    assert ids(tmp_path) == [(0, "q\u2028uarantined"), (1, "line\u2028break")]


def test_a_start_with_another_quarantine_forgets_the_one_before(tmp_path: Path) -> None:
    Skipped(tmp_path, 0.5, 100, {}, 0, 0).set_aside([bad("a"), bad("b")])
    Skipped(tmp_path, 0.5, 100, {}, 0, 0).set_aside([])
    assert ids(tmp_path) == []


def test_validation_rows_in_quarantine_count_too(tmp_path: Path) -> None:
    quarantine = {"train-1": "silent", "test-0": "missing", "test-1": "missing"}
    train, test = items(tmp_path, "train", 10, quarantine), items(tmp_path, "test", 4, quarantine)
    assert [b.id for b in in_quarantine([train, test, train], 0.5)] == [
        "train-1",
        "test-0",
        "test-1",
    ]
    with pytest.raises(
        SkipRateError,
        match=r"2 of 4 rows are in quarantine \(50.0%\), more than max_skip_rate = 20.0%",
    ):
        in_quarantine([train, test], 0.2)


def test_a_few_rows_of_a_kind_get_a_line_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    skipped = Skipped(tmp_path, 1.0, 1000, {}, 0, 0)
    with caplog.at_level("WARNING"):
        for number in range(9):
            skipped.add([bad(f"row{number}")], 10, number)
        skipped.add([Bad("other", "tiny", "m.jsonl", "truncated", "half of it")], 10, 10)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 5
    assert "row2" in messages[2]
    assert "further" in messages[3]
    assert str(skipped.path) in messages[3]
    assert "truncated" in messages[4]
    assert len(skipped.path.read_text().splitlines()) == 10
