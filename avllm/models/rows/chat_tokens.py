"""Turn rendered chats into token ids, with the tokens of media in place of their marks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from avllm.data.schema import RowError
from avllm.models.rows.control_text import ControlTokens
from avllm.models.rows.rendered import MARK, Range, Rendered

MOST_PIECES = 4096  # texts that are remembered


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


class ChatTokens:
    """Turns rendered chats into token ids.

    Args:
        tokenizer: the LLM's.
        control: the control tokens that people's texts do not write.
        media_token_ids: the placeholder of each stream.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        control: ControlTokens,
        media_token_ids: dict[str, int],
    ) -> None:
        self.tokenizer = tokenizer
        self.control = control
        self.media_token_ids = media_token_ids
        self._pieces: dict[str, _Piece] = {}
        self._substitutes = re.compile(f"[{MARK}{control.characters}]")

    def tokenize(self, chat: Rendered, runs: Sequence[list[str]]) -> Tokenized:
        """Turn a rendered chat into token ids, with the tokens of media in place of their marks.

        Text is cut at the borders of media, answers and control tokens that people wrote, so that a
        prompt is exactly the beginning of its row.

        Args:
            chat: of :meth:`ChatText.render`.
            runs: for each media part, the name of the stream of each token.

        Raises:
            RowError: ``chat_template``: the template left out a media part, or wrote it twice.
        """
        text = chat.text
        marks = [match.start() for match in self._substitutes.finditer(text)]
        count = text.count(MARK)
        if count != len(runs):
            raise RowError(
                "chat_template",
                f"the chat template writes {count} media parts, the chat has "
                f"{len(runs)}; use one that writes each turn once, as given",
            )
        borders = {0, len(text), *marks, *(mark + 1 for mark in marks)}
        for turn in chat.turns:
            borders.update(turn.trained or ())
        spans = [(a, b) for a, b in pairwise(sorted(borders)) if b > a]
        pieces = self._encode([text[a:b] for a, b in spans if text[a] != MARK])
        return _put_together(chat, spans, pieces, [self._placeholders(run) for run in runs])

    def _placeholders(self, run: list[str]) -> list[int]:
        return [self.media_token_ids[stream] for stream in run]

    def _encode(self, texts: list[str]) -> list[_Piece]:
        """Encode pieces of text; those that recur (turn markers, questions) are encoded once."""
        distinct = dict.fromkeys(text for text in texts if text not in self.control.ids)
        new = [text for text in distinct if text not in self._pieces]
        if len(self._pieces) + len(new) > MOST_PIECES:
            self._pieces = {}
            new = list(distinct)
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
        return [self._piece(text) for text in texts]

    def _piece(self, text: str) -> _Piece:
        """Return a piece by its text; a substitute gives the ordinary ids of its control token."""
        if text in self.control.ids:
            ids = self.control.ids[text]
            return _Piece(ids, [(0, 1)] * len(ids))
        return self._pieces[text]


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
