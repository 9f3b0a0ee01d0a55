"""Turn messages into token ids by the tokenizer's chat template, with media runs in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from avllm.data.schema import Message, RowError, TextPart
from avllm.errors import UserError
from avllm.models.configuration_avllm import AVConfig
from avllm.models.rows.template import check_template, render_chat

MARK = "\u0001"  # replaces a media part while the template is rendered; text must not contain it
PROBE = "\u0002"  # replaces a whole turn, to find where the template puts it
MOST_PIECES = 4096  # texts and chats that are remembered
DEFAULT_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] + '\n' }}"
    "{% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] + '\n' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)

Range = tuple[int, int]
"""Index of the first character and of the one after the last."""


@dataclass(frozen=True)
class Flat:
    """A message as one string, with a mark for each media part.

    Attributes:
        role: of the message.
        text: the string.
        ranges: of the text parts in ``text``, without the text around media.
        words: the text parts alone, joined.
    """

    role: str
    text: str
    ranges: tuple[Range, ...]
    words: str


@dataclass(frozen=True)
class Turn:
    """A user's message and the answer to it, in a rendered chat.

    Attributes:
        question: the text of the user's message.
        asked: its ranges in the chat; empty if the template changes it.
        target: the answer's text; empty in a prompt.
        trained: range of the answer in the chat, with its end marker; None in a prompt.
        media: the number of media parts in the chat up to this turn.
    """

    question: str
    asked: tuple[Range, ...]
    target: str
    trained: Range | None
    media: int


@dataclass(frozen=True)
class Rendered:
    """A chat as text, written by the template."""

    text: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Tokenized:
    """A rendered chat as token ids.

    Attributes:
        ids: ``(L,)`` long.
        asked: for each turn, the positions of the question's tokens.
        trained: for each turn, the positions of the answer's tokens.
        clip_places: the position at which each media part's run begins, also an empty run.
    """

    ids: Tensor
    asked: list[Tensor]
    trained: list[Tensor]
    clip_places: list[int]


@dataclass(frozen=True)
class _Piece:
    """Token ids of a piece of text, and for each of them its range of characters in the piece."""

    ids: list[int]
    offsets: list[Range]


def check_media_text(config: AVConfig) -> None:
    """Refuse text around media without exactly one ``{media}``.

    Raises:
        UserError: names the kind of media and the text.
    """
    for kind, text in config.media_text.items():
        if text.count("{media}") != 1:
            raise UserError(f"media_text around {kind} is {text!r}; expected {{media}} in it, once")


class ChatText:
    """Turns chats into text and text into token ids.

    Args:
        tokenizer: the LLM's; it gets a plain chat template if it has none.
        config: system prompt, text around media, placeholders.

    Raises:
        ChatTemplateError: the template is no Jinja, or does not end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: AVConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self._pieces: dict[str, _Piece] = {}
        self._chats: dict[tuple[Any, ...], Rendered] = {}
        if tokenizer.chat_template is None:
            tokenizer.chat_template = DEFAULT_TEMPLATE
        check_template(tokenizer)

    def check(self, message: Message) -> None:
        """Refuse text that contains a placeholder of media.

        Raises:
            RowError: ``reserved_text``.
        """
        for token in [MARK, PROBE, *(f"<|{s}|>" for s in self.config.media_token_ids)]:
            if token in message.text:
                raise RowError(
                    "reserved_text", f"the text holds {token!r}, which stands for media tokens"
                )

    # ---- text --------------------------------------------------------------------------------

    def render(self, messages: Sequence[Message], answer: bool) -> Rendered:
        """Write the chat as text, with a mark for each media part.

        Args:
            messages: the turns.
            answer: False ends the text where the next answer begins.

        Raises:
            RowError: ``chat_template``: the template refuses the roles, or rewrites earlier turns
                when more follow.
        """
        contents = [self._flatten(message) for message in messages]
        if self.config.system and contents[0].role != "system":
            contents.insert(0, Flat("system", self.config.system, (), ""))
        key = (answer, *contents)
        if key not in self._chats:  # many rows have the same chat
            if len(self._chats) >= MOST_PIECES:
                self._chats.clear()
            self._chats[key] = self._render(contents, answer)
        return self._chats[key]

    def _flatten(self, message: Message) -> Flat:
        text, ranges, words = "", [], ""
        for part in message.content:
            if isinstance(part, TextPart):
                ranges.append((len(text), len(text) + len(part.text)))
                text += part.text
                words += part.text
            else:
                text += self.config.media_text.get(part.type, "{media}").replace("{media}", MARK)
        return Flat(message.role, text, tuple(ranges), words)

    def _render(self, contents: list[Flat], answer: bool) -> Rendered:
        whole = self._template(contents, generation=not answer)
        turns: list[Turn] = []
        media = 0
        for place, content in enumerate(contents):
            if content.role == "user":
                media += content.text.count(MARK)
                asked = self._question_ranges(contents, place, whole)
                turns.append(Turn(content.words, asked, "", None, media))
            elif content.role == "assistant":
                trained = self._answer_range(contents, place, whole)
                asked_turn = turns.pop()
                turns.append(
                    Turn(asked_turn.question, asked_turn.asked, content.words, trained, media)
                )
        return Rendered(whole, tuple(turns))

    def _question_ranges(self, contents: list[Flat], place: int, whole: str) -> tuple[Range, ...]:
        """Return the ranges of a user's text in the chat; none if the template changes the text."""
        content = contents[place]
        probe = Flat(content.role, PROBE, (), "")
        start = self._template([*contents[:place], probe], generation=False).find(PROBE)
        written = content.text.strip()  # many templates strip a message
        stripped = len(content.text) - len(content.text.lstrip())
        if whole.startswith(content.text, start):
            written, stripped = content.text, 0
        if start < 0 or not whole.startswith(written, start):
            return ()
        ranges = []
        for low, high in content.ranges:
            first = max(low - stripped, 0)
            last = min(high - stripped, len(written))
            if last > first:
                ranges.append((start + first, start + last))
        return tuple(ranges)

    def _answer_range(self, contents: list[Flat], place: int, whole: str) -> Range:
        """Return the range of an assistant's message in the chat, with its end marker."""
        before = self._template(contents[:place], generation=True)
        after = self._template(contents[: place + 1], generation=False)
        end = min(len(after), len(whole))
        if not whole.startswith(after.rstrip()):  # Qwen3 drops the empty thoughts of earlier turns
            text = contents[place].text
            turn = text + after.rpartition(text)[2]
            is_unchanged = whole.startswith(turn, len(before))
            end = len(before) + len(turn) if is_unchanged else -1
        if end < 0 or not whole.startswith(before):
            raise RowError(
                "chat_template",
                f"the chat template rewrites turn {place} when more turns follow; use one "
                "that only appends",
            )
        return len(before), end

    def _template(self, contents: Sequence[Flat], generation: bool) -> str:
        messages = [{"role": content.role, "content": content.text} for content in contents]
        try:
            return render_chat(self.tokenizer, messages, generation=generation)
        except TemplateError as error:
            roles = [content.role for content in contents]
            raise RowError(
                "chat_template", f"the LLM's chat template refuses roles {roles}: {error}"
            ) from error

    # ---- tokens ------------------------------------------------------------------------------

    def tokenize(self, chat: Rendered, runs: Sequence[list[str]]) -> Tokenized:
        """Turn a rendered chat into token ids, with the tokens of media in place of their marks.

        Text is cut at the borders of media and answers, so that a prompt is exactly the beginning
        of its row.

        Args:
            chat: of :meth:`render`.
            runs: for each media part, the name of the stream of each token.

        Raises:
            RowError: ``chat_template``: the template left out a media part, or wrote it twice.
        """
        text = chat.text
        marks = [i for i, character in enumerate(text) if character == MARK]
        if len(marks) != len(runs):
            raise RowError(
                "chat_template",
                f"the chat template writes {len(marks)} media parts, the chat has "
                f"{len(runs)}; use one that writes each turn once, as given",
            )
        borders = {0, len(text), *marks, *(mark + 1 for mark in marks)}
        for turn in chat.turns:
            borders.update(turn.trained or ())
        spans = [(a, b) for a, b in pairwise(sorted(borders)) if b > a]
        pieces = self._encode([text[a:b] for a, b in spans if text[a] != MARK])
        return _put_together(chat, spans, pieces, [self._placeholders(run) for run in runs])

    def _placeholders(self, run: list[str]) -> list[int]:
        ids = self.config.media_token_ids  # looked up once: a config's attributes are slow
        return [ids[stream] for stream in run]

    def _encode(self, texts: list[str]) -> list[_Piece]:
        """Encode pieces of text; those that recur (turn markers, questions) are encoded once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._pieces]
        if len(self._pieces) + len(new) > MOST_PIECES:
            self._pieces = {}
            new = list(dict.fromkeys(texts))
        if new:
            has_offsets = self.tokenizer.is_fast
            encoded = self.tokenizer(
                new, add_special_tokens=False, return_offsets_mapping=has_offsets
            )
            for number, (text, ids) in enumerate(zip(new, encoded["input_ids"], strict=True)):
                # Without offsets, a token counts as the whole piece.
                offsets = (
                    encoded["offset_mapping"][number]
                    if has_offsets
                    else [(0, len(text))] * len(ids)
                )
                self._pieces[text] = _Piece(ids, offsets)
        return [self._pieces[text] for text in texts]


def _put_together(
    chat: Rendered, spans: Sequence[Range], pieces: Sequence[_Piece], runs: Sequence[list[int]]
) -> Tokenized:
    """Join text pieces and media runs in the order of the chat, with the positions of its turns."""
    ids: list[int] = []
    asked: list[list[int]] = [[] for _ in chat.turns]
    trained: list[list[int]] = [[] for _ in chat.turns]
    clip_places: list[int] = []
    next_piece = iter(pieces)
    next_run = iter(runs)
    for start, _ in spans:
        if chat.text[start] == MARK:
            clip_places.append(len(ids))
            ids += next(next_run)
            continue
        piece = next(next_piece)
        for number, turn in enumerate(chat.turns):
            if turn.trained is not None and turn.trained[0] <= start < turn.trained[1]:
                trained[number] += range(len(ids), len(ids) + len(piece.ids))
            else:
                asked[number] += [len(ids) + i for i in _tokens_in(piece, start, turn.asked)]
        ids += piece.ids
    return Tokenized(
        torch.tensor(ids, dtype=torch.long),
        [torch.tensor(places, dtype=torch.long) for places in asked],
        [torch.tensor(places, dtype=torch.long) for places in trained],
        clip_places,
    )


def _tokens_in(piece: _Piece, start: int, ranges: Sequence[Range]) -> list[int]:
    """Return the tokens of a piece that overlap a range; ``start`` is its first character."""
    last = start + piece.offsets[-1][1] if piece.offsets else start
    near = [(low - start, high - start) for low, high in ranges if low < last and high > start]
    if not near:
        return []
    overlapping = []
    for number, (first, end) in enumerate(piece.offsets):
        if any(first < high and end > low for low, high in near):
            overlapping.append(number)
    return overlapping
