"""Times in an answer while it is generated: shown text never changes, whatever the codec."""

from __future__ import annotations

from threading import Event
from typing import Any

import pytest
import torch

from avllm.inference.stream import stream_text
from avllm.models.configuration_avllm import AVConfig
from avllm.models.rows.content import Content

WORDS = [
    "A",
    " bell",
    " from",
    " 2",
    "5",
    "%",
    " to",
    " 7",
    "5",
    "%",
    " and",
    " 9",
    "9",
    "%",
    ",",
    " then",
    " it",
]


@pytest.mark.parametrize("end", range(1, len(WORDS) + 1))
def test_pieces_join_to_the_whole_answer(end: int) -> None:
    content = Content(AVConfig(time_codec={"type": "percent"}))

    def decode(ids: list[int], whole: bool) -> str:
        return content.say_seconds("".join(WORDS[i] for i in ids).strip(), 8.0, whole)

    def generate(streamer: Any, **arguments: Any) -> None:
        for number in range(end):
            streamer.put(torch.tensor([number]))

    said = list(stream_text(generate, decode, Event()))
    assert "".join(said) == decode(list(range(end)), True)
    if end == len(WORDS):
        assert "".join(said) == "A bell from 2.0 s to 6.0 s and 7.9 s, then it"
        assert len(said) > 5


def test_other_codecs_show_every_word_at_once() -> None:
    content = Content(AVConfig())
    assert content.say_seconds("at 1.5", 8.0, whole=False) == "at 1.5"
