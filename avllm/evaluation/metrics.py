"""Figures of merit: pure functions of answers and truths, each tested against numbers worked out by hand."""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

_DIGITS = {
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_ARTICLES = {"a", "an", "the"}
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d+)?|\.\d+)")
_EDGES = string.punctuation + "“”‘’«»…–—¿¡"
_LETTER = re.compile(r"\(?([a-z])[).:]?", re.IGNORECASE)


class Interval(NamedTuple):
    """A figure's lower and upper end."""

    low: float
    high: float


@lru_cache(maxsize=100_000)  # answers and choices are the same few texts again and again
def words(text: str) -> tuple[str, ...]:
    """Words as they are compared: lower case, NFKC, no punctuation at their edges, no articles, ``two`` = ``2``.

    Punctuation inside a word stays, so that ``1.5`` is not ``15`` and ``x-ray`` is one word.
    """
    pieces = (w.strip(_EDGES) for w in _keep_signs(unicodedata.normalize("NFKC", text).casefold()).split())
    kept = [_DIGITS.get(w, w) for w in pieces if w]
    without_articles = [w for w in kept if w not in _ARTICLES]
    return tuple(w.replace("\0", "-") for w in without_articles or kept)  # the answer "a" keeps its word


def _keep_signs(text: str) -> str:
    return re.sub(r"(^|\s)-(?=\d)", "\\1\0", text)  # the minus of "-3" is no punctuation


def normalise(text: str) -> str:
    """The words of a text in one string."""
    return " ".join(words(text))


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Return whether the normalised answer is one of the normalised references."""
    return normalise(answer) in {normalise(r) for r in references}


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Return the harmonic mean of word precision and recall against the best reference (SQuAD, arXiv 1606.05250)."""
    return max(_f1(words(answer), words(reference)) for reference in references)


def _f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = (Counter(answer) & Counter(reference)).total()
    return 2 * common / (len(answer) + len(reference))


def pick_choice(answer: str, choices: Sequence[str]) -> int | None:
    """Return the choice that an answer means; None when it means none or several.

    Tried in this order: it is a choice; it is a letter (``B``, ``(b)``, ``b.``) of the list; it
    contains exactly one choice as whole words (where a choice is part of a longer one, the longer
    counts).
    """
    given = words(answer)
    known = [words(c) for c in choices]
    if given in known:
        return known.index(given)
    letter = _LETTER.fullmatch(answer.strip())
    if letter:
        place = ord(letter[1].lower()) - ord("a")
        return place if place < len(choices) else None
    found: set[int] = set()
    for place in sorted(range(len(known)), key=lambda i: -len(known[i])):
        given, there = _cut_out(given, known[place])
        found |= {place} if there else set()
    return found.pop() if len(found) == 1 else None


def _cut_out(text: Sequence[str], phrase: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """The text with each occurrence of the phrase replaced by a gap, and whether there was one."""
    kept: list[str] = []
    place, there, size = 0, False, len(phrase)
    while place < len(text):
        hit = size > 0 and tuple(text[place : place + size]) == tuple(phrase)
        kept.append("\0" if hit else text[place])
        there, place = there or hit, place + (size if hit else 1)
    return tuple(kept), there


def read_number(answer: str) -> float | None:
    """The one number that an answer names (``at 1.3 seconds``, ``two``); None when it names none or different ones."""
    found = {float(n) for w in words(answer) for n in _NUMBER.findall(w)}
    return found.pop() if len(found) == 1 else None


def time_error(answer: str, seconds: float, worst: float) -> tuple[float, bool]:
    """Absolute error in seconds and whether the answer was a number at all; ``worst`` is the error where it was not."""
    value = read_number(answer)
    return (worst, False) if value is None else (abs(value - seconds), True)


def wilson(hits: int, n: int, z: float = 1.959964) -> Interval:
    """95% interval of a proportion (Wilson 1927): never outside 0 to 1, and sound at 0 and at all of n.

    Raises:
        ValueError: no observations, or more hits than those.
    """
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"{hits} hits of {n}; expected 0 <= hits <= n and n > 0")
    share, spread = hits / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def bootstrap_mean(values: Sequence[float], seed: int = 0, draws: int = 2000) -> Interval:
    """95% interval of a mean: percentiles over ``draws`` resamples (Efron 1979), the same for the same seed.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("no values to resample; expected at least one")
    x = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = [float(x[rng.integers(0, len(x), len(x))].mean()) for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(low), float(high))


def constant_accuracy(truths: Sequence[str]) -> float:
    """Accuracy of the one answer that is right most often."""
    return Counter(normalise(t) for t in truths).most_common(1)[0][1] / len(truths)


def constant_error(seconds: Sequence[float]) -> float:
    """Mean absolute error of the best constant answer, the median."""
    x = np.asarray(seconds, dtype=np.float64)
    return float(np.abs(x - np.median(x)).mean())


def ranks(scores: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Rank (1 = first) of each query's best own item; ties with others count against it.

    Args:
        scores: ``(n, m)`` of n queries and m items. own: ``(n, m)`` bool, the items that are right; one at least.
    """
    best = np.where(own, scores, -np.inf).max(1, keepdims=True)
    return 1 + ((scores >= best) & ~own).sum(1)


def edit_distance(answer: Sequence[str], reference: Sequence[str]) -> int:
    """Return the fewest words to insert, delete or replace that make one sequence the other (Levenshtein 1966)."""
    row = list(range(len(reference) + 1))  # distances of the words of the answer so far to each beginning
    for count, word in enumerate(answer, start=1):
        before, row = row, [count]
        for place, expected in enumerate(reference):
            replaced = before[place] + (word != expected)
            row.append(min(replaced, before[place + 1] + 1, row[place] + 1))
    return row[-1]


def corpus_bleu(answers: Sequence[str], references: Sequence[Sequence[str]], longest: int = 4) -> float:
    """Return BLEU over a corpus (Papineni et al. 2002): clipped n-gram precisions, without smoothing.

    Args:
        answers: one a row. references: one or several a row.
        longest: n of the longest n-grams.
    """
    hits, counts = [0] * longest, [0] * longest
    said = expected = 0
    for answer, texts in zip(answers, references, strict=True):
        given, targets = words(answer), [words(text) for text in texts]
        said += len(given)
        expected += min((abs(len(t) - len(given)), len(t)) for t in targets)[1]  # the nearest length, the shorter first
        for n in range(1, longest + 1):
            grams = _ngrams(given, n)
            most: Counter[tuple[str, ...]] = Counter()
            for target in targets:
                most |= _ngrams(target, n)
            hits[n - 1] += (grams & most).total()
            counts[n - 1] += grams.total()
    if not all(hits):
        return 0.0
    precision = sum(math.log(h / c) for h, c in zip(hits, counts, strict=True)) / longest
    return math.exp(precision + min(0.0, 1.0 - expected / said))


def _ngrams(text: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))
