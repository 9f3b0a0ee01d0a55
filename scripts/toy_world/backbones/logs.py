"""What happens in a clip as text: a log written from its script. An entry is a list of words for one position."""

from __future__ import annotations

import math
from typing import Any

SECONDS = 0.25  # of a log's entry
CELLS, CELL = 4, 24  # a log's picture has 4 x 4 places of 24 x 24 pixels
LOG_WORDS = ["sees", "hears", "nothing", "end", "pulse", "clicks", "moves"]


def entries(script: dict[str, Any]) -> dict[str, list[list[str]]]:
    """What each stream of a clip says in each quarter of a second: words by stream and step."""
    steps = max(1, math.ceil(script["duration"] / SECONDS - 1e-6))
    log = {}
    if script["objects"]:
        log["grid"] = [place(script, row, column) for row in range(CELLS) for column in range(CELLS)]
        log["video"] = [seen(script, i * SECONDS) for i in range(steps)]
    if script["form"] in ("av", "silent", "wav"):
        log["audio"] = [heard(script, i * SECONDS) for i in range(steps)]
    return log


def within(time: float | None, start: float) -> bool:
    """Whether an event falls into the step that begins at `start`."""
    return time is not None and start <= time < start + SECONDS


def clock(start: float, times: list[float | None]) -> list[str]:
    """When an entry is, in the words that an answer says it in: the time of what happens in it, or else its start."""
    whole, tenth = f"{next((t for t in times if within(t, start)), start):.1f}".split(".")  # type: ignore[arg-type]
    return [whole, "." + tenth]


def place(script: dict[str, Any], row: int, column: int) -> list[str]:
    """What is to be found at a place of the picture at some time of the clip."""
    words = []
    for number, thing in enumerate(script["objects"]):
        reach = CELL / 2 + 4
        if any(
            on and abs(x - (column + 0.5) * CELL) < reach and abs(y - (row + 0.5) * CELL) < reach
            for x, y, on in zip(thing["x"], thing["y"], thing["visible"], strict=True)
        ):
            words += [*look(thing), *["moves"] * (number == 0)]
    return words or ["nothing"]


def look(thing: dict[str, Any]) -> list[str]:
    """What a thing looks like, as far as there are names for it."""
    return [thing[key] for key in ("shape", "colour", "size") if thing[key]]


def seen(script: dict[str, Any], start: float) -> list[str]:
    """The picture's entry: the things that are there, where the moving one goes and what happens to it."""
    events, things = script["events"], script["objects"]
    frame = min(round(start * script["fps"]) + 1, len(things[0]["visible"]) - 1)
    there = [t for t in things if t["visible"][frame]]
    words = ["sees", *["nothing"] * (not there)]
    words += clock(start, [events["appears"] or None, *events["bounces"], events["vanishes"]])
    for thing in there:
        words += look(thing)
    if script["direction"] and things[0]["visible"][frame]:
        words += ["moves", script["direction"]]
    words += ["bounce", "bounces"] * any(within(t, start) for t in events["bounces"])
    words += ["thing", "appear", "appears"] * (events["appears"] > 0 and within(events["appears"], start))
    return words + ["vanishes"] * within(events["vanishes"], start)


def heard(script: dict[str, Any], start: float) -> list[str]:
    """The sound's entry: the sound that is on, its start, its pulses, and clicks."""
    words = ["hears"]
    for sound in script["sounds"]:
        if sound["start"] < start + SECONDS and sound["end"] > start:
            words += ["sound", sound["kind"], *filter(None, [sound["pitch"]])]
        words += ["pulse", "pulses"] * any(within(t, start) for t in sound["pulses"])
        words += ["start", "starts"] * within(sound["start"], start) + ["end", "ends"] * within(sound["end"], start)
    words += ["click", "clicks"] * any(within(t, start) for t in script["clicks"])
    words += ["nothing"] * (len(words) == 1)
    sounds = script["sounds"]
    return words + clock(start, [*(s["start"] for s in sounds), *script["clicks"], *(s["end"] for s in sounds)])


def facts(script: dict[str, Any]) -> dict[str, list[str]]:
    """The whole clip, one entry a fact, by the kind of question that it answers."""
    found = facts_seen(script) if script["objects"] else {}
    for sound in script["sounds"]:
        found["heard.kind"] = ["sound", "kind", sound["kind"]]
        found |= {"heard.pitch": ["sound", "pitch", sound["pitch"]]} if sound["pitch"] else {}
        found["when.sound"] = ["sound", "start", "second", *clock(sound["start"], [])]
        found |= {"heard.pulses": ["pulses", str(len(sound["pulses"]))]} if sound["kind"] == "pulse" else {}
    if script["form"] == "av":
        silent = len(set(script["events"]["bounces"]) - set(script["clicks"]))
        found["both.silent"] = ["silent", "bounces", str(silent)]
        found["both.sync"] = ["click", "each", "bounce", "no" if silent else "yes"]
        if script["sounds"]:
            early = script["sounds"][0]["start"] < script["events"]["appears"]
            found["both.first"] = ["first", "sound" if early else "thing"]
    return found


def facts_seen(script: dict[str, Any]) -> dict[str, list[str]]:
    """What the picture tells."""
    things, events = script["objects"], script["events"]
    found = {"seen.number": ["things", "number", str(len(things))]}
    found["seen.bounces"] = ["bounces", "bounce", str(len(events["bounces"]))]
    if len(things) == 1:
        found |= {
            f"seen.{key}": ["thing", key, things[0][key]] for key in ("colour", "shape", "size") if things[0][key]
        }
    if script["direction"]:
        found["seen.direction"] = ["moving", "thing", "way", "direction", script["direction"]]
    if events["appears"]:
        found["when.thing"] = ["moving", "thing", "appear", "second", *clock(events["appears"], [])]
    return found
