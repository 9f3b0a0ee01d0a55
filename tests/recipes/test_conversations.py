"""Test conversations: placeholders, order of turns, and the reasons of drops."""

from __future__ import annotations

from typing import Any

import pytest

from avllm.data.schema import Message, RowError
from avllm.recipes.conversations import (
    Utterance,
    chat_messages,
    question_messages,
    read_turns,
    without_leading_answers,
)

IMAGE = {"type": "image", "image": "a.jpg"}
OTHER = {"type": "image", "image": "b.jpg"}
VIDEO = {"type": "video", "video": "a.mp4"}


def human(text: Any) -> dict[str, Any]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, Any]:
    return {"from": "gpt", "value": text}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("<image>\nWhat is it?", [IMAGE, text("What is it?")]),
        ("What is it?\n<image>", [text("What is it?"), IMAGE]),
        (" <image> \n", [IMAGE]),
        ("Look: <image> and now?", [text("Look: "), IMAGE, text(" and now?")]),
    ],
)
def test_a_placeholder_takes_one_line_break_on_each_side(
    value: str, content: list[dict[str, Any]]
) -> None:
    messages = chat_messages([human(value), gpt(" A cat. ")], {"image": [IMAGE]})
    assert messages == [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [text("A cat.")]},
    ]
    assert [Message.model_validate(m).role for m in messages] == ["user", "assistant"]


def test_the_k_th_placeholder_of_a_kind_is_its_k_th_file() -> None:
    turns = [human("<image><video>One?"), gpt("1"), human("Two? <image>"), gpt("2")]
    messages = chat_messages(turns, {"image": [IMAGE, OTHER], "video": [VIDEO], "audio": []})
    media = [part for m in messages for part in m["content"] if part["type"] != "text"]
    assert media == [IMAGE, VIDEO, OTHER]


@pytest.mark.parametrize(
    ("reason", "turns"),
    [
        ("no_turns", []),
        ("no_turns", "Hello."),
        ("malformed_turn", ["Hello."]),
        ("malformed_turn", [human(None)]),
        ("unknown_role", [{"from": "narrator", "value": "Once."}]),
        ("empty_turn", [human(" \n"), gpt("Hello.")]),
        ("starts_without_question", [gpt("Hello."), human("Why?"), gpt("So.")]),
        ("starts_without_question", [{"from": "system", "value": "Be brief."}]),
        ("turns_do_not_alternate", [human("One?"), human("Two?"), gpt("2")]),
        ("turns_do_not_alternate", [human("One?"), gpt("1"), gpt("2")]),
        (
            "turns_do_not_alternate",
            [human("One?"), {"from": "system", "value": "Be brief."}, gpt("1")],
        ),
        ("ends_without_answer", [human("One?"), gpt("1"), human("Two?")]),
        ("placeholder_in_answer", [human("Draw."), gpt("<image>")]),
        ("placeholder_mismatch", [human("What is it?"), gpt("A cat.")]),
        ("placeholder_mismatch", [human("<image><image>"), gpt("Cats.")]),
        ("placeholder_mismatch", [human("<image><video>"), gpt("Cats.")]),
    ],
)
def test_each_defect_has_its_reason(reason: str, turns: Any) -> None:
    with pytest.raises(RowError) as caught:
        chat_messages(turns, {"image": [IMAGE]})
    assert caught.value.reason == reason


def test_both_names_of_the_fields_are_read_and_the_system_may_begin() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        gpt("1"),
    ]
    assert read_turns(turns) == [
        Utterance("system", "Be brief."),
        Utterance("user", "One?"),
        Utterance("assistant", "1"),
    ]
    assert [m["role"] for m in chat_messages(turns, {})] == ["system", "user", "assistant"]


def test_answers_before_the_first_question_are_left_out() -> None:
    rest = [human("Why?"), gpt("So.")]
    assert without_leading_answers([gpt("a"), gpt("b"), *rest]) == rest
    assert without_leading_answers(rest) is rest
    assert without_leading_answers("no turns") == "no turns"


def test_media_precede_the_first_question_alone() -> None:
    messages = question_messages([VIDEO], [("One? ", "1"), ("Two?", " 2")])
    assert [m["content"] for m in messages] == [
        [VIDEO, text("One?")],
        [text("1")],
        [text("Two?")],
        [text("2")],
    ]


@pytest.mark.parametrize(
    ("reason", "pairs"),
    [
        ("no_turns", []),
        ("empty_question", [("", "1")]),
        ("empty_answer", [("One?", "1"), ("Two?", " ")]),
        ("empty_answer", [("One?", "nan")]),
    ],
)
def test_an_empty_pair_has_its_reason(reason: str, pairs: list[tuple[str, str]]) -> None:
    with pytest.raises(RowError) as caught:
        question_messages([VIDEO], pairs)
    assert caught.value.reason == reason
