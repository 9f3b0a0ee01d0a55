"""Write questions, answers and captions from the scripts.

They are balanced so that neither the words nor the clip's length give the answer away.
"""

import zlib
from collections import defaultdict

import numpy as np
from scripting import COLOURS, DIRECTIONS, KINDS, PITCHES, PULSES, SHAPES, SIZES, SPLITS

REFUSAL = "unanswerable"
CHOICES: dict[str, list[str]] = {
    "seen.colour": list(COLOURS),
    "seen.shape": list(SHAPES),
    "seen.size": list(SIZES),
    "seen.number": ["1", "2", "3", "4"],
    "seen.named_colour": list(COLOURS),
    "seen.direction": list(DIRECTIONS),
    "seen.bounces": ["0", "1", "2", "3"],
    "heard.kind": list(KINDS),
    "heard.pitch": list(PITCHES),
    "heard.pulses": [str(n) for n in PULSES],
    "both.first": ["sound", "thing"],
    "both.sync": ["yes", "no"],
    "both.silent": ["0", "1", "2"],
}
WORDINGS: dict[str, list[str]] = {
    "seen.colour": [
        "What colour is the thing?",
        "Which colour does the thing have?",
        "Name the colour of the thing.",
    ],
    "seen.shape": [
        "What shape is the thing?",
        "Which shape does the thing have?",
        "Name the shape of the thing.",
    ],
    "seen.size": [
        "What size is the thing?",
        "Which size does the thing have?",
        "Is the thing small or big?",
    ],
    "seen.number": [
        "How many things are there?",
        "What is the number of things?",
        "Count the things.",
    ],
    "seen.named_colour": [
        "What colour is the {slot}?",
        "Which colour does the {slot} have?",
        "Name the colour of the {slot}.",
    ],
    "seen.direction": [
        "Which way does the moving thing go?",
        "In which direction does the moving thing travel?",
        "Where does the moving thing head?",
    ],
    "seen.bounces": [
        "How many times does the moving thing bounce?",
        "How many bounces are there?",
        "Count the bounces.",
    ],
    "heard.kind": [
        "What kind of sound is it?",
        "Which kind of sound do you hear?",
        "Name the kind of sound.",
    ],
    "heard.pitch": [
        "How high is the sound?",
        "Which pitch does the sound have?",
        "Name the pitch of the sound.",
    ],
    "heard.pulses": [
        "How many pulses do you hear?",
        "What is the number of pulses?",
        "Count the pulses.",
    ],
    "both.first": [
        "What comes first, the sound or the thing?",
        "Which starts first, the thing or the sound?",
        "Does the sound or the thing come first?",
    ],
    "both.sync": [
        "Does a click come at each bounce?",
        "Is there a click at every bounce?",
        "Do all bounces have a click?",
    ],
    "both.silent": [
        "How many bounces are silent?",
        "How many bounces have no click?",
        "Count the silent bounces.",
    ],
    "when.sound": [
        "When does the sound start?",
        "At which second does the sound start?",
        "Give the start of the sound.",
    ],
    "when.thing": [
        "When does the moving thing appear?",
        "At which second does the moving thing appear?",
        "Give the second at which the moving thing appears.",
    ],
}
# Wordings a clip, in training only, of the kinds that fewest clips allow
REPEATS = {
    "seen.bounces": 2,
    "heard.pulses": 2,
    "both.first": 2,
    "both.sync": 2,
    "both.silent": 2,
    "when.thing": 2,
}
UNANSWERABLE_SHARE = 0.09  # of the answerable rows of each kind; half of it outside of training


def answers_of(clip: dict) -> list[tuple[str, str, str | None, tuple]]:
    """Return all well-posed (kind, answer, slot, cell); answers are balanced within a cell."""
    return [*seen_answers(clip), *heard_answers(clip), *both_answers(clip)]


def seen_answers(clip: dict) -> list[tuple[str, str, str | None, tuple]]:
    """Return the answers that the picture gives."""
    things = clip["objects"]
    events = clip["events"]
    if not things:
        return []
    rows: list[tuple] = [("seen.number", str(len(things)), None, ())]
    if len(things) == 1:
        thing = things[0]
        named = [feature for feature in ("colour", "shape", "size") if thing[feature]]
        rows += [(f"seen.{feature}", thing[feature], None, ()) for feature in named]
    else:
        for thing in things:
            shape = thing["shape"]
            colour = thing["colour"]
            if shape and colour:
                rows.append(("seen.named_colour", colour, shape, (shape, colour)))
    if clip["form"] == "jpg":
        return rows
    shown = (events["vanishes"] or clip["duration"]) - events["appears"]
    if shown >= 1.2:
        rows.append(("seen.direction", clip["direction"], None, ()))
    if clip["program"] == "bounce":
        rows.append(("seen.bounces", str(len(events["bounces"])), None, ()))
    if clip["program"] == "when":
        rows.append(("when.thing", f"{events['appears']:.1f}", None, ()))
    return rows


