"""A chat template is a stranger's program: it reaches nothing, and it ends."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import SecurityError, UndefinedError
from tiny import make_tokenizer

from avllm.models.configuration_avllm import AVConfig
from avllm.models.rows import template
from avllm.models.rows.chat_text import ChatText
from avllm.models.rows.template import ChatTemplateError, render_chat

LOOP = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
CHAT = [{"role": "user", "content": "what"}]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return make_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (LOOP, "time"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed"),
        ("{{ 9**9**9 }}", "power"),
        ("{{ 'a' * 100000000000 }}", "power"),
        ("{% for", "syntax"),
    ],
)
def test_a_template_that_does_not_end_is_refused_within_seconds(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, source: str, reason: str
) -> None:
    monkeypatch.setattr(template, "SECONDS", 0.3)
    tokenizer.chat_template = source
    began = time.monotonic()
    with pytest.raises(ChatTemplateError) as caught:
        ChatText(tokenizer, AVConfig())
    assert caught.value.reason == reason
    assert time.monotonic() - began < 5


def test_a_loop_that_only_some_texts_set_off_ends_too_in_any_thread(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "SECONDS", 0.3)
    tokenizer.chat_template = "{% if messages[0]['content'] == 'what' %}" + LOOP + "{% endif %}fine"
    ChatText(tokenizer, AVConfig())
    assert render_chat(tokenizer, [{"role": "user", "content": "red"}], generation=False) == "fine"
    reasons: list[str] = []

    def render() -> None:
        with pytest.raises(ChatTemplateError) as caught:
            render_chat(tokenizer, CHAT, generation=False)
        reasons.append(caught.value.reason)

    thread = threading.Thread(target=render)
    thread.start()
    render()
    thread.join()
    assert reasons == ["time", "time"]


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ range.__globals__ }}",
        "{% set x = messages.append(1) %}{{ x }}",
        "{% include '/etc/passwd' %}",
        "{{ self.__init__.__globals__ }}",
    ],
)
def test_a_template_reaches_nothing_outside_of_the_sandbox(tokenizer: Any, source: str) -> None:
    tokenizer.chat_template = source
    text = ""
    with suppress(
        SecurityError, UndefinedError, ChatTemplateError
    ):  # refused, or there is nothing to reach
        text = render_chat(tokenizer, CHAT, generation=False)
    assert text == ""


def test_rendering_is_the_tokenizers(tokenizer: Any) -> None:
    for generation in (False, True):
        expected = tokenizer.apply_chat_template(
            CHAT, tokenize=False, add_generation_prompt=generation
        )
        assert render_chat(tokenizer, CHAT, generation=generation) == expected
