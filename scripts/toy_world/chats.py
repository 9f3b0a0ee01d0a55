"""Join questions about one clip to conversations of two and three turns.

Two questions go into one conversation only when neither answer, nor that the question is asked at
all, says anything about the other's answer: how many bounces there are says whether all of them
have a click, and whoever asks for the colour of the thing has seen that it is one thing.
"""

from collections import Counter, defaultdict
from itertools import groupby
from typing import Any

import numpy as np
from questions import CHOICES, REFUSAL
from scripting import SPLITS

TURNS = {1: 0.4, 2: 0.25, 3: 0.35}
"""Shares of conversations by the turns that are tried; fewer where no question fits."""
ASKED_BY_TURN = 240
"""Test questions that are also asked as second and as third turn."""
FACT = {
    "seen.colour": "things",
    "seen.shape": "things",
    "seen.size": "things",
    "seen.number": "things",
    "seen.named_colour": "things",
    "seen.direction": "path",
    "when.thing": "path",
    "both.first": "path",
    "seen.bounces": "bounces",
    "both.sync": "bounces",
    "both.silent": "bounces",
    "heard.kind": "sound",
    "heard.pitch": "sound",
    "heard.pulses": "sound",
    "when.sound": "sound",
}
"""The fact of the clip that a kind of question is about; different facts are drawn apart."""
Row = dict[str, Any]


def fits(row: Row, others: list[Row]) -> bool:
    """Return whether a question says nothing about the others of its conversation, and they not.

    One question that cannot be answered shows that a stream is missing, so there is one at most.
    """
    facts = {FACT[other["meta"]["asked"]] for other in others}
    refused = [other["kind"] for other in [*others, row]].count(REFUSAL)
    return FACT[row["meta"]["asked"]] not in facts and refused <= 1


def conversations(rows: list[Row], split: str, seed: int) -> list[list[Row]]:
    """Deal the questions of a split out to conversations; each is asked once.

    Args:
        rows: as :func:`questions.question_rows` returns them, those of a clip side by side and in
            random order.
        split: for the random numbers.
        seed: of the world.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), 7])
    dealt = []
    for _, of_clip in groupby(rows, key=lambda row: row["meta"]["clip"]):
        remaining = list(of_clip)
        while remaining:
            turns = int(rng.choice(list(TURNS), p=list(TURNS.values())))
            dealt.append(take(remaining, turns))
    return dealt


def take(remaining: list[Row], turns: int) -> list[Row]:
    """Remove the first question and those that fit to it, up to some turns, and return them."""
    taken = [remaining.pop(0)]
    for row in list(remaining):
        if len(taken) < turns and fits(row, taken):
            remaining.remove(row)
            taken.append(row)
    return taken


def chat_row(turns: list[Row], number: int) -> Row:
    """Return one conversation in the manifest's form; it is scored by its last answer.

    A single question keeps its row. ``meta.last`` is the id of the last question's own row.
    """
    if len(turns) == 1:
        return turns[0]
    last = turns[-1]
    messages = list(turns[0]["messages"])
    for row in turns[1:]:
        question, answer = row["messages"]
        messages += [{**question, "content": question["content"][1:]}, answer]  # without the clip
    meta = {**last["meta"], "turn": len(turns), "last": last["id"]}
    return {
        **last,
        "id": f"toy-{last['meta']['clip']}-c{number}",
        "messages": messages,
        "meta": meta,
    }


def training_chats(rows: list[Row], split: str, seed: int) -> list[Row]:
    """Return the questions of a split as conversations, those of a clip side by side."""
    return [chat_row(turns, n) for n, turns in enumerate(conversations(rows, split, seed))]


def held_out_chats(rows: list[Row], split: str, seed: int) -> list[Row]:
    """Return the same questions as second and as third turn, each after questions that fit.

    One question a clip at most, the kinds as equally frequent as the clips allow. Questions for
    times are left out, since their answers are not right or wrong.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), 8])
    by_clip = [list(group) for _, group in groupby(rows, key=lambda row: row["meta"]["clip"])]
    used: Counter[str] = Counter()
    chats: list[Row] = []
    for place in rng.permutation(len(by_clip)):
        candidates = {}
        for last in by_clip[place]:
            earlier = earlier_turns(last, by_clip[place])
            if len(earlier) == 2 and (last["kind"] in CHOICES or last["kind"] == REFUSAL):
                candidates.setdefault(last["kind"], [*earlier, last])
        if candidates and len(chats) < 2 * ASKED_BY_TURN:
            kind = min(candidates, key=lambda kind: used[kind])
            used[kind] += 1
            turns = candidates[kind]
            chats += [chat_row(turns[1:], len(chats)), chat_row(turns, len(chats) + 1)]
    return chats


def earlier_turns(last: Row, of_clip: list[Row]) -> list[Row]:
    """Return up to two questions about the clip that fit to the last one and to each other."""
    earlier: list[Row] = []
    for row in of_clip:
        if row is not last and len(earlier) < 2 and fits(row, [*earlier, last]):
            earlier.append(row)
    return earlier


def count_turns(rows: list[Row]) -> dict[str, int]:
    """Return how many rows have each number of turns."""
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        counts[str(len(row["messages"]) // 2)] += 1
    return dict(sorted(counts.items()))
