"""Write times and regions as text: times by the model's codec, regions by their ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from avllm.adapters.token_marks import mark_words
from avllm.data.media.load import Clip
from avllm.data.schema import (
    ContentPart,
    MediaPart,
    Message,
    RegionPart,
    RowError,
    TextPart,
    TimePart,
    WordPart,
)
from avllm.models.configuration_avllm import AVConfig
from avllm.registry import build
from avllm.time_codecs.base import Mixture, Piece, TimeCodec, TimeError
from avllm.times import Time
from avllm.tokens import REGION_MASK, EncoderInput


@dataclass(frozen=True)
class Written:
    """Messages of text and media alone.

    Attributes:
        messages: the messages.
        words: for each added word in the times, in order: the word, or a mixture of several.
    """

    messages: list[Message]
    words: list[Piece]


class Content:
    """Writes a row's times with the model's codec, and finds mixtures of words in its tokens.

    Regions are written as the words of their marks where the model has ``token_marks``, else by
    their ids.

    Args:
        config: of the model, whose ``words`` hold the codec's.
    """

    def __init__(self, config: AVConfig) -> None:
        self.codec: TimeCodec = build("time_codecs", config.time_codec)
        self.words = {word: config.words.get(word) for word in self.codec.words()}
        self._word = _any_of(self.words)
        self.marks = mark_words(config.connector)
        self._reserved = _any_of([*self.words, *self.marks])

    def write(
        self,
        messages: Sequence[Message],
        durations: Sequence[float | None],
        numbers: Mapping[str, int] | None = None,
    ) -> Written:
        """Write times and regions as text.

        Args:
            messages: a row's.
            durations: seconds of each of its clips, in order; None if unknown.
            numbers: the mark of each region by its id; None or empty writes their ids.

        Raises:
            RowError: ``outside_clip``, ``no_duration``: a time cannot be written.
                ``reserved_text``: a text contains one of the codec's words.
        """
        words: list[Piece] = []
        written = []
        media = 0
        for number, message in enumerate(messages):
            content: list[ContentPart] = []
            for place, part in enumerate(message.content):
                if isinstance(part, TimePart):
                    clip = media - 1 if part.clip is None else part.clip
                    if clip >= len(durations):
                        raise RowError(
                            "no_clip",
                            f"messages.{number}.content.{place}: a time of clip {clip}, which "
                            "comes in a later turn; name a clip that comes before it",
                        )
                    pieces = self._pieces(
                        part, durations[clip], f"messages.{number}.content.{place}"
                    )
                    content.append(TextPart(text="".join(map(_shown, pieces))))
                    words += self._own_words(pieces)
                    continue
                if isinstance(part, MediaPart):
                    media += 1
                else:
                    self._check_text(part.text, f"messages.{number}.content.{place}")
                if isinstance(part, RegionPart):
                    region = self.marks[numbers[part.region]] if numbers else part.text
                    content.append(TextPart(text=region))
                else:
                    content.append(part)
            written.append(message.model_copy(update={"content": content}))
        return Written(written, words)

    def _pieces(self, part: TimePart, duration: float | None, field: str) -> list[Piece]:
        try:
            return self.codec.write(part.time, duration)
        except TimeError as error:
            raise RowError(error.reason, f"{field}: {error}") from error

    def _own_words(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Return the words and mixtures that become one token each, in order."""
        own: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, Mixture):
                own.append(piece)
            elif self._word is not None:
                own += self._word.findall(piece)
        return own

    def _check_text(self, text: str, field: str) -> None:
        word = self._reserved.search(text) if self._reserved is not None else None
        if word is not None:
            raise RowError(
                "reserved_text",
                f"{field}: the text holds {word[0]!r}, a word for times or regions; write a part "
                "of type time or region",
            )

    def say_seconds(self, text: str, duration: float | None, whole: bool = True) -> str:
        """Write the times of an answer in seconds.

        Args:
            text: the LLM's answer.
            duration: seconds of the clip that it is about; None returns the text unchanged.
            whole: False while more is generated: the last word is left out, since it may be half a
                time.
        """
        if duration is None or not self.codec.rewrites:
            return text
        settled = text if whole else text.rpartition(" ")[0]
        return self.codec.to_seconds(settled, duration)

    def read(self, text: str, duration: float | None) -> list[TextPart | TimePart]:
        """Return an answer as parts, as manifests hold it: text, and times of the last clip.

        Written again by :meth:`write`, the parts give the text: a second question about the clip
        then follows the tokens that training has there.

        Args:
            text: the LLM's answer.
            duration: seconds of the clip that it is about; None returns the text unchanged.
        """
        if duration is None or not self.codec.rewrites:
            return [TextPart(text=text)]
        parts: list[TextPart | TimePart] = []
        position = 0
        for mention in self.codec.find(text, duration):
            if self._written(mention.seconds, duration) != text[mention.first : mention.last]:
                continue  # a time after the clip's end, or in another form: it stays text
            if mention.first > position:
                parts.append(TextPart(text=text[position : mention.first]))
            parts.append(TimePart.model_validate({"seconds": mention.seconds}))
            position = mention.last
        if position < len(text) or not parts:
            parts.append(TextPart(text=text[position:]))
        return parts

    def _written(self, seconds: float, duration: float) -> str | None:
        """Return a moment as the codec writes it, None if it cannot."""
        try:
            return "".join(map(_shown, self.codec.write(Time(seconds), duration)))
        except TimeError:
            return None

    def mixtures(self, ids: Tensor, words: Sequence[Piece]) -> list[tuple[int, dict[int, float]]]:
        """Return the places of a row's mixtures, each with its weights by token id.

        Args:
            ids: ``(L,)`` long.
            words: of :class:`Written`.

        Raises:
            RowError: ``chat_template``: the row's tokens are not these words in this order.
        """
        if not any(isinstance(word, Mixture) for word in words):
            return []
        is_word = torch.isin(ids, torch.tensor(list(self.words.values())))  # (L,)
        places = is_word.nonzero().flatten().tolist()
        mixtures: list[tuple[int, dict[int, float]]] = []
        for place, word in zip_longest(places, words):
            shown = None if word is None else self.words[_shown(word)]
            if place is None or shown != int(ids[place]):
                raise RowError(
                    "chat_template",
                    f"the row's tokens hold {len(places)} words of the time codec, "
                    f"{len(words)} were written; use a chat template that writes each turn once, "
                    "as given",
                )
            if isinstance(word, Mixture):
                weights = {int(self.words[name] or 0): w for name, w in word.weights.items()}
                mixtures.append((place, weights))
        return mixtures


