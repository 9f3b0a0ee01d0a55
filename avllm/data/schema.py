"""Define the Sample: a row of a manifest, a chat request, an API request, a row of a batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    field_validator,
    model_validator,
)
from pydantic_core import core_schema

from avllm.data.store.storage import url_of, without_file_scheme
from avllm.errors import UserError
from avllm.times import Time, say_time


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Share = Annotated[float, Field(ge=0, le=1)]


class _Interval(_Strict):
    start: float | None = Field(None, ge=0, description="seconds of the file where the clip begins")
    end: float | None = Field(None, gt=0, description="seconds of the file where the clip ends")

    @model_validator(mode="after")
    def _ordered(self) -> _Interval:
        if self.end is not None and self.end <= (self.start or 0.0):
            seen = f"end {self.end} is not after start {self.start or 0.0}"
            raise ValueError(f"{seen}; both are seconds of the file")
        return self


class _Sounding(_Interval):
    track: int | None = Field(
        None,
        ge=0,
        description="number of the file's sound track, from 0; None: the default one",
    )


class TextPart(_Strict):
    """A piece of text."""

    type: Literal["text"] = "text"
    text: str = Field(description="the text")


class Region(_Strict):
    """A part of a picture that text may refer to by its id.

    The box is x0, y0, x1, y1 as shares (0 to 1) of the displayed picture's width and height, from
    its upper left.
    """

    id: str = Field(min_length=1, description="the name by which text refers to it")
    box: tuple[Share, Share, Share, Share] = Field(description="left, top, right, bottom")
    time: float | None = Field(
        None, ge=0, description="second of the clip at which it is there; None: all of it"
    )

    @model_validator(mode="after")
    def _has_area(self) -> Region:
        x0, y0, x1, y1 = self.box
        if x0 >= x1 or y0 >= y1:
            raise ValueError(f"box {self.box} has no area; expected x0 < x1 and y0 < y1")
        return self


class VideoPart(_Sounding):
    """A video file, or an interval of it; ``sound`` says whether its sound track is used."""

    type: Literal["video"] = "video"
    video: str = Field(min_length=1, description="the file, a URL, or a member of a shard")
    sound: Literal["auto", "on", "off"] = Field(
        "auto", description="is its sound heard; auto: if it has any, on: it must have some"
    )
    regions: tuple[Region, ...] | None = Field(None, description="boxes that text may refer to")

    @property
    def path(self) -> str:
        """Return the file, as the row names it."""
        return self.video


class AudioPart(_Sounding):
    """A sound file, or the sound of a video file."""

    type: Literal["audio"] = "audio"
    audio: str = Field(min_length=1, description="the file, a URL, or a member of a shard")

    @property
    def path(self) -> str:
        """Return the file, as the row names it."""
        return self.audio


class ImagePart(_Strict):
    """A picture."""

    type: Literal["image"] = "image"
    image: str = Field(min_length=1, description="the file, a URL, or a member of a shard")
    regions: tuple[Region, ...] | None = Field(None, description="boxes that text may refer to")

    @property
    def path(self) -> str:
        """Return the file, as the row names it."""
        return self.image


class TimePart(_Strict):
    """A moment (``seconds``) or a span (``start`` to ``end``) in seconds of a clip of the row.

    How the LLM gets to see it is the business of the model's time codec.
    """

    type: Literal["time"] = "time"
    seconds: float | None = Field(None, ge=0, description="a moment")
    start: float | None = Field(None, ge=0, description="where a span begins")
    end: float | None = Field(None, gt=0, description="where a span ends")
    clip: int | None = Field(
        None,
        ge=0,
        description="the row's media part that it is about, from 0; None: the last one before it",
    )

    @model_validator(mode="after")
    def _one_form(self) -> TimePart:
        is_span = self.start is not None and self.end is not None
        if (self.seconds is None) != is_span or (
            self.seconds is not None and (self.start, self.end) != (None, None)
        ):
            raise ValueError(
                f"a time has seconds {self.seconds}, start {self.start}, end {self.end}; "
                "expected either seconds (a moment) or start and end (a span)"
            )
        if self.start is not None and self.end is not None and self.end <= self.start:
            raise ValueError(
                f"end {self.end} is not after start {self.start}; both are seconds of the clip",
            )
        return self

    @property
    def time(self) -> Time:
        """Return the moment or the span."""
        return Time(self.seconds) if self.seconds is not None else Time(self.start or 0.0, self.end)

    @property
    def text(self) -> str:
        """Return the time in seconds, as the default codec writes it."""
        return say_time(self.time)


class RegionPart(_Strict):
    """A reference in text to a region of one of the row's pictures."""

    type: Literal["region"] = "region"
    region: str = Field(min_length=1, description="the region's id")

    @property
    def text(self) -> str:
        """Return ``<region ID>``, as the LLM reads it."""
        return f"<region {self.region}>"


