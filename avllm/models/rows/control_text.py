"""Keep control tokens that people write as text: in rows they are ordinary token ids.

A question may hold ``<|im_end|>`` or ``<|video|>``. Written into a chat as given, it would end the
turn, or ask for media. So each such string is replaced by one character (its substitute) before the
chat template sees it, and the substitute by the ids of the string's ordinary tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

FIRST_SUBSTITUTE = 0x100000  # private use, plane 16: in no script and in no icon font


class ControlTokens:
    """The control tokens of an LLM, which no text of a person may write.

    These are the tokenizer's special tokens, media placeholders among them, and the added tokens
    that the chat template writes: some LLMs mark turns by tokens that are not declared special.

    Args:
        tokenizer: the LLM's.
        template: source of its chat template.
        turns: a chat of several turns, as the template writes it. Answers may hold what the
            template reads in them (``<think>``), but not what it writes around turns.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, turns: str) -> None:
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        words = [word for word in added if word.strip()]
        asked = [word for word in words if added[word] or word in template]
        answered = [word for word in asked if added[word] or word in turns]
        self.words = asked
        self._substitutes = {word: chr(FIRST_SUBSTITUTE + n) for n, word in enumerate(asked)}
        self._asked = _any_of(asked)
        self._answered = _any_of(answered)
        ids = _ordinary_ids(tokenizer, asked)
        self.ids = {self._substitutes[word]: ids[word] for word in asked}
        self.characters = "".join(self._substitutes.values())

    def hide(self, text: str, role: str) -> str:
        """Replace the control tokens in the text of a turn by their substitutes."""
        pattern = self._answered if role == "assistant" else self._asked
        return pattern.sub(lambda match: self._substitutes[match[0]], text)

    def show(self, text: str) -> str:
        """Replace substitutes by the control tokens that people wrote."""
        return text.translate({ord(mark): word for word, mark in self._substitutes.items()})

    def written_in(self, text: str, role: str) -> list[str]:
        """Return the control tokens in the text of a turn, in order."""
        pattern = self._answered if role == "assistant" else self._asked
        return pattern.findall(text)


def match_exactly(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the control tokens of a tokenizer that ignores case match their own spelling alone.

    Such a tokenizer may compare its special tokens after it has lower-cased the text: ``<|end|>``
    would be ``<|END|>``, which is hidden under that spelling alone.
    """
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normalizer is None:
        return
    loose = []
    for token in tokenizer.added_tokens_decoder.values():
        upper = normalizer.normalize_str(token.content.upper())
        ignores_case = upper == normalizer.normalize_str(token.content.lower())
        if token.special and token.normalized and ignores_case:
            loose.append(token)
    for token in loose:
        exact = AddedToken(
            token.content,
            special=True,
            normalized=False,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            single_word=token.single_word,
        )
        tokenizer.add_tokens([exact], special_tokens=True)  # it keeps its id
    if loose:  # the tokenizer in memory would go on writing them in lower case
        tokenizer._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches one of the words, the longest first; none matches nothing."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _ordinary_ids(tokenizer: PreTrainedTokenizerBase, words: list[str]) -> dict[str, list[int]]:
    """Return the token ids of control tokens that are read as ordinary text.

    Added tokens that are not special are matched all the same: these are cut after their first
    character.
    """
    if not words:
        return {}
    added = set(tokenizer.added_tokens_decoder)
    # Encoded once: the option changes the tokenizer while it runs, which threads may share.
    encoded = tokenizer(words, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ids = {}
    for word, whole in zip(words, encoded, strict=True):
        ids[word] = whole
        if added & set(whole):
            halves = tokenizer(
                [word[:1], word[1:]], add_special_tokens=False, split_special_tokens=True
            )["input_ids"]
            ids[word] = [*halves[0], *halves[1]]
    return ids
