"""Summarise the quickstart's figures, and compare them with their bars.

The bars were set on other worlds and splits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

STREAM_OF = {"seen": "video", "heard": "audio"}
"""The stream that a kind of question is about."""
BARS: dict[str, float] = {
    "seen.colour": 0.98,
    "seen.shape": 0.98,
    "seen.size": 0.98,
    "seen.number": 0.98,
    "seen.named_colour": 0.90,
    "seen.direction": 0.85,
    "seen.bounces": 0.85,
    "heard.kind": 0.97,
    "heard.pitch": 0.97,
    "heard.pulses": 0.90,
    "both.first": 0.92,
    "both.sync": 0.85,
    "both.silent": 0.85,
    "when.sound": 0.15,
    "when.thing": 0.25,
    "unanswerable": 0.97,
}
"""The share of right answers to reach, or seconds of mean absolute error for times."""
MOST_REFUSED = 0.01  # of the answerable questions
SWAPPED_OFF_CHANCE = 0.05
REMOVED_REFUSED = 0.95
GAIN_OF_BOTH = 0.2
UNSEEN_LOSS = 0.08
RETRIEVAL_R1 = 0.6
MOST_SECONDS = 600
MOST_MEGABYTES = 6144


def read(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def rounded(value: Any) -> float:
    """Return a figure with four decimals."""
    return round(float(value), 4)


def main_figure(row: dict[str, Any] | None) -> float | None:
    """Return the accuracy, or the mean absolute error of times; None where there is none."""
    if row is None:
        return None
    value = row.get("accuracy", row.get("mae_s"))
    return None if value is None else rounded(value)


def summarise(run: Path) -> dict[str, Any]:
    """Return the content of summary.json: seconds, memory, retrieval and figures of each kind."""
    figures = read(run / "evaluation" / "figures.json")
    journal = read(run / "journal.json")
    retrieval = figures["retrieval"]
    balance = read(run / "world" / "world.json")["balance"]
    return {
        "seconds": seconds_of_phases(journal, read(run / "stage_seconds.json")),
        "peak_memory_mb": journal["memory"]["peak_mb"],
        "retrieval_r1": rounded(retrieval["r1"]),
        "retrieval": retrieval,
        "kinds": kinds_of(figures["conditions"], balance),
        "turns": turns_of(figures["turns"]),
        "environment": figures["environment"],
    }


def seconds_of_phases(journal: dict[str, Any], stages: dict[str, float]) -> dict[str, float]:
    """Return the seconds of each phase; those of the training, of each stage."""
    spent = {name: float(phase["seconds"]) for name, phase in journal.items() if "seconds" in phase}
    # The time that the stages do not account for goes into loading the libraries.
    spent["training_start"] = round(spent.pop("training") - sum(stages.values()), 1)
    return spent | stages


def kinds_of(conditions: dict[str, Any], balance: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the figures of each kind of question.

    Args:
        conditions: results by condition.
        balance: the world's own check, by kind.
    """
    unseen = conditions["unseen"]["kinds"]
    kinds = {}
    for kind in conditions["as_is"]["kinds"]:
        row = figures_of(kind, conditions)
        row["unseen"] = main_figure(unseen.get(kind))
        row["blind"] = blind_figure(balance.get(kind, {}))
        kinds[kind] = row
    return kinds


