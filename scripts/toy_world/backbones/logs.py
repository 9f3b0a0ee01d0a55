"""Write a log of what happens in a clip, from its script.

An entry is a list of words for one position.
"""

from __future__ import annotations

import math
from typing import Any

SECONDS = 0.25  # of a log's entry
CELLS = 4  # a log's picture has 4 x 4 places
CELL = 24  # pixels of a place's side
LOG_WORDS = ["sees", "hears", "nothing", "end", "pulse", "clicks", "moves"]


def entries(script: dict[str, Any]) -> dict[str, list[list[str]]]:
    """Return the words of each quarter of a second, by stream, and of each place of the grid."""
    steps = max(1, math.ceil(script["duration"] / SECONDS - 1e-6))
    log = {}
    if script["objects"]:
        log["grid"] = [
            place(script, row, column) for row in range(CELLS) for column in range(CELLS)
        ]
        log["video"] = [seen(script, i * SECONDS) for i in range(steps)]
    if script["form"] in ("av", "silent", "wav"):
        log["audio"] = [heard(script, i * SECONDS) for i in range(steps)]
    return log


def within(time: float | None, start: float) -> bool:
    """Return whether an event falls into the step that begins at `start`."""
    return time is not None and start <= time < start + SECONDS


def clock(start: float, times: list[float | None]) -> list[str]:
    """Return the time of an entry, in the words of an answer.

    It is the time of the first event within the entry, or else the entry's start.
    """
    inside = [time for time in times if time is not None and within(time, start)]
    time = inside[0] if inside else start
    whole, tenth = f"{time:.1f}".split(".")
    return [whole, "." + tenth]


def place(script: dict[str, Any], row: int, column: int) -> list[str]:
    """Return the words of the things that are at a place of the picture at some time."""
    words = []
    for number, thing in enumerate(script["objects"]):
        if comes_to(thing, row, column):
            words += look(thing)
            if number == 0:
                words.append("moves")
    return words or ["nothing"]


def comes_to(thing: dict[str, Any], row: int, column: int) -> bool:
    """Return whether a thing is visible near the middle of a place in any frame."""
    reach = CELL / 2 + 4
    middle_x = (column + 0.5) * CELL
    middle_y = (row + 0.5) * CELL
    for x, y, visible in zip(thing["x"], thing["y"], thing["visible"], strict=True):
        if visible and abs(x - middle_x) < reach and abs(y - middle_y) < reach:
            return True
    return False


def look(thing: dict[str, Any]) -> list[str]:
    """Return shape, colour and size of a thing, as far as they have names."""
    return [thing[key] for key in ("shape", "colour", "size") if thing[key]]


def seen(script: dict[str, Any], start: float) -> list[str]:
    """Return the picture's entry: its things, where the moving one goes, what happens to it."""
    events = script["events"]
    things = script["objects"]
    frame = min(round(start * script["fps"]) + 1, len(things[0]["visible"]) - 1)
    there = [t for t in things if t["visible"][frame]]
    words = ["sees", *["nothing"] * (not there)]
    words += clock(start, [events["appears"] or None, *events["bounces"], events["vanishes"]])
    for thing in there:
        words += look(thing)
    if script["direction"] and things[0]["visible"][frame]:
        words += ["moves", script["direction"]]
    words += ["bounce", "bounces"] * any(within(t, start) for t in events["bounces"])
    words += ["thing", "appear", "appears"] * (
        events["appears"] > 0 and within(events["appears"], start)
    )
    return words + ["vanishes"] * within(events["vanishes"], start)


def heard(script: dict[str, Any], start: float) -> list[str]:
    """Return the sound's entry: the sound that is on, its start, its pulses, and clicks."""
    words = ["hears"]
    for sound in script["sounds"]:
        if sound["start"] < start + SECONDS and sound["end"] > start:
            words += ["sound", sound["kind"], *filter(None, [sound["pitch"]])]
        words += ["pulse", "pulses"] * any(within(t, start) for t in sound["pulses"])
        words += ["start", "starts"] * within(sound["start"], start)
        words += ["end", "ends"] * within(sound["end"], start)
    words += ["click", "clicks"] * any(within(t, start) for t in script["clicks"])
    words += ["nothing"] * (len(words) == 1)
    sounds = script["sounds"]
    starts = [sound["start"] for sound in sounds]
    ends = [sound["end"] for sound in sounds]
    return words + clock(start, [*starts, *script["clicks"], *ends])


def facts(script: dict[str, Any]) -> dict[str, list[str]]:
    """Return the whole clip, one entry a fact, by the kind of question that it answers."""
    entry_by_kind = facts_seen(script) if script["objects"] else {}
    for sound in script["sounds"]:
        entry_by_kind["heard.kind"] = ["sound", "kind", sound["kind"]]
        if sound["pitch"]:
            entry_by_kind["heard.pitch"] = ["sound", "pitch", sound["pitch"]]
        entry_by_kind["when.sound"] = ["sound", "start", "second", *clock(sound["start"], [])]
        if sound["kind"] == "pulse":
            entry_by_kind["heard.pulses"] = ["pulses", str(len(sound["pulses"]))]
    if script["form"] == "av":
        entry_by_kind |= facts_of_both(script)
    return entry_by_kind


def facts_of_both(script: dict[str, Any]) -> dict[str, list[str]]:
    """Return the facts that picture and sound give together."""
    silent = len(set(script["events"]["bounces"]) - set(script["clicks"]))
    entry_by_kind = {
        "both.silent": ["silent", "bounces", str(silent)],
        "both.sync": ["click", "each", "bounce", "no" if silent else "yes"],
    }
    if script["sounds"]:
        early = script["sounds"][0]["start"] < script["events"]["appears"]
        entry_by_kind["both.first"] = ["first", "sound" if early else "thing"]
    return entry_by_kind


def facts_seen(script: dict[str, Any]) -> dict[str, list[str]]:
    """Return the facts that the picture gives."""
    things = script["objects"]
    events = script["events"]
    entry_by_kind = {
        "seen.number": ["things", "number", str(len(things))],
        "seen.bounces": ["bounces", "bounce", str(len(events["bounces"]))],
    }
    if len(things) == 1:
        for feature in ("colour", "shape", "size"):
            value = things[0][feature]
            if value:
                entry_by_kind[f"seen.{feature}"] = ["thing", feature, value]
    if script["direction"]:
        direction = script["direction"]
        entry_by_kind["seen.direction"] = ["moving", "thing", "way", "direction", direction]
    if events["appears"]:
        second = clock(events["appears"], [])
        entry_by_kind["when.thing"] = ["moving", "thing", "appear", "second", *second]
    return entry_by_kind