def heard_answers(clip: dict) -> list[tuple[str, str, str | None, tuple]]:
    """Return the answers that the sound gives.

    In the program `first`, the start is tied to the picture, so that no question asks for it.
    """
    rows = []
    for sound in clip["sounds"]:
        if sound["pitch"]:
            rows.append(("heard.pitch", sound["pitch"], None, ()))
        if clip["program"] != "first":  # there a late start leaves no room for many pulses
            rows.append(("heard.kind", sound["kind"], None, ()))
            rows.append(("when.sound", f"{sound['start']:.1f}", None, ()))
            if sound["kind"] == "pulse":
                rows.append(("heard.pulses", str(len(sound["pulses"])), None, ()))
    return rows


def both_answers(clip: dict) -> list[tuple[str, str, str | None, tuple]]:
    """Return the answers that only picture and sound together give."""
    if clip["form"] != "av":
        return []
    if clip["program"] == "first":
        early = clip["sounds"][0]["start"] < clip["events"]["appears"]
        return [("both.first", "sound" if early else "thing", None, ())]
    bounces = len(clip["events"]["bounces"])
    silent = clip["silent_bounces"]
    rows = []
    if bounces:
        rows.append(("both.sync", "no" if silent else "yes", None, (bounces,)))
    if bounces >= 2:
        rows.append(("both.silent", str(silent), None, (bounces,)))
    return rows


def balance(rows: list[dict], unseen: bool, rng: np.random.Generator) -> list[dict]:
    """Drop rows of one kind until every answer is equally frequent within every cell.

    Of times, nothing is dropped.
    """
    if not rows or rows[0]["kind"] not in CHOICES:
        return rows
    named = rows[0]["kind"] == "seen.named_colour"
    cells: dict = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if named:
            cells[()][row["cell"]].append(row)
        else:
            cells[row["cell"]][row["answer"]].append(row)
    balanced = []
    for cell in sorted(cells):
        n = min(len(v) for v in cells[cell].values())
        for answer in sorted(cells[cell]):
            group = cells[cell][answer]
            if unseen and named:
                balanced += group
            else:
                balanced += [group[i] for i in sorted(rng.permutation(len(group))[:n])]
    return balanced


def word(rows: list[dict], repeats: int, rng: np.random.Generator) -> list[dict]:
    """Deal the wordings out evenly within each (cell, answer), `repeats` of them a row."""
    groups = defaultdict(list)
    for row in rows:
        groups[(row["cell"], row["answer"] if row["kind"] in CHOICES else "")].append(row)
    worded = []
    for key in sorted(groups, key=str):
        offset = int(rng.integers(3))
        for i, j in enumerate(rng.permutation(len(groups[key]))):
            worded += [{**groups[key][j], "wording": (i + offset + k) % 3} for k in range(repeats)]
    return worded


def refusals(kind: str, n: int, clips: list[dict], rng: np.random.Generator) -> list[dict]:
    """Return `n` questions of `kind` to clips that lack a stream it asks about.

    Wordings and slots occur in equal numbers.
    """
    lacking = {"seen": ("wav",), "heard": ("mute", "jpg"), "both": ("mute", "jpg", "wav")}
    lacking |= {"when": ("wav",) if kind == "when.thing" else ("mute", "jpg")}
    without = [c["index"] for c in clips if c["form"] in lacking[kind.split(".")[0]]]
    slots = list(SHAPES) if kind == "seen.named_colour" else [None]
    # Turn after turn over the clips, each turn in the next wording.
    clips_by_wording: list[list[int]] = [[], [], []]
    for turn in range(3 * len(slots)):
        clips_by_wording[turn % 3] += rng.permutation(without).tolist()
    a_wording = -(-n // 3)  # rounded up
    chosen = []
    for trio in zip(*(indices[:a_wording] for indices in clips_by_wording), strict=True):
        chosen += enumerate(trio)
    chosen = chosen[:n]
    order = rng.permutation(len(chosen))
    rows = []
    for place, (wording, index) in enumerate(chosen):
        slot = slots[order[place] % len(slots)]
        row = {"clip": index, "kind": kind, "answer": REFUSAL, "slot": slot}
        rows.append({**row, "cell": (), "wording": wording})
    return rows


def question_rows(clips: list[dict], split: str, seed: int) -> list[dict]:
    """Return the manifest rows of one split, those of one clip side by side."""
    candidates = defaultdict(list)
    for clip in clips:
        for kind, answer, slot, cell in answers_of(clip):
            row = {
                "clip": clip["index"],
                "kind": kind,
                "answer": answer,
                "slot": slot,
                "cell": cell,
            }
            candidates[kind].append(row)
    rows = []
    for kind in WORDINGS:
        rng = np.random.default_rng([seed, SPLITS.index(split), 4, zlib.crc32(kind.encode())])
        balanced = balance(candidates[kind], split == "unseen", rng)
        repeats = REPEATS.get(kind, 1) if split == "train" else 1
        worded = word(balanced, repeats, rng)
        rows += worded
        share = UNANSWERABLE_SHARE if split == "train" else UNANSWERABLE_SHARE / 2
        rows += refusals(kind, round(share * len(worded)), clips, rng)
    rng = np.random.default_rng([seed, SPLITS.index(split), 5])
    rows = [rows[i] for i in rng.permutation(len(rows))]
    rows.sort(key=lambda r: r["clip"])
    count_of_clip: dict = defaultdict(int)
    samples = []
    for row in rows:
        clip = row["clip"]
        samples.append(manifest_row(row, clips[clip], count_of_clip[clip]))
        count_of_clip[clip] += 1
    return samples


def media_part(clip: dict) -> dict:
    """Return the media part of a message."""
    kind = {"wav": "audio", "jpg": "image"}.get(clip["form"], "video")
    return {"type": kind, kind: clip["file"]}


def manifest_row(row: dict, clip: dict, number: int) -> dict:
    """Return one question in the manifest's form."""
    text = WORDINGS[row["kind"]][row["wording"]].format(slot=row["slot"])
    refused = row["answer"] == REFUSAL
    sample = {
        "id": f"toy-{clip['id']}-q{number}",
        "source": "toy_world",
        "kind": REFUSAL if refused else row["kind"],
        "messages": [
            {"role": "user", "content": [media_part(clip), {"type": "text", "text": text}]},
            {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]},
        ],
    }
    if not refused and row["kind"] in CHOICES:
        sample["choices"] = CHOICES[row["kind"]]
    if not refused and row["kind"].startswith("when."):
        starts = {"when.thing": clip["events"]["appears"]}
        if clip["sounds"]:
            starts["when.sound"] = clip["sounds"][0]["start"]
        sample["seconds"] = round(starts[row["kind"]], 3)
    meta = {
        "clip": clip["id"],
        "form": clip["form"],
        "asked": row["kind"],
        "wording": row["wording"],
    }
    if row["slot"]:
        meta["slot"] = row["slot"]
    sample["meta"] = meta
    sample["licence"] = "CC0-1.0"
    return sample


