"""The same questions with a stream taken away or exchanged for another clip's: does the model look, does it listen?"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from avllm.data.schema import MediaPart
from avllm.errors import UserError
from avllm.streams import MEDIA
from avllm.tokens import EncoderInput

Streams = dict[str, EncoderInput]
Partners = dict[tuple[str, MediaPart], MediaPart]
NEIGHBOURS = 8  # files of about one length, among which the order is random
DRAWS = 200  # of the order; the fairest is taken


@dataclass(frozen=True)
class Condition:
    """How the media of a row is changed before it is asked; the text never is.

    Attributes:
        without: a medium that is removed (no token of its streams is left), or ``both``.
        swap: a medium whose streams are exchanged for another clip's.
    """

    without: Literal["audio", "video", "both"] | None = None
    swap: Literal["audio", "video"] | None = None

    def __post_init__(self) -> None:
        if self.without not in (None, "both", *MEDIA):
            raise UserError(f"without is {self.without!r}; expected 'audio', 'video' or 'both'")
        if self.swap not in (None, *MEDIA):
            raise UserError(f"swap is {self.swap!r}; expected 'audio' or 'video'")
        if self.without and self.swap:
            raise UserError(f"both without={self.without!r} and swap={self.swap!r}; one change at a time")

    @property
    def name(self) -> str:
        """``as_is``, ``without_audio``, ``swapped_video``, ..."""
        if self.swap:
            return f"swapped_{self.swap}"
        return f"without_{self.without}" if self.without else "as_is"

    @property
    def removed(self) -> tuple[str, ...]:
        """The media that this condition takes away, with all their streams."""
        if self.without is None:
            return ()
        return MEDIA if self.without == "both" else (self.without,)


AS_IS = Condition()


@dataclass(frozen=True)
class Unit:
    """A distinct media part of a manifest.

    Attributes:
        file: where it lies.
        seconds: how long it is.
        asked: kind and answer of the questions about it.
    """

    part: MediaPart
    file: str
    seconds: float
    asked: tuple[tuple[str, str], ...] = ()

    @property
    def kinds(self) -> frozenset[str]:
        """Of the questions about it."""
        return frozenset(kind for kind, _ in self.asked)


def remove(clip: Streams, streams: Iterable[str]) -> Streams:
    """The clip without some of its streams."""
    gone = set(streams)
    return {name: item for name, item in clip.items() if name not in gone}


def exchange(clip: Streams, other: Streams, streams: Collection[str]) -> Streams:
    """Return the clip with some streams of another; whatever else it has stays, at its place in the dict."""
    exchanged = dict(clip)
    for name in clip:
        if name in streams:  # times in question and answer are seconds of the clip that is asked about
            exchanged[name] = replace(other[name], duration=clip[name].duration)
    return exchanged


def partners(units: Iterable[Unit], seed: int) -> Partners:
    """For each kind of question and media part asked it, a part of **another file** that is asked this kind, too.

    So the question makes sense of what it meets, and which partner it meets says nothing about its answer. (One partner
    for all kinds would: clips asked the very same kinds are alike. Only clips that bounce are asked about clicks at
    bounces, and their bounces are never 0.) Files stand in a circle, sorted by length and shuffled within small blocks;
    each takes the nearest behind it that will do, so that most kinds of a clip share a partner, no file meets itself
    and each gives its stream away exactly once for a kind.

    Chance alone would let partners have the same answer now in 42%, now in 58% of some hundred pairs, and a model that
    answers from the stream it was handed be off chance by as much. So several circles are drawn, and that one is taken
    whose partners agree most nearly as often as strangers do, for all kinds (rerandomisation, Morgan & Rubin 2012). The
    same seed gives the same partners.

    Returns:
        partners by (kind, part); a kind that is asked about one file only has none.
    """
    by_file: dict[str, list[Unit]] = {}
    for unit in sorted(set(units), key=lambda u: u.part.model_dump_json()):
        by_file.setdefault(unit.file, []).append(unit)
    files = sorted(by_file, key=lambda f: (max(u.seconds for u in by_file[f]), f))
    if len(files) < 2:
        return {}
    rng = np.random.default_rng([seed, len(files)])
    blocks = np.array_split(np.arange(len(files)), max(1, len(files) // NEIGHBOURS))
    shares = answer_shares([by_file[file] for file in files])
    circles = [np.concatenate([rng.permutation(block) for block in blocks]) for _ in range(DRAWS)]
    fairest = min(circles, key=lambda circle: max((unfairness(circle, x) for x in shares), default=0.0))
    return around([by_file[files[i]] for i in fairest])


def around(circle: list[list[Unit]]) -> Partners:
    """Each part's partners among the units of the files behind its own."""
    found: Partners = {}
    for kind in sorted({kind for group in circle for unit in group for kind in unit.kinds}):
        asked = [group for group in ([u.part for u in g if kind in u.kinds] for g in circle) if group]
        if len(asked) > 1:
            for mine, theirs in zip(asked, asked[1:] + asked[:1], strict=True):
                found |= {(kind, part): theirs[i % len(theirs)] for i, part in enumerate(mine)}
    return found


def answer_shares(groups: list[list[Unit]]) -> list[np.ndarray]:
    """For each kind of question ``(files, answers)``: shares of the answers to it, all 0 where it is not asked."""
    counts: dict[str, Counter[tuple[int, str]]] = defaultdict(Counter)
    for place, group in enumerate(groups):
        for kind, answer in (pair for unit in group for pair in unit.asked):
            counts[kind][place, answer] += 1
    shares = []
    for _, of_kind in sorted(counts.items()):
        answers = {answer: i for i, answer in enumerate(sorted({answer for _, answer in of_kind}))}
        table = np.zeros((len(groups), len(answers)))
        for (place, answer), count in of_kind.items():
            table[place, answers[answer]] = count
        shares.append(table / np.maximum(table.sum(1, keepdims=True), 1))
    return shares


def unfairness(circle: np.ndarray, shares: np.ndarray) -> float:
    """By how many standard errors neighbours' answers to one kind agree more or less often than strangers' do."""
    asked = shares[circle]
    asked = asked[asked.any(1)]
    n = len(asked)
    if n < 2:
        return 0.0
    with_itself = float((asked**2).sum(1).mean())
    by_chance = max(0.0, (n * float((asked.mean(0) ** 2).sum()) - with_itself) / (n - 1))  # of two different files
    agree = float((asked * np.roll(asked, -1, 0)).sum(1).mean())
    return abs(agree - by_chance) / max(1e-9, (by_chance * (1 - by_chance) / n) ** 0.5)