def turns_of(figures_by_turn: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return n, accuracy, its interval and chance of the same questions as turn 1, 2 and 3."""
    turns = {}
    for turn, row in figures_by_turn.items():
        names = ("accuracy", "low", "high", "chance")
        turns[turn] = {"n": row["n"], **{name: rounded(row[name]) for name in names}}
    return turns


FIGURES = (
    "accuracy",
    "low",
    "high",
    "chance",
    "mae_s",
    "mae_low",
    "mae_high",
    "mae_chance",
    "refused",
)


def figures_of(kind: str, conditions: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one kind under all conditions; ``refused`` are shares of refusals."""
    as_is = conditions["as_is"]["kinds"][kind]
    row: dict[str, Any] = {"n": as_is["n"]}
    for name in FIGURES:
        if name in as_is:
            row[name] = rounded(as_is[name])
    for condition in ("without_audio", "without_video", "swapped_audio", "swapped_video"):
        changed = conditions[condition]["kinds"].get(kind)
        row[condition] = main_figure(changed)
        for name in ("low", "high", "refused"):
            row[f"{condition}_{name}"] = None
        if changed is not None:
            row[f"{condition}_low"] = changed.get("low", changed.get("mae_low"))
            row[f"{condition}_high"] = changed.get("high", changed.get("mae_high"))
            row[f"{condition}_refused"] = rounded(changed["refused"])
    return row


def blind_figure(balance: dict[str, Any]) -> Any:
    """Return the figure of the best guesser without any media, from the world's own check."""
    return balance.get("blind_mae_s", balance.get("blind", {}).get("accuracy"))


def holds(kind: str, row: dict[str, Any]) -> bool | None:
    """Return whether the bar on the test split is reached; None where there is none."""
    if kind not in BARS:
        return None
    if "mae_s" in row:
        return row["mae_s"] <= BARS[kind]
    return row["accuracy"] >= BARS[kind]


CHANGES = {
    "without_audio": "no audio",
    "without_video": "no video",
    "swapped_audio": "audio swapped",
    "swapped_video": "video swapped",
    "unseen": "unseen",
}
MARKS = {True: "[green]yes", False: "[red]no", None: ""}


def percent(value: float | None) -> str:
    """Return a share for people."""
    return "" if value is None else f"{100 * value:.1f}"


def seconds(value: float | None) -> str:
    """Return a time for people."""
    return "" if value is None else f"{value:.2f} s"


def table(summary: dict[str, Any]) -> Table:
    """Return the figures for the terminal."""
    figures = Table(
        title="Test split, generated answers", title_justify="left", header_style="bold"
    )
    for column in ("", "n", "figure", "95%", "bar", "", "chance", "blind", *CHANGES.values()):
        figures.add_column(column, justify="right" if column else "left")
    for kind, row in summary["kinds"].items():
        figures.add_row(*cells(kind, row))
    return figures


def cells(kind: str, row: dict[str, Any]) -> list[str]:
    """Return the cells of one kind of question."""
    if "mae_s" in row:
        show = seconds
        relation = "<="
        figure, low, high, chance = (row[f"mae_{name}"] for name in ("s", "low", "high", "chance"))
    else:
        show = percent
        relation = ">="
        figure, low, high, chance = (row[name] for name in ("accuracy", "low", "high", "chance"))
    bar = f"{relation} {show(BARS[kind])}" if kind in BARS else ""
    changed = [show(row[name]) for name in CHANGES]
    interval = f"{show(low)}-{show(high)}"
    mark = MARKS[holds(kind, row)]
    return [
        kind,
        str(row["n"]),
        show(figure),
        interval,
        bar,
        mark,
        show(chance),
        show(row["blind"]),
        *changed,
    ]


@dataclass(frozen=True)
class Bar:
    """A bar that is no single cell of the table: whether it is reached, and the figure in words."""

    reached: bool
    text: str


def bars(summary: dict[str, Any]) -> list[Bar]:
    """Return the bars that are no single cell of the table."""
    kinds = summary["kinds"]
    answerable = {kind: row for kind, row in kinds.items() if kind != "unanswerable"}
    changed = [
        stream_bar(kind, row, STREAM_OF[kind.split(".")[0]])
        for kind, row in answerable.items()
        if kind.split(".")[0] in STREAM_OF
    ]
    both = [both_bar(kind, kinds[kind]) for kind in ("both.sync", "both.silent") if kind in kinds]
    return [
        refusal_bar(answerable),
        *changed,
        *both,
        *unseen_bars(kinds),
        turn_bar(summary["turns"]),
        retrieval_bar(summary["retrieval"]),
        time_bar(summary["seconds"]),
        memory_bar(summary["peak_memory_mb"]),
    ]


def refusal_bar(answerable: dict[str, dict[str, Any]]) -> Bar:
    """Return the bar of questions that were refused though they can be answered."""
    count = sum(row["n"] for row in answerable.values())
    refused = sum(row["refused"] * row["n"] for row in answerable.values()) / count
    text = f"answerable questions refused: {refused:.2%} (bar: <= {MOST_REFUSED:.0%})"
    return Bar(refused <= MOST_REFUSED, text)


def stream_bar(kind: str, row: dict[str, Any], stream: str) -> Bar:
    """Return the bar of a kind whose one stream is exchanged, or removed."""
    swapped = row[f"swapped_{stream}"]
    refused = row[f"without_{stream}_refused"]
    chance = row["chance"]
    reached = abs(swapped - chance) <= SWAPPED_OFF_CHANCE and refused >= REMOVED_REFUSED
    if_swapped = (
        f"{stream} swapped: {percent(swapped)} (chance {percent(chance)}, bar: within 5 points)"
    )
    if_removed = f"removed: {percent(refused)} refused (bar: >= 95)"
    return Bar(reached, f"{kind}, {if_swapped}; {if_removed}")


def both_bar(kind: str, row: dict[str, Any]) -> Bar:
    """Return how far a kind that needs both streams is above the better of the two exchanges."""
    best = max(("swapped_audio", "swapped_video"), key=lambda condition: row[condition])
    gain = row["accuracy"] - row[best]
    is_apart = row["low"] > row[f"{best}_high"]
    above = f"{kind}: {percent(gain)} points above {CHANGES[best]} (bar: >= 20)"
    intervals = "apart" if is_apart else "overlap"
    return Bar(gain >= GAIN_OF_BOTH and is_apart, f"{above}, intervals {intervals}")


def unseen_bars(kinds: dict[str, dict[str, Any]]) -> list[Bar]:
    """Return the bar of combinations that training never showed; none without such questions."""
    lost = {
        kind: row["accuracy"] - row["unseen"]
        for kind, row in kinds.items()
        if "accuracy" in row and row["unseen"] is not None
    }
    if not lost:
        return []
    worst = sorted(lost, key=lost.__getitem__)[:-4:-1]  # three kinds, the worst first
    figures = ", ".join(f"{kind} {percent(lost[kind])}" for kind in worst)
    what = "never-seen combinations, points below the test figure"
    reached = max(lost.values()) <= UNSEEN_LOSS
    return [Bar(reached, f"{what}: {figures} (bar: <= 8 in every kind)")]


def turn_table(summary: dict[str, Any]) -> Table:
    """Return the figures by turn for the terminal."""
    figures = Table(
        title="The same questions by turn of a conversation",
        title_justify="left",
        header_style="bold",
    )
    for column in ("turn", "n", "figure", "95%", "chance"):
        figures.add_column(column, justify="right" if column != "turn" else "left")
    for turn, row in summary["turns"].items():
        accuracy, low, high, chance = (
            percent(row[name]) for name in ("accuracy", "low", "high", "chance")
        )
        figures.add_row(turn, str(row["n"]), accuracy, f"{low}-{high}", chance)
    return figures


def turn_bar(turns: dict[str, dict[str, Any]]) -> Bar:
    """Return the bar of later turns: as good as the first within its interval."""
    first = turns["1"]
    last = turns[max(turns)]
    figures = f"turn {max(turns)} {percent(last['accuracy'])}, turn 1 {percent(first['accuracy'])}"
    text = f"questions in a conversation: {figures} (bar: >= {percent(first['low'])})"
    return Bar(last["accuracy"] >= first["low"], text)


def retrieval_bar(retrieval: dict[str, Any]) -> Bar:
    """Return the bar of text-to-clip retrieval."""
    figure = f"R@1 among {retrieval['n']}: {percent(retrieval['r1'])} (bar: >= 60)"
    return Bar(retrieval["r1"] >= RETRIEVAL_R1, f"text-to-clip retrieval, {figure}")


def time_bar(spent: dict[str, float]) -> Bar:
    """Return the bar of the time after the installation."""
    total = sum(value for name, value in spent.items() if name != "install")
    text = f"{total:.0f} s after the installation (bar: <= {MOST_SECONDS})"
    return Bar(total <= MOST_SECONDS, text)


def memory_bar(megabytes: float) -> Bar:
    """Return the bar of the largest memory."""
    return Bar(megabytes <= MOST_MEGABYTES, f"{megabytes} MB of memory (bar: <= {MOST_MEGABYTES})")


LEGEND = (
    "bar: what it should reach; chance: guessing among the answers; blind: the best guess without "
    "the clip; swapped: with that stream of another clip; unseen: combinations that training never "
    "showed"
)


def remarks(summary: dict[str, Any]) -> list[str]:
    """Return the legend of the columns, the bars outside of the table, and the missed bars."""
    others = bars(summary)
    missed = [kind for kind, row in summary["kinds"].items() if holds(kind, row) is False]
    missed += [bar.text for bar in others if not bar.reached]
    lines = [f"{'yes' if bar.reached else 'no '}  {bar.text}" for bar in others]
    return [LEGEND, *lines, f"bars that are missed: {'; '.join(missed) or 'none'}"]
