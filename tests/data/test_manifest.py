"""Rows that are refused name file, line and field; what is written is what is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from avllm.data.manifest import ManifestError, parse_row, read_manifest, write_manifest
from avllm.data.schema import Sample

VIDEO = {"type": "video", "video": "a.mp4"}


def row(*parts: dict[str, Any], id: str = "a", **fields: Any) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": "what is seen?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a cat"}]
    return {"id": id, "messages": messages, **fields}


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({**VIDEO, "start": -1}, "messages.0.content.0.video.start"),
        ({**VIDEO, "start": 3, "end": 2}, "messages.0.content.0.video: "),
        ({**VIDEO, "start": float("inf")}, "messages.0.content.0.video.start"),
        ({**VIDEO, "end": float("nan")}, "messages.0.content.0.video.end"),
        ({**VIDEO, "video": ""}, "messages.0.content.0.video.video"),
        ({**VIDEO, "sound": "of"}, "messages.0.content.0.video.sound"),
        ({**VIDEO, "begin": 1}, "messages.0.content.0.video.begin"),
        ({"type": "image", "image": "a.jpg", "start": 1}, "messages.0.content.0.image.start"),
        ({"type": "vidio", "video": "a.mp4"}, "messages.0.content.0: "),
        ({"type": "audio"}, "messages.0.content.0.audio.audio"),
    ],
)
def test_a_wrong_part_is_named(tmp_path: Path, wrong: dict[str, Any], field: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(
        f"{json.dumps(row(VIDEO))}\n\n{json.dumps(row(wrong, id='b'))}\n", encoding="utf-8"
    )
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    assert str(caught.value).startswith(f"{path} line 3: field {field}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "Invalid JSON"),
        (b"\xff", "Invalid JSON"),
        ("[1]", "object"),
        (json.dumps({"id": "a"}), "field messages"),
        (json.dumps(row(idd="b")), "field idd"),
        (json.dumps(row(seconds=float("nan"))), "field seconds"),
        (
            json.dumps({"id": "a", "messages": [{"role": "assistant", "content": "x"}]}),
            "beginning with user",
        ),
        (json.dumps({"id": "a", "messages": [{"role": "user", "content": "x"}] * 2}), "in turn"),
    ],
)
def test_a_wrong_row_is_named(text: str | bytes, expected: str) -> None:
    with pytest.raises(ManifestError, match=r"^m line 1: ") as caught:
        parse_row(text, "m line 1")
    assert expected in str(caught.value)


def test_missing_empty_and_doubled(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with pytest.raises(ManifestError) as raised:
        read_manifest(path)
    assert raised.value.reason == "missing"
    path.write_text("\n")
    with pytest.raises(ManifestError) as raised:
        read_manifest(path)
    assert raised.value.reason == "empty"
    write_manifest(path, [row(VIDEO), row(VIDEO, id="b"), row(VIDEO)])
    with pytest.raises(ManifestError, match="line 3: id 'a' .* line 1") as raised:
        read_manifest(path)
    assert raised.value.reason == "duplicate_id"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    audio = {"type": "audio", "audio": "b.wav", "start": 1.5, "end": 2.0}
    samples = [
        Sample.model_validate(row({**VIDEO, "sound": "off"}, audio, source="s", choices=["a", "b"]))
    ]
    assert write_manifest(tmp_path / "m.jsonl", samples) == 1
    assert read_manifest(tmp_path / "m.jsonl") == samples


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([{"type": "time"}], "messages.0.content.0"),
        ([VIDEO, {"type": "time", "seconds": 1, "end": 2}], "messages.0.content.1"),
        ([VIDEO, {"type": "time", "start": 2}], "messages.0.content.1"),
        ([VIDEO, {"type": "time", "start": 2, "end": 1}], "messages.0.content.1"),
        ([VIDEO, {"type": "time", "seconds": -1}], "messages.0.content.1"),
        ([{"type": "time", "seconds": 1}, VIDEO], "messages.0.content.0"),
        ([VIDEO, {"type": "time", "seconds": 1, "clip": 1}], "messages.0.content.1.clip"),
    ],
)
def test_a_time_that_means_nothing_is_named(
    tmp_path: Path, content: list[dict[str, object]], expected: str
) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(
        json.dumps({"id": "r", "messages": [{"role": "user", "content": content}]}) + "\n"
    )
    with pytest.raises(ManifestError) as error:
        read_manifest(path)
    assert "line 1" in str(error.value)
    assert expected in str(error.value)


def test_times_survive_a_manifest(tmp_path: Path) -> None:
    content = [
        VIDEO,
        {"type": "time", "start": 1.5, "end": 3.0},
        {"type": "time", "seconds": 2.0, "clip": 0},
    ]
    answer = {"role": "assistant", "content": [{"type": "time", "seconds": 2.5}]}
    row = Sample.model_validate(
        {"id": "r", "messages": [{"role": "user", "content": content}, answer]}
    )
    write_manifest(tmp_path / "m.jsonl", [row])
    assert read_manifest(tmp_path / "m.jsonl") == [row]
    assert (
        json.loads((tmp_path / "m.jsonl").read_text())["messages"][1]["content"]
        == answer["content"]
    )
    assert len(row.media) == 1
