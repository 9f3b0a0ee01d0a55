"""Change the media of questions: remove a stream, or exchange it for another clip's.

The answers show whether the model uses what it sees and hears.
"""

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
DRAWS = 200  # random orders, of which the fairest is used


@dataclass(frozen=True)
class Condition:
    """Say how the media of a row are changed before it is asked; the text is never changed.

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
            raise UserError(
                f"both without={self.without!r} and swap={self.swap!r}; one change at a time",
            )

    @property
    def name(self) -> str:
        """Return ``as_is``, ``without_audio``, ``swapped_video``, ..."""
        if self.swap:
            return f"swapped_{self.swap}"
        return f"without_{self.without}" if self.without else "as_is"

    @property
    def removed(self) -> tuple[str, ...]:
        """Return the media that this condition removes, with all their streams."""
        if self.without is None:
            return ()
        return MEDIA if self.without == "both" else (self.without,)


AS_IS = Condition()


@dataclass(frozen=True)
class Unit:
    """Hold a distinct media part of a manifest.

    Attributes:
        part: the media part.
        file: its path.
        seconds: its length.
        asked: kind and answer of the questions about it.
    """

    part: MediaPart
    file: str
    seconds: float
    asked: tuple[tuple[str, str], ...] = ()

    @property
    def kinds(self) -> frozenset[str]:
        """Return the kinds of the questions about it."""
        return frozenset(kind for kind, _ in self.asked)


def remove(clip: Streams, streams: Iterable[str]) -> Streams:
    """Return the clip without some of its streams."""
    gone = set(streams)
    return {name: item for name, item in clip.items() if name not in gone}


def exchange(clip: Streams, other: Streams, streams: Collection[str]) -> Streams:
    """Return the clip with some streams of another; order and other streams stay."""
    exchanged = dict(clip)
    for name in clip:
        if (
            name in streams
        ):  # times in question and answer are seconds of the clip that is asked about
            exchanged[name] = replace(other[name], duration=clip[name].duration)
    return exchanged


def partners(units: Iterable[Unit], seed: int) -> Partners:
    """Choose, for each kind of question and clip that is asked it, a clip of another file.

    The partner is asked the same kind of question, too, so the question fits the stream, and the
    choice of the partner reveals nothing about the answer. (One partner for all kinds would reveal
    something, since clips with the same kinds are alike: only clips that bounce are asked about
    clicks at bounces, and their bounces are never 0.)

    Files are sorted by length and shuffled within blocks; each clip's partner is of the next file
    that is asked the same kind of question, and the last file's next is the first. So most kinds of
    a clip share a partner, no file is its own partner, and each gives its stream once for a kind.

    By chance partners would have the same answer in 42 % of some hundred pairs, or in 58 %, and the
    accuracy of a model that answers from the exchanged stream would be off chance by as much. So
    several orders are drawn, and the one is used whose partners agree most nearly as often as
    random pairs do, for all kinds (rerandomisation, Morgan & Rubin 2012). The same seed gives the
    same partners.

    Returns:
        partners by (kind, part), along the order of the files, so that neighbours share clips; a
        kind that is asked about one file only has none.
    """
    by_file: dict[str, list[Unit]] = {}
    for unit in sorted(set(units), key=lambda u: u.part.model_dump_json()):
        by_file.setdefault(unit.file, []).append(unit)
    lengths = {file: max(unit.seconds for unit in group) for file, group in by_file.items()}
    files = sorted(by_file, key=lambda file: (lengths[file], file))
    if len(files) < 2:
        return {}
    rng = np.random.default_rng([seed, len(files)])
    blocks = np.array_split(np.arange(len(files)), max(1, len(files) // NEIGHBOURS))
    shares = answer_shares([by_file[file] for file in files])
    fairest = np.arange(len(files))
    least_unfair = float("inf")
    for _ in range(DRAWS):
        order = np.concatenate([rng.permutation(block) for block in blocks])
        unfair = max((unfairness(order, of_kind) for of_kind in shares), default=0.0)
        if unfair < least_unfair:
            fairest = order
            least_unfair = unfair
    return next_partners([by_file[files[i]] for i in fairest])


def next_partners(groups: list[list[Unit]]) -> Partners:
    """Return each part's partners among the units of the next file that is asked the kind.

    Args:
        groups: the units of each file, in order.
    """
    kinds: set[str] = set()
    for group in groups:
        for unit in group:
            kinds |= unit.kinds
    chosen: Partners = {}
    for kind in sorted(kinds):
        parts_by_file: list[list[MediaPart]] = []  # of the files that are asked this kind
        for group in groups:
            parts = [unit.part for unit in group if kind in unit.kinds]
            if parts:
                parts_by_file.append(parts)
        if len(parts_by_file) < 2:
            continue
        for number, parts in enumerate(parts_by_file):
            theirs = parts_by_file[(number + 1) % len(parts_by_file)]
            for i, part in enumerate(parts):
                chosen[kind, part] = theirs[i % len(theirs)]
    places: dict[MediaPart, int] = {}
    for place, group in enumerate(groups):
        places |= dict.fromkeys((unit.part for unit in group), place)
    in_order = sorted(chosen, key=lambda key: (places[key[1]], key[0]))
    return {key: chosen[key] for key in in_order}


def answer_shares(groups: list[list[Unit]]) -> list[np.ndarray]:
    """Return the shares of the answers to each kind of question, by file.

    Args:
        groups: the units of each file.

    Returns:
        ``(files, answers)`` for each kind; a row of 0 where the file is not asked it.
    """
    counts: dict[str, Counter[tuple[int, str]]] = defaultdict(Counter)  # kind -> file, answer
    for file, group in enumerate(groups):
        for unit in group:
            for kind, answer in unit.asked:
                counts[kind][file, answer] += 1
    shares = []
    for _, of_kind in sorted(counts.items()):
        answers = sorted({answer for _, answer in of_kind})
        columns = {answer: column for column, answer in enumerate(answers)}
        table = np.zeros((len(groups), len(answers)))
        for (file, answer), count in of_kind.items():
            table[file, columns[answer]] = count
        shares.append(table / np.maximum(table.sum(1, keepdims=True), 1))
    return shares


def unfairness(order: np.ndarray, shares: np.ndarray) -> float:
    """Return how far the agreement of partners is from that of random pairs, in standard errors.

    Args:
        order: ``(files,)``, each file's partner being the next one that is asked the kind.
        shares: ``(files, answers)`` of one kind, see :func:`answer_shares`.
    """
    asked = shares[order]
    asked = asked[asked.any(1)]  # (n, answers) of the files that are asked the kind
    n = len(asked)
    if n < 2:
        return 0.0
    with_itself = float((asked**2).sum(1).mean())
    any_two = float((asked.mean(0) ** 2).sum())  # agreement of two files, which may be the same
    by_chance = max(0.0, (n * any_two - with_itself) / (n - 1))  # of two different files
    agreement = float((asked * np.roll(asked, -1, 0)).sum(1).mean())  # of partners
    standard_error = (by_chance * (1 - by_chance) / n) ** 0.5
    return abs(agreement - by_chance) / max(1e-9, standard_error)
