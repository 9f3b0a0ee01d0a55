"""A file of answers: batched = one by one, input order, bad rows, and going on after a kill."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import row, text, write_rows

from avllm.data.manifest import ManifestError
from avllm.data.schema import Sample
from avllm.inference.batch import Summary, answer_file, answer_samples
from avllm.inference.chat import Chat
from avllm.inference.generation import Generation
from avllm.inference.journal import Journal, JournalError
from avllm.inference.request_file import read_requests

SHORT = Generation(max_new_tokens=12)


@pytest.fixture(scope="module")
def chat(checkpoint: Path) -> Chat:
    return Chat.load(checkpoint)


@pytest.fixture
def requests(clips: list[Path], tmp_path: Path) -> Path:
    """Seventeen rows of every mixture of media, prompts of very different length."""
    red, blue, green = (str(c) for c in clips)
    media: list[list[dict[str, Any]]] = [
        [{"type": "video", "video": red}],
        [{"type": "video", "video": green}],
        [{"type": "video", "video": blue}],
        [],
        [{"type": "audio", "audio": green}],
        [{"type": "video", "video": green, "sound": "off"}, {"type": "audio", "audio": red}],
        [
            {"type": "video", "video": green, "start": 1.0, "end": 1.5},
            {"type": "video", "video": red},
        ],
        [{"type": "audio", "audio": red, "start": 0.25}],
    ]
    rows = [
        row(f"r{i}", [*media[i % 8], text("what colour is it ? " * (1 + i % 3))], "red")
        for i in range(17)
    ]
    for r in rows[::2]:
        r["messages"].pop()  # a request has no answer; where there is one, it must not be seen
    return write_rows(tmp_path / "requests.jsonl", rows)


def run(
    chat: Chat,
    checkpoint: Path,
    requests: Path,
    output: Path,
    generation: Generation = SHORT,
    **options: Any,
) -> Summary:
    return answer_file(
        lambda: (chat.model, chat.processor), checkpoint, requests, output, generation, **options
    )


def read(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for found in rows:
        found.pop("request", None)
    return rows


def test_batched_is_one_by_one_in_input_order(
    chat: Chat, checkpoint: Path, requests: Path, tmp_path: Path
) -> None:
    found = {}
    for size in (1, 3, 8):
        output = tmp_path / f"answers-{size}.jsonl"
        assert run(chat, checkpoint, requests, output, batch_size=size) == Summary(0, 17, 0)
        found[size] = read(output)
    assert found[1] == found[3] == found[8]
    assert [r["id"] for r in found[1]] == [f"r{i}" for i in range(17)]
    assert len({r["answer"] for r in found[1]}) > 8
    lengths = {len(r["answer"].split()) for r in found[1]}
    assert len(lengths) > 1  # some end of themselves before others


def test_batched_is_what_the_chat_says(chat: Chat, requests: Path) -> None:
    samples = [Sample.model_validate(r) for r in read(requests)]
    answers = list(
        answer_samples(chat.model, chat.processor, samples, generation=SHORT, batch_size=5)
    )
    for sample, found in zip(samples, answers, strict=True):
        alone = Chat(chat.model, chat.processor)
        assert found == {
            "id": sample.id,
            "answer": "".join(alone.ask(sample.messages, max_new_tokens=12)),
        }


def test_bad_rows_have_an_error_and_cost_no_other_row(
    chat: Chat, checkpoint: Path, clips: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "zero.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 64)
    good = row(
        "good", [{"type": "video", "video": str(clips[0])}, text("what colour is it ?")], "red"
    )
    lines = [
        json.dumps(good),
        "{not json",
        json.dumps({**good, "id": "field", "colour": 1}),
        json.dumps({**good, "id": 5}),
        json.dumps(row("missing", [{"type": "video", "video": "no.mp4"}], "x")),
        json.dumps(row("zero", [{"type": "audio", "audio": "zero.mp4"}], "x")),
        json.dumps(row("noise", [{"type": "image", "image": "noise.mp4"}], "x")),
        json.dumps(row("silent", [{"type": "video", "video": str(clips[1]), "sound": "on"}], "x")),
        json.dumps(row("behind", [{"type": "video", "video": str(clips[0]), "start": 9.0}], "x")),
        json.dumps(row("long", [text("red " * 3000)], "x")),
        json.dumps(row("reserved", [text("\x01")], "x")),
        "[]",
        json.dumps({**good, "id": "last"}),
    ]
    requests, output = tmp_path / "requests.jsonl", tmp_path / "out" / "answers.jsonl"
    requests.write_bytes("\n\n".join(lines).encode() + b"\n\xff\xfe\n")
    assert run(chat, checkpoint, requests, output) == Summary(0, 14, 12)
    assert run(chat, checkpoint, requests, output) == Summary(14, 0, 12), (
        "those of the run before count"
    )
    found = read(output)
    assert [r["id"] for r in found[:4]] == ["good", None, "field", None]
    assert found[12] == {"id": "last", "answer": found[0]["answer"]}
    expected = {
        1: "line 3: field row: Invalid JSON",
        2: "line 5: field colour: Extra inputs are not permitted",
        3: "line 7: field id",
        4: "no.mp4: missing",
        5: "zero.mp4: zero_byte",
        6: "noise.mp4: undecodable",
        7: "no_audio",
        8: "empty_interval",
        9: "too_long",
        10: "reserved_text",
        11: "line 23: field row",
        13: "line 26: field row: Invalid JSON",
    }
    assert dict.fromkeys(expected, True) == {
        i: e in found[i]["error"] for i, e in expected.items()
    }, found
    assert all(set(r) in ({"id", "answer"}, {"id", "error"}) for r in found)


@pytest.mark.parametrize("kept", [0, 1, 4, 9, 17])
def test_goes_on_where_it_was(
    chat: Chat, checkpoint: Path, requests: Path, tmp_path: Path, kept: int
) -> None:
    output = tmp_path / "answers.jsonl"
    run(chat, checkpoint, requests, output)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    half = lines[kept][:-1] if kept < 17 else b""  # a line without its end may be a half one
    output.write_bytes(b"".join(lines[:kept]) + half)
    assert run(chat, checkpoint, requests, output, batch_size=2) == Summary(kept, 17 - kept, 0)
    assert output.read_bytes() == whole


def test_a_finished_file_needs_no_model(
    chat: Chat, checkpoint: Path, requests: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    run(chat, checkpoint, requests, output)

    def load() -> Any:
        raise AssertionError("nothing is left to answer")

    assert answer_file(load, checkpoint, requests, output, SHORT) == Summary(17, 0, 0)


def test_refuses_what_belongs_to_another_run(
    chat: Chat, checkpoint: Path, requests: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    run(chat, checkpoint, requests, output)
    before = output.read_bytes()
    with pytest.raises(JournalError, match=r"generation\.max_new_tokens is 13, was 12") as error:
        run(chat, checkpoint, requests, output, Generation(max_new_tokens=13))
    assert error.value.reason == "other_run"
    other = tmp_path / "other"
    other.mkdir()
    for path in checkpoint.iterdir():
        (other / path.name).write_bytes(
            path.read_bytes() + (b" " if path.name == "config.json" else b"")
        )
    with pytest.raises(JournalError, match="checkpoint_sha256"):
        run(chat, other, requests, output)
    (tmp_path / "answers.jsonl.run.json").unlink()
    with pytest.raises(JournalError, match=r"answers\.jsonl\.run\.json") as error:
        run(chat, checkpoint, requests, output)
    assert error.value.reason == "no_run_file"
    assert output.read_bytes() == before


def test_refuses_a_file_that_is_being_written(tmp_path: Path) -> None:
    requests = read_requests(write_rows(tmp_path / "requests.jsonl", [{"id": "x"}]))
    with (
        Journal(tmp_path / "a.jsonl", {"a": 1}, requests),
        pytest.raises(JournalError) as error,
    ):
        Journal(tmp_path / "a.jsonl", {"a": 1}, requests)
    assert error.value.reason == "locked"
    assert list(tmp_path.glob("a.jsonl*")) == []  # nothing was answered
    Journal(tmp_path / "a.jsonl", {"a": 2}, requests).append([{"id": "x"}])


def test_no_requests(chat: Chat, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no\.jsonl") as error:
        run(chat, checkpoint, tmp_path / "no.jsonl", tmp_path / "answers.jsonl")
    assert error.value.reason == "missing"
    (tmp_path / "empty.jsonl").write_text("\n\n", encoding="utf-8")
    with pytest.raises(ManifestError, match=r"empty\.jsonl") as error:
        run(chat, checkpoint, tmp_path / "empty.jsonl", tmp_path / "answers.jsonl")
    assert error.value.reason == "empty"


def test_decodes_only_a_little_ahead(chat: Chat) -> None:
    taken = 0

    def samples() -> Iterator[Sample]:
        nonlocal taken
        for i in range(1000):
            taken += 1
            yield Sample.model_validate(row(f"r{i}", [text("what ?")], "x"))

    answers = answer_samples(
        chat.model, chat.processor, samples(), generation=Generation(max_new_tokens=1), batch_size=2
    )
    next(answers)
    assert taken <= 4 * 2 + 2 * 2 + 1
    answers.close()


def test_answers_of_a_model_loaded_otherwise_are_not_mixed(
    chat: Chat, checkpoint: Path, requests: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    run(chat, checkpoint, requests, output, SHORT, loaded={"quantize": None})
    with pytest.raises(JournalError, match="quantize"):
        run(chat, checkpoint, requests, output, SHORT, loaded={"quantize": "4bit"})
