"""Messages as token ids and labels: the tokenizer's chat template, with media runs in place."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from avllm.data.collate import IGNORE
from avllm.data.schema import Message, RowError, TextPart
from avllm.models.configuration_avllm import AVConfig

MARK = "\u0001"  # stands for a media part while the chat template is rendered; no text holds this control character
MOST_PIECES = 4096  # texts and chats whose form is remembered
DEFAULT_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n' }}"
    "{% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] + '\n' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


class ChatText:
    """The one place where a chat becomes text and text becomes token ids.

    Args:
        tokenizer: the LLM's; it gets a plain chat template where it brings none.
        config: system prompt, text around media, placeholders.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: AVConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self._encoded: dict[str, list[int]] = {}
        self._chats: dict[tuple[Any, ...], tuple[str, list[tuple[int, int]]]] = {}
        if tokenizer.chat_template is None:
            tokenizer.chat_template = DEFAULT_TEMPLATE

    def check(self, message: Message) -> None:
        """Refuse text that stands for media tokens.

        Raises:
            RowError: it does.
        """
        for token in [MARK, *(f"<|{s}|>" for s in self.config.media_token_ids)]:
            if token in message.text:
                raise RowError("reserved_text", f"the text holds {token!r}, which stands for media tokens")

    def render(self, messages: Sequence[Message], answer: bool) -> tuple[str, list[tuple[int, int]]]:
        """The chat as text, with a mark for each media part, and the character ranges of the assistant's turns.

        Args:
            messages: the turns. answer: False ends the text where the next answer begins.

        Raises:
            RowError: the template refuses the roles, or rewrites earlier turns when more follow.
        """
        plain = [(m.role, self._flatten(m)) for m in messages]
        if self.config.system and plain[0][0] != "system":
            plain.insert(0, ("system", self.config.system))
        key = (answer, *plain)
        if key not in self._chats:  # the same few chats come back row after row
            if len(self._chats) >= MOST_PIECES:
                self._chats.clear()
            self._chats[key] = self._render([{"role": r, "content": c} for r, c in plain], answer)
        return self._chats[key]

    def _render(self, plain: list[dict[str, str]], answer: bool) -> tuple[str, list[tuple[int, int]]]:
        whole = self._template(plain, generation=not answer)
        ranges = []
        for place, message in enumerate(plain):
            if message["role"] != "assistant":
                continue
            before, after = self._template(plain[:place], True), self._template(plain[: place + 1], False)
            end = min(len(after), len(whole))
            if not whole.startswith(after.rstrip()):  # Qwen3 drops the empty thoughts of earlier turns
                turn = message["content"] + after.rpartition(message["content"])[2]
                end = len(before) + len(turn) if whole.startswith(turn, len(before)) else -1
            if end < 0 or not whole.startswith(before):
                raise RowError(
                    "chat_template",
                    f"the chat template rewrites turn {place} when more turns follow; use one that only appends",
                )
            ranges.append((len(before), end))
        return whole, ranges

    def _template(self, messages: list[dict[str, str]], generation: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        except TemplateError as error:
            raise RowError(
                "chat_template", f"the LLM's chat template refuses roles {[m['role'] for m in messages]}: {error}"
            ) from error
        return str(text)

    def _flatten(self, message: Message) -> str:
        pieces = []
        for part in message.content:
            around = "{media}" if isinstance(part, TextPart) else self.config.media_text.get(part.type, "{media}")
            pieces.append(part.text if isinstance(part, TextPart) else around.replace("{media}", MARK))
        return "".join(pieces)

    def tokenise(
        self, text: str, trained: list[tuple[int, int]], runs: Sequence[list[str]]
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Token ids ``(L,)`` of a rendered chat, labels ``(L,)`` on the assistant's turns, and where each run begins.

        Text is cut at the borders of media and answers, so that a prompt is exactly the beginning of its row.

        Args:
            text, trained: of :meth:`render`. runs: the streams' names of each media part's tokens, in order.

        Raises:
            RowError: the template wrote a media part never, or twice.
        """
        marks = [i for i, c in enumerate(text) if c == MARK]
        if len(marks) != len(runs):
            raise RowError(
                "chat_template",
                f"the chat template writes {len(marks)} media parts, the chat has {len(runs)}; use one that writes "
                "each turn once, as it is",
            )
        cuts = sorted({0, len(text), *marks, *(m + 1 for m in marks), *(c for r in trained for c in r)})
        spans = [(a, b) for a, b in pairwise(cuts) if b > a]
        plain = [text[a:b] for a, b in spans if text[a] != MARK]
        encoded = iter(self._encode(plain))
        pending, media = iter(runs), self.config.media_token_ids  # looked up once: a config's attributes are slow
        ids: list[int] = []
        labels: list[int] = []
        places: list[int] = []
        for a, _ in spans:
            is_run = text[a] == MARK
            if is_run:
                places.append(len(ids))
            piece = [media[name] for name in next(pending)] if is_run else next(encoded)
            on = not is_run and any(low <= a < high for low, high in trained)
            ids += piece
            labels += piece if on else [IGNORE] * len(piece)
        return torch.tensor(ids, dtype=torch.long), torch.tensor(labels, dtype=torch.long), places

    def _encode(self, pieces: list[str]) -> list[list[int]]:
        """Token ids of pieces of text; the same few (turn markers, questions) come back row after row."""
        new = [p for p in dict.fromkeys(pieces) if p not in self._encoded]
        if len(self._encoded) + len(new) > MOST_PIECES:
            self._encoded, new = {}, list(dict.fromkeys(pieces))
        if new:
            self._encoded |= zip(new, self.tokenizer(new, add_special_tokens=False)["input_ids"], strict=True)
        return [self._encoded[p] for p in pieces]