MediaPart = VideoPart | AudioPart | ImagePart
WordPart = TextPart | TimePart | RegionPart
ContentPart = Annotated[
    TextPart | TimePart | RegionPart | VideoPart | AudioPart | ImagePart,
    Field(discriminator="type"),
]
# Tuples: isinstance with a union takes twice as long.
_MEDIA = (VideoPart, AudioPart, ImagePart)
_REFERENCES = (TimePart, RegionPart)
PARTS = "<parts>"  # the two forms of a turn's content, as validation errors call them
PLAIN = "<plain text>"


class _PlainText:
    """Accept a string in place of a list of parts, for one text part.

    Pydantic is given a union of two forms. A function before validation would turn the JSON into
    Python objects first, which takes a third of a row's time.
    """

    @classmethod
    def __get_pydantic_core_schema__(
        cls,
        source: Any,
        handler: GetCoreSchemaHandler,
    ) -> core_schema.CoreSchema:
        text = core_schema.no_info_after_validator_function(
            lambda text: [TextPart(type="text", text=text)],
            core_schema.str_schema(strict=True),
        )
        return core_schema.union_schema(
            [(handler(source), PARTS), (text, PLAIN)],
            mode="left_to_right",
        )


class Message(_Strict):
    """One turn: a role and content parts; a plain string stands for one text part."""

    role: Literal["system", "user", "assistant"] = Field(description="whose turn it is")
    content: Annotated[list[ContentPart], _PlainText] = Field(
        description="parts in their order; a plain text is one text part"
    )

    @property
    def text(self) -> str:
        """Return the parts that are no media as text: times as the default codec writes them."""
        return "".join(p.text for p in self.content if isinstance(p, WordPart))


class Sample(_Strict):
    """One row: an id, messages, and fields for evaluation and bookkeeping."""

    id: str = Field(min_length=1, description="names the row in messages and lists; unique")
    messages: list[Message] = Field(
        min_length=1, description="turns; one that ends with a user's is a request"
    )
    source: str = Field("unknown", description="the dataset; counts and mixtures name it")
    kind: str | None = Field(None, description="kind of question, for results by kind")
    choices: list[str] | None = Field(None, description="closed set of answers")
    answers: list[str] | None = Field(None, description="further accepted answers")
    rejected: list[str] | None = Field(
        None, description="worse answers than the last turn, for preferences"
    )
    seconds: float | None = Field(
        None,
        description="the answer is this time; scored by absolute error",
    )
    licence: str | None = Field(None, description="of the row; kept, training does not read it")
    meta: dict[str, Any] = Field(default_factory=dict, description="anything else; kept")

    @field_validator("messages")
    @classmethod
    def _one_conversation(cls, messages: list[Message]) -> list[Message]:
        # One validator with plain loops: each call out of pydantic costs 1 µs, and manifests have
        # millions of rows.
        if len(messages) != 2 or messages[0].role != "user" or messages[1].role != "assistant":
            _check_roles(messages)
        refers = False
        for message in messages:
            for part in message.content:
                if isinstance(part, TextPart):
                    continue
                if isinstance(part, _REFERENCES):
                    refers = True
                elif message.role != "user":
                    raise ValueError(
                        f"a {message.role} turn holds media; expected media in user turns only"
                    )
                elif not isinstance(part, AudioPart) and part.regions:
                    refers = True
        if refers:
            _check_references(messages)
        return messages

    @property
    def media(self) -> list[MediaPart]:
        """Return the media parts of all turns, in order."""
        parts: list[MediaPart] = []
        for message in self.messages:
            parts += [p for p in message.content if isinstance(p, MediaPart)]
        return parts

    @property
    def answer(self) -> str | None:
        """Return the text of the last turn when it is the assistant's, else None."""
        last = self.messages[-1]
        return last.text if last.role == "assistant" else None

    @property
    def last_question(self) -> str:
        """The text of the last user turn."""
        return next(m.text for m in reversed(self.messages) if m.role == "user")

    def question(self) -> Sample:
        """Return the row without its last answer, as a model is asked."""
        if self.messages[-1].role != "assistant":
            return self
        return self.model_copy(update={"messages": self.messages[:-1]})


