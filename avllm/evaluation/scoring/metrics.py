"""Compute figures of merit: pure functions of answers and truths, tested by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from avllm.evaluation.scoring.words import normalise, words


class Interval(NamedTuple):
    """A figure's lower and upper end."""

    low: float
    high: float


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Return whether the normalised answer is one of the normalised references."""
    return normalise(answer) in {normalise(r) for r in references}


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Return the harmonic mean of word precision and recall against the best reference.

    As in SQuAD (arXiv 1606.05250); of characters in scripts without spaces, as in CMRC 2018 (arXiv
    1810.07366).
    """
    return max(_f1(words(answer), words(reference)) for reference in references)


def _f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = (Counter(answer) & Counter(reference)).total()
    return 2 * common / (len(answer) + len(reference))


def wilson(hits: int, n: int, z: float = 1.959964) -> Interval:
    """Return the 95% interval of a proportion (Wilson 1927).

    It never lies outside 0 to 1, and is sound at 0 and at all of n.

    Raises:
        ValueError: no observations, or more hits than those.
    """
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"{hits} hits of {n}; expected 0 <= hits <= n and n > 0")
    share = hits / n
    spread = z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def bootstrap_mean(values: Sequence[float], seed: int = 0, draws: int = 2000) -> Interval:
    """Return the 95% interval of a mean: percentiles over ``draws`` resamples (Efron 1979).

    It is the same for the same seed.

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
    """Return the accuracy of the one answer that is right most often."""
    counts = Counter(normalise(truth) for truth in truths)
    return max(counts.values()) / len(truths)


def constant_error(seconds: Sequence[float]) -> float:
    """Return the mean absolute error of the best constant answer, the median."""
    x = np.asarray(seconds, dtype=np.float64)
    return float(np.abs(x - np.median(x)).mean())


def ranks(scores: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Return the rank (1 = first) of each query's best right item; ties count against it.

    Args:
        scores: ``(n, m)`` of n queries and m items.
        own: ``(n, m)`` bool, the items that are right, at least one a query.
    """
    best = np.where(own, scores, -np.inf).max(1, keepdims=True)
    return 1 + ((scores >= best) & ~own).sum(1)


def edit_distance(answer: Sequence[str], reference: Sequence[str]) -> int:
    """Return the fewest words to insert, delete or replace to make one sequence of the other.

    Levenshtein 1966, row by row: entry k is the distance of the answer's words so far to the first
    k words of the reference.
    """
    row = list(range(len(reference) + 1))
    for count, word in enumerate(answer, start=1):
        before = row
        row = [count]
        for place, expected in enumerate(reference):
            replaced = before[place] + (word != expected)
            deleted = before[place + 1] + 1
            inserted = row[place] + 1
            row.append(min(replaced, deleted, inserted))
    return row[-1]


def corpus_bleu(
    answers: Sequence[str], references: Sequence[Sequence[str]], longest: int = 4
) -> float:
    """Return BLEU over a corpus (Papineni et al. 2002): clipped n-gram precisions, unsmoothed.

    Args:
        answers: one a row. references: one or several a row.
        longest: n of the longest n-grams.
    """
    hits = [0] * longest  # n-grams of the answers that a reference has, by n - 1
    counts = [0] * longest  # n-grams of the answers
    answer_words = 0
    reference_words = 0
    for answer, texts in zip(answers, references, strict=True):
        said = words(answer)
        targets = [words(text) for text in texts]
        answer_words += len(said)
        reference_words += _nearest_length(len(said), [len(target) for target in targets])
        for n in range(1, longest + 1):
            grams = _ngrams(said, n)
            most: Counter[tuple[str, ...]] = Counter()
            for target in targets:
                most |= _ngrams(target, n)
            hits[n - 1] += (grams & most).total()
            counts[n - 1] += grams.total()
    if not all(hits):
        return 0.0
    logs = [math.log(hit / count) for hit, count in zip(hits, counts, strict=True)]
    brevity = min(0.0, 1.0 - reference_words / answer_words)
    return math.exp(sum(logs) / longest + brevity)


def _nearest_length(length: int, lengths: Sequence[int]) -> int:
    """Return the one of ``lengths`` that is nearest; of two that are as near the shorter."""
    return min(lengths, key=lambda other: (abs(other - length), other))


def _ngrams(text: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))
