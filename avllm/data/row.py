"""A row: one sequence of token ids with its media, and the parts of it that are trained on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from avllm.data.soft import Soft
from avllm.tokens import EncoderInput

IGNORE = (
    -100
)  # label of a position that is not trained on; the value that torch and transformers skip


@dataclass(frozen=True)
class Part:
    """One question with its answer: the unit that objectives count.

    A row of a single turn has one part, a chat of three turns has three, a packed row has those of
    its rows.

    Attributes:
        id: of the sample.
        kind: of the question; None for captions and plain rows.
        role: ``answer``, or of a row maker: ``chosen``, ``rejected``, ``negative``.
        question: the text of the user's turn.
        target: the text of the answer; empty in a prompt.
        asked: ``(A,)`` long, places in the row of the question's text tokens.
        trained: ``(M,)`` long, places in the row of the answer's tokens.
        clips: which of the row's clips the part can see, in order.
    """

    id: str
    kind: str | None
    role: str
    question: str
    target: str
    asked: Tensor
    trained: Tensor
    clips: tuple[int, ...]

    @property
    def is_question(self) -> bool:
        """Return whether the part asks about its clip: it has a kind, and that is no caption."""
        return self.kind not in (None, "caption")

    def moved(self, by: int, after: int = 0, clips: int = 0) -> Part:
        """Return the part in a row in which its tokens lie elsewhere.

        Args:
            by: places by which tokens move to the right.
            after: the first place that moves; what lies before it stays.
            clips: clips of the row that come before this part's own.
        """
        return replace(
            self,
            asked=self.asked + by * (self.asked >= after),
            trained=self.trained + by * (self.trained >= after),
            clips=tuple(clip + clips for clip in self.clips),
        )


@dataclass(frozen=True)
class Row:
    """One sequence, ready for a batch.

    Attributes:
        input_ids: ``(L,)`` long, placeholders where media tokens will be.
        labels: ``(L,)`` long, ``-100`` where not trained on.
        clips: the media parts in order, each ``{stream: EncoderInput}``.
        is_media: ``(L,)`` bool, True at placeholders.
        parts: the questions and answers in it.
        clip_places: the place at which each clip's run begins, also that of an empty run.
        segments: ``(L, 2)`` long (group, part) of packed rows or None: see
            :class:`~avllm.data.collate.Batch`.
        position_ids: ``(L,)`` of packed rows or None for 0, 1, 2, ...
        soft: targets that are distributions, or None.
        variant: rows of one variant share a micro batch; adapters read it
            (:func:`avllm.adapters.base.variant`).
        duration: seconds of the last clip, which an answer's times are about; None where not known.
    """

    id: str
    input_ids: Tensor
    labels: Tensor
    clips: list[dict[str, EncoderInput]]
    is_media: Tensor
    source: str = "unknown"
    parts: tuple[Part, ...] = ()
    segments: Tensor | None = None
    position_ids: Tensor | None = None
    variant: str | None = None
    clip_places: list[int] = field(default_factory=list)
    soft: Soft | None = None
    duration: float | None = None

    @property
    def num_targets(self) -> int:
        """Count positions whose next token is trained on; the first position has no predecessor."""
        return int((self.labels[1:] != IGNORE).sum())

    @property
    def media_end(self) -> int:
        """Return the place after the last media token."""
        places = self.is_media.nonzero()
        last = int(places[-1]) + 1 if len(places) else 0
        return max(last, *self.clip_places) if self.clip_places else last

    @property
    def first_trained(self) -> int:
        """Return the place of the first token of an answer; the row's length without one."""
        answers = [part.trained for part in self.parts]
        answers.append((self.labels != IGNORE).nonzero().flatten())
        return min(
            (int(places[0]) for places in answers if len(places)), default=len(self.input_ids)
        )


def text_row(input_ids: Tensor) -> Row:
    """Return a row of bare text that nothing trains on."""
    nothing = torch.full_like(input_ids, IGNORE)
    return Row("", input_ids, nothing, [], torch.zeros_like(input_ids, dtype=torch.bool))
