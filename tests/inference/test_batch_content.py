"""Answers belong to the requests that they answer, by id and content; a refusal writes nothing."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import row, text, write_rows

from avllm.data.manifest import ManifestError
from avllm.data.store.output_path import OutputPathError
from avllm.errors import WriteError
from avllm.inference.batch import Summary, answer_file
from avllm.inference.chat import Chat
from avllm.inference.generation import Generation
from avllm.inference.journal import JournalError
from avllm.inference.request_file import read_requests

SHORT = Generation(max_new_tokens=2)
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def chat(checkpoint: Path) -> Chat:
    return Chat.load(checkpoint)


def rows_of(*names: str) -> Rows:
    return [row(name, [text(f"what {name} ?")], "x") for name in names]


def changed(rows: Rows) -> Rows:
    return [*rows[:1], row("b", [text("what colour ?")], "x"), *rows[2:]]


@pytest.fixture
def folder(chat: Chat, checkpoint: Path, tmp_path: Path) -> Path:
    """Requests a to d, and their answers."""
    write_rows(tmp_path / "requests.jsonl", rows_of("a", "b", "c", "d"))
    assert answer(chat, checkpoint, tmp_path) == Summary(0, 4, 0)
    return tmp_path


def answer(chat: Chat, checkpoint: Path, folder: Path) -> Summary:
    return answer_file(
        lambda: (chat.model, chat.processor),
        checkpoint,
        folder / "requests.jsonl",
        folder / "answers.jsonl",
        SHORT,
        batch_size=2,
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (changed, "row 'b'"),
        (lambda rows: [rows[0], *rows[2:]], "row 'b'"),
        (lambda rows: [rows[1], rows[0], *rows[2:]], "row 'a'"),
        (lambda rows: rows[:3], "row 'd'"),
    ],
    ids=["changed", "removed", "moved", "fewer"],
)
def test_requests_that_changed_since_are_named(
    change: Callable[[Rows], Rows], named: str, chat: Chat, checkpoint: Path, folder: Path
) -> None:
    before = (folder / "answers.jsonl").read_bytes()
    more = rows_of("e") if named != "row 'd'" else []
    write_rows(folder / "requests.jsonl", [*change(rows_of("a", "b", "c", "d")), *more])
    with pytest.raises(JournalError, match=named) as refused:
        answer(chat, checkpoint, folder)
    assert refused.value.reason == "other_requests"
    assert "\n" not in str(refused.value)
    assert (folder / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_a_line_that_was_deleted_from_the_answers_is_found(
    lost: int, chat: Chat, checkpoint: Path, folder: Path
) -> None:
    output = folder / "answers.jsonl"
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:lost] + lines[lost + 1 :]))
    if lost == 3:  # the last one: as after a kill
        assert answer(chat, checkpoint, folder) == Summary(3, 1, 0)
        assert output.read_bytes() == b"".join(lines)
        return
    kept = output.read_bytes()
    with pytest.raises(JournalError, match=f"row '{'abcd'[lost + 1]}'") as refused:
        answer(chat, checkpoint, folder)
    assert refused.value.reason == "other_requests"
    assert output.read_bytes() == kept


def test_an_answer_whose_id_was_edited_is_found(chat: Chat, checkpoint: Path, folder: Path) -> None:
    output = folder / "answers.jsonl"
    output.write_text(output.read_text().replace('"id": "c"', '"id": "z"'))
    with pytest.raises(JournalError, match="row 'z'"):
        answer(chat, checkpoint, folder)


def test_requests_that_were_added_are_answered(chat: Chat, checkpoint: Path, folder: Path) -> None:
    before = (folder / "answers.jsonl").read_bytes()
    write_rows(folder / "requests.jsonl", rows_of("a", "b", "c", "d", "e", "f"))
    assert answer(chat, checkpoint, folder) == Summary(4, 2, 0)
    after = (folder / "answers.jsonl").read_bytes()
    assert after.startswith(before)
    assert [json.loads(line)["id"] for line in after.splitlines()] == list("abcdef")


def test_requests_are_those_of_the_beginning(chat: Chat, checkpoint: Path, tmp_path: Path) -> None:
    requests = write_rows(tmp_path / "requests.jsonl", rows_of("a", "b"))

    def load() -> Any:
        write_rows(requests, rows_of("x", "y", "z"))
        return chat.model, chat.processor

    output = tmp_path / "answers.jsonl"
    assert answer_file(load, checkpoint, requests, output, SHORT).added == 2
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == ["a", "b"]


def test_ids_that_occur_twice_are_refused(chat: Chat, checkpoint: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "requests.jsonl", rows_of("a", "b", "a"))
    with pytest.raises(ManifestError, match=r"line 3: id 'a' .* line 1") as refused:
        answer(chat, checkpoint, tmp_path)
    assert refused.value.reason == "duplicate_id"
    assert [path.name for path in tmp_path.iterdir()] == ["requests.jsonl"]


def test_a_model_that_does_not_load_leaves_no_file(checkpoint: Path, tmp_path: Path) -> None:
    requests = write_rows(tmp_path / "requests.jsonl", rows_of("a"))

    def load() -> Any:
        raise ValueError("no weights")

    with pytest.raises(ValueError, match="no weights"):
        answer_file(load, checkpoint, requests, tmp_path / "answers.jsonl", SHORT)
    assert [path.name for path in tmp_path.iterdir()] == ["requests.jsonl"]


def test_the_output_is_not_the_input(checkpoint: Path, tmp_path: Path) -> None:
    requests = write_rows(tmp_path / "requests.jsonl", rows_of("a"))
    before = requests.read_bytes()
    with pytest.raises(OutputPathError) as refused:
        answer_file(pytest.fail, checkpoint, requests, tmp_path / "x" / ".." / requests.name)
    assert refused.value.reason == "is_input"
    assert requests.read_bytes() == before


@pytest.mark.parametrize("depth", [50, 150, 1000, 100_000])
def test_json_of_any_depth_is_a_row(depth: int, tmp_path: Path) -> None:
    turn = '[{"role": "user", "content": "hi"}]'
    deep = "[" * depth + "]" * depth
    requests = tmp_path / "requests.jsonl"
    requests.write_text(f'{{"id": "a", "messages": {turn}, "meta": {{"x": {deep}}}}}\n')
    (line,) = read_requests(requests)
    request = line.request()
    assert (request.sample is None) == (request.error is not None)
    assert depth < 1000 or request.error is not None


def test_the_place_of_a_mistake_is_that_in_the_file(tmp_path: Path) -> None:
    requests = tmp_path / "requests.jsonl"
    requests.write_text('\n\n{"id": nothing}\n')
    (line,) = read_requests(requests)
    error = line.request().error or ""
    assert "requests.jsonl line 3" in error
    assert "column 9" in error
    assert "line 1" not in error


def test_a_torn_line_after_the_last_answer_is_passed_over(
    chat: Chat, checkpoint: Path, folder: Path
) -> None:
    with (folder / "answers.jsonl").open("a") as file:
        file.write('{"id": "e", "ans')
    assert answer(chat, checkpoint, folder) == Summary(4, 0, 0)


def test_a_full_disk_is_named_with_the_file(chat: Chat, checkpoint: Path, folder: Path) -> None:
    write_rows(folder / "requests.jsonl", rows_of("a", "b", "c", "d", "e", "f"))
    before = (folder / "answers.jsonl").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
    try:
        with pytest.raises(WriteError, match="answers.jsonl"):
            answer(chat, checkpoint, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (folder / "answers.jsonl").read_bytes().startswith(before)
    assert answer(chat, checkpoint, folder) == Summary(4, 2, 0)