def _check_roles(messages: list[Message]) -> None:
    """Check that an optional system turn is first and that user and assistant then alternate."""
    roles = [m.role for m in messages if m.role != "system"]
    expected = ["user", "assistant"] * len(roles)
    if not roles or roles != expected[: len(roles)]:
        raise ValueError(
            f"roles are {roles}; expected user and assistant in turn, beginning with user"
        )
    if any(m.role == "system" for m in messages[1:]):
        raise ValueError("a system turn comes after another turn; it may only be the first")


def _check_references(messages: list[Message]) -> None:
    """Check that times and regions in the text are about media and regions that the row has."""
    media = [p for m in messages for p in m.content if isinstance(p, _MEDIA)]
    regions = _region_ids(media)
    before = 0  # media parts before the reference
    for number, message in enumerate(messages):
        for place, part in enumerate(message.content):
            field = f"messages.{number}.content.{place}"
            if isinstance(part, _MEDIA):
                before += 1
            elif isinstance(part, RegionPart):
                if part.region not in regions:
                    raise ValueError(
                        f"{field}.region is {part.region!r}; "
                        f"the row's regions are {sorted(regions)}"
                    )
            elif isinstance(part, TimePart):
                _check_clip(field, part.clip, before, len(media))


def _check_clip(field: str, clip: int | None, before: int, count: int) -> None:
    """Check that a time is about one of the row's ``count`` media parts."""
    if clip is None and before == 0:
        raise ValueError(
            f"{field} is a time, but no media part comes before it; say which clip it is about"
        )
    if clip is not None and clip >= count:
        raise ValueError(
            f"{field}.clip is {clip}; the row has {count} media parts, numbered from 0"
        )


def _region_ids(media: list[MediaPart]) -> set[str]:
    """Return the ids of all regions of a row.

    A region that moves has several boxes in one media part, each with its time.

    Raises:
        ValueError: one id names two regions.
    """
    ids: set[str] = set()
    for number, part in enumerate(media):
        of_part: dict[str, set[float | None]] = {}
        for region in () if isinstance(part, AudioPart) else part.regions or ():
            times = of_part.setdefault(region.id, set())
            is_again = bool(times) and (None in {*times, region.time} or region.time in times)
            if region.id in ids or is_again:
                raise ValueError(
                    f"media part {number}: a region has the id {region.id!r}, "
                    "which is taken in this row; boxes of one region that moves need a time each"
                )
            times.add(region.time)
        ids |= of_part.keys()
    return ids


def resolve(part: MediaPart, root: Path | None) -> Path:
    """Return the file of a media part; a relative path is relative to the manifest's folder.

    It may be a shard's member or a URL, which ``storage.py`` reads.
    """
    return resolve_path(part.path, root)


def resolve_path(path: str, root: Path | None) -> Path:
    """Return the file that a part's path denotes, see :func:`resolve`."""
    # Not Path.expanduser: it raises where "~NAME" is a file's name and no user's.
    file = Path(os.path.expanduser(without_file_scheme(path)))
    if root is None or file.is_absolute() or url_of(file):
        return file
    return without_file_scheme(root / file)


class RowError(UserError):
    """A well-formed sample cannot become a training row.

    Attributes:
        reason: one word to count by: ``too_long``, ``empty_answer``, ``reserved_text``, ...
        detail: what was seen.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # both in args, for pickle
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return self.detail
