"""Measure how much of a later turn's answer can be guessed from a turn before it.

All pairs of questions that may follow each other in a conversation are judged, kind by kind: what
is guessed is the majority answer (of times the median) after each earlier answer, fitted on the
training split. That the earlier question was asked at all is part of it.
"""

from collections import defaultdict
from itertools import groupby, permutations
from typing import Any

import chats
import numpy as np
from balance import answer_of, majority_guess, most_right, seconds_of, share_right
from questions import CHOICES, REFUSAL, WORDINGS

FEWEST = 20  # pairs of each split by which two kinds of questions are judged
Pair = tuple[chats.Row, chats.Row]
"""An earlier question and a later one about the same clip."""
Pairs = dict[str, list[Pair]]
"""Pairs by split."""


def pairs_of(rows: list[chats.Row]) -> list[Pair]:
    """Return all pairs of questions of a split that may follow each other."""
    pairs = []
    for _, of_clip in groupby(rows, key=lambda row: row["meta"]["clip"]):
        ordered = permutations(of_clip, 2)
        pairs += [(before, row) for before, row in ordered if chats.fits(row, [before])]
    return pairs


def add_later_turns(report: dict[str, dict], questions: dict[str, list[chats.Row]]) -> None:
    """Add to a balance report, under ``earlier``, how well a later turn can be guessed at best.

    Args:
        report: of :func:`balance.balance_report`.
        questions: rows of the splits ``train`` and ``test``.
    """
    pairs = {split: pairs_of(rows) for split, rows in questions.items()}
    guesses: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for earlier in WORDINGS:
        after = {split: after_kind(earlier, pairs[split]) for split in pairs}
        for kind in WORDINGS:
            of_kind = {split: [p for p in after[split] if p[1]["kind"] == kind] for split in after}
            if are_enough(of_kind):
                guess = answer_guess if kind in CHOICES else time_guess
                guesses[kind].append(guess(earlier, of_kind))
        if are_enough(after):
            guesses[REFUSAL].append(refusal_guess(earlier, after))
    refused = {
        split: [pair for pair in pairs[split] if answer_of(pair[0]) == REFUSAL] for split in pairs
    }
    if are_enough(refused):
        guesses[REFUSAL].append(refusal_guess("any, which was refused,", refused))
    for kind, of_kind in guesses.items():
        report[kind]["earlier"] = max(of_kind, key=excess)


def after_kind(earlier: str, pairs: list[Pair]) -> list[Pair]:
    """Return the pairs whose earlier question is of a kind."""
    return [pair for pair in pairs if pair[0]["meta"]["asked"] == earlier]


def are_enough(pairs: Pairs) -> bool:
    """Return whether there are enough pairs in both splits to judge them."""
    return min(len(of_split) for of_split in pairs.values()) >= FEWEST


def answer_guess(earlier: str, pairs: Pairs) -> dict[str, Any]:
    """Return the guess of the later answer by the earlier one; chance is one of all choices."""
    keys = {split: [answer_of(before) for before, _ in pairs[split]] for split in pairs}
    truths = {split: [answer_of(row) for _, row in pairs[split]] for split in pairs}
    guessed = majority_guess(keys["train"], truths["train"], keys["test"])
    return {
        "guesser": f"majority by the answer to {earlier}",
        "accuracy": round(share_right(guessed, truths["test"]), 4),
        "chance": 1 / len(CHOICES[pairs["test"][0][1]["kind"]]),
        "n": len(guessed),
    }


def refusal_guess(earlier: str, pairs: Pairs) -> dict[str, Any]:
    """Return the guess by the earlier answer and both kinds whether the later one is refused.

    Chance never refuses, or always.
    """
    keys = {}
    truths = {}
    for split, of_split in pairs.items():
        keys[split] = [
            (before["meta"]["asked"], answer_of(before), row["meta"]["asked"])
            for before, row in of_split
        ]
        truths[split] = [str(answer_of(row) == REFUSAL) for _, row in of_split]
    guessed = majority_guess(keys["train"], truths["train"], keys["test"])
    refused = truths["test"].count("True") / len(guessed)
    return {
        "guesser": f"majority by the answer to {earlier}",
        "accuracy": round(share_right(guessed, truths["test"]), 4),
        "chance": round(max(refused, 1 - refused), 4),
        "n": len(guessed),
    }


def time_guess(earlier: str, pairs: Pairs) -> dict[str, Any]:
    """Return the guess of seconds by the earlier answer; blind is the median of all."""
    seconds = {split: seconds_of([row for _, row in pairs[split]]) for split in pairs}
    median = float(np.median(seconds["train"]))
    by_answer: dict[str, list[float]] = defaultdict(list)
    for (before, _), second in zip(pairs["train"], seconds["train"].tolist(), strict=True):
        by_answer[answer_of(before)].append(second)
    guessed = []
    for before, _ in pairs["test"]:
        after_answer = by_answer.get(answer_of(before), [median])
        guessed.append(float(np.median(after_answer)))
    return {
        "guesser": f"median by the answer to {earlier}",
        "mae_s": round(float(np.abs(guessed - seconds["test"]).mean()), 4),
        "blind_mae_s": round(float(np.abs(median - seconds["test"]).mean()), 4),
        "n": len(guessed),
    }


def excess(guess: dict[str, Any]) -> float:
    """Return by how much a guess is better than it may be; below 0 where it is not."""
    if "mae_s" in guess:
        return 1 - float(guess["mae_s"]) / float(guess["blind_mae_s"])
    return float(guess["accuracy"]) - most_right(guess["chance"], guess["n"], "earlier")