def caption(clip: dict, rng: np.random.Generator) -> str:
    """Return the whole script in a few regular sentences; one of three ways of saying it."""
    style = int(rng.integers(3))
    parts = []
    if clip["objects"]:
        parts.append(caption_moving(clip, style))
        parts += [f"{caption_thing(thing)} stands still" for thing in clip["objects"][1:]]
    for sound in clip["sounds"]:
        starts, ends = SOUND_VERBS[style]
        name = caption_sound(sound)
        parts.append(f"a {name} {starts} {sound['start']:.1f} {ends} {sound['end']:.1f}")
    if clip["clicks"] and not clip["events"]["bounces"]:
        parts.append(f"clicks {', '.join(f'{t:.1f}' for t in clip['clicks'])}")
    if clip["form"] == "av" and style == 1:
        things = len(clip["objects"])
        parts = parts[things:] + parts[:things]
    return " ".join(p[0].upper() + p[1:] + "." for p in parts)


SOUND_VERBS = (("starts at", "ends at"), ("is heard from", "to"), ("sounds from", "until"))
"""The words before a sound's start and end, by style."""


def caption_sound(sound: dict) -> str:
    """Return a sound in words: pitch, where it has a name, and kind."""
    names = {"noise": "noise burst", "pulse": f"train of {len(sound['pulses'])} pulses"}
    name = names.get(sound["kind"], sound["kind"])
    return f"{sound['pitch']} {name}" if sound["pitch"] else name


def caption_thing(thing: dict) -> str:
    """Return a thing in words: size, colour and shape, where they have names."""
    words = ["a", thing["size"], thing["colour"], thing["shape"] or "thing"]
    return " ".join(word for word in words if word)


def caption_moving(clip: dict, style: int) -> str:
    """Return the sentence on the first thing."""
    events = clip["events"]
    text = caption_thing(clip["objects"][0])
    if clip["form"] == "jpg":
        return text + (" is there", " can be seen", " is in the picture")[style]
    if events["appears"] > 0:
        text += f" appears at {events['appears']:.1f} and"
    text += (" moves ", " goes ", " travels ")[style] + clip["direction"]
    n = len(events["bounces"])
    if n:
        times = "once" if n == 1 else f"{n} times"
        text += f" and bounces {times} at {', '.join(f'{t:.1f}' for t in events['bounces'])}"
        if clip["silent_bounces"] is not None:
            text += f", {clip['silent_bounces']} silent"
    if events["vanishes"] is not None:
        text += f" and vanishes at {events['vanishes']:.1f}"
    return text


def caption_rows(clips: list[dict], split: str, seed: int, taken: set[str]) -> list[dict]:
    """Return one caption row a clip.

    Outside of training, a caption that is in `taken` or came before is left out.
    """
    rows = []
    seen = set()
    for clip in clips:
        text = caption(clip, np.random.default_rng([seed, SPLITS.index(split), 6, clip["index"]]))
        if (text in seen or text in taken) and split != "train":
            continue
        seen.add(text)
        rows.append({
            "id": f"toy-{clip['id']}-caption", "source": "toy_world", "kind": "caption",
            "messages": [
                {"role": "user", "content": [media_part(clip)]},
                {"role": "assistant", "content": [{"type": "text", "text": text}]},
            ],
            "meta": {"clip": clip["id"], "form": clip["form"]}, "licence": "CC0-1.0",
        })  # fmt: skip
    return rows