def _any_of(words: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern that matches one of the words; None if there are none."""
    escaped = [re.escape(word) for word in words]
    return re.compile("|".join(escaped)) if escaped else None


def in_seconds(messages: Sequence[Message]) -> list[Message]:
    """Write times in seconds: for a chat whose clips are not read."""
    written = []
    for message in messages:
        content = [
            TextPart(text=part.text) if isinstance(part, WordPart) else part
            for part in message.content
        ]
        written.append(message.model_copy(update={"content": content}))
    return written


def check_regions(clip: Clip, inputs: Mapping[str, EncoderInput]) -> None:
    """Refuse a clip of which an encoder sees nothing of a region.

    Raises:
        RowError: ``region_cropped``.
    """
    regions = () if clip.frames is None else clip.frames.regions
    for stream, item in inputs.items():
        if REGION_MASK not in item.extra:
            continue
        for region, seen in zip(regions, item.extra[REGION_MASK].any(0).tolist(), strict=True):
            if not seen:
                raise RowError(
                    "region_cropped",
                    f"nothing of region {region.id!r} (box {region.box}) is left in the "
                    f"pictures of stream {stream!r}, which are cut to their middle; leave the "
                    "region out, or take an encoder that sees whole pictures",
                )


def _shown(piece: Piece) -> str:
    return piece.word if isinstance(piece, Mixture) else piece
