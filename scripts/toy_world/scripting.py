"""Draw what happens in each clip of the toy world from (seed, split, index), as plain dicts.

Independence is built in here. The bounces and the clicks of a clip are subsets of the same five
slots of time, so that each of the two is a uniform subset whatever their overlap is: neither stream
alone says how many bounces are silent. What comes first is drawn over nearly the whole clip, since
an event at the very start always is the first of two.
"""

from itertools import pairwise

import numpy as np

SPLITS = ("train", "validation", "test", "unseen")
SHARES = {"train": 0.745, "validation": 0.02, "test": 0.17, "unseen": 0.065}
FPS = 8
SIDE = 96  # pixels
RATE = 16000
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 235),
    "yellow": (240, 220, 50),
    "purple": (175, 60, 210),
    "white": (245, 245, 245),
}
SHADES = [(240, 130, 35), (150, 220, 50), (50, 185, 205), (245, 140, 190)]  # colours without a name
NAMELESS = (0.25, 0.25, 0.5)
"""Shares of pictures in which one thing's shape, one thing's colour, nothing is without a name."""
SIZES = {"small": 7.0, "big": 13.0}  # radius in pixels
DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 1), "up": (1, -1)}  # axis, sign
# Pulse trains are more frequent, since one question is about them alone.
KINDS = {"tone": 0.185, "chirp": 0.185, "noise": 0.185, "pulse": 0.445}
PITCHES = {"deep": 280.0, "low": 540.0, "middle": 1040.0, "high": 2000.0, "shrill": 3850.0}  # Hz
NAMELESS_PITCHES = 1 / 3  # share of sounds between two of these; no question asks how high they are
TIMBRES = ("sine", "square", "saw", "organ", "horn", "reed")
PULSES = (2, 3, 4, 5)
# each colour is kept from one shape, so that the colours stay equally frequent in training
UNSEEN_THINGS = {
    ("circle", "red"), ("square", "green"), ("triangle", "blue"),
    ("cross", "yellow"), ("ring", "purple"), ("circle", "white"),
}  # fmt: skip
# of two kinds a pitch, between pitches that they are heard at; of two a timbre
UNSEEN_SOUNDS = {("tone", "middle"), ("noise", "low"), ("chirp", "saw"), ("pulse", "square")}
FORMS = {"av": 0.80, "mute": 0.055, "silent": 0.025, "wav": 0.06, "jpg": 0.06}
SUFFIX = {"av": "mp4", "mute": "mp4", "silent": "mp4", "wav": "wav", "jpg": "jpg"}
PROGRAMS = {
    "av": {"bounce": 0.55, "first": 0.25, "when": 0.20},
    "mute": {"bounce": 0.5, "when": 0.5},
    "silent": {"bounce": 0.5, "when": 0.5},
    "wav": {"when": 1.0},
    "jpg": {"still": 1.0},
}
# (bounces, silent bounces); shares chosen so that little is thrown away when the answers are
# balanced
BOUNCE_CELLS = {
    (0, 0): 0.20,
    (1, 0): 0.11, (1, 1): 0.11,
    (2, 0): 0.11, (2, 1): 0.09, (2, 2): 0.09,
    (3, 0): 0.11, (3, 1): 0.09, (3, 2): 0.09,
}  # fmt: skip
SLOTS = 5  # moments at which bounces and clicks can be
CLICKS = 3
SLOT_GAP = 0.5  # seconds
CORRIDOR = 60  # pixels between the two walls
FRAME = 1.0 / FPS


def deal(shares: dict, n: int, rng: np.random.Generator) -> list:
    """Return `n` shuffled keys in the given shares, each within one of its exact number."""
    keys = list(shares)
    edges = np.round(np.cumsum([shares[k] for k in keys]) / sum(shares.values()) * n).astype(int)
    dealt = []
    for key, count in zip(keys, np.diff(edges, prepend=0), strict=True):
        dealt += [key] * count
    return [dealt[i] for i in rng.permutation(n)]


def split_sizes(clips: int) -> dict[str, int]:
    """Return how many of `clips` go into each split."""
    edges = np.round(np.cumsum([SHARES[s] for s in SPLITS]) * clips).astype(int)
    return {s: int(n) for s, n in zip(SPLITS, np.diff(edges, prepend=0), strict=True)}


def script_split(seed: int, split: str, n: int) -> list[dict]:
    """Return the scripts of one split.

    Forms, programs, bounces and orders are dealt, everything else is drawn for each clip.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), 1])
    cells: list = [None] * n
    forms = deal(FORMS, n, rng)
    for form in FORMS:
        of_form = [i for i in range(n) if forms[i] == form]
        programs = deal(PROGRAMS[form], len(of_form), rng)
        for program in PROGRAMS[form]:
            chosen = [i for i, p in zip(of_form, programs, strict=True) if p == program]
            details = {"bounce": BOUNCE_CELLS, "first": {"sound": 0.5, "thing": 0.5}}.get(
                program, {None: 1.0}
            )
            for i, detail in zip(chosen, deal(details, len(chosen), rng), strict=True):
                cells[i] = (form, program, detail)
    return [script_clip(seed, split, i, *cell) for i, cell in enumerate(cells)]


def script_clip(seed: int, split: str, index: int, form: str, program: str, detail: object) -> dict:
    """Return the ground truth of one clip: a line of script.jsonl.

    Times are seconds of the clip, places are pixels of the 96x96 frame. `objects`: the first moves,
    the others are still; frame t shows the instant t / fps, `x`, `y` (centre) and `visible` have
    one value a frame. `events`: bounces, `appears` (0 = there from the start), `vanishes` (null =
    never). `sounds`: at most one, with kind, pitch, timbre, start, end and the starts of its
    pulses. `clicks`, and for each whether it comes at a bounce; `silent_bounces`: bounces without
    one (null where there are not both streams). A stream that is not there has empty fields.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), 2, index])
    unseen = split == "unseen"
    timing = draw_timing(program, detail, rng)
    clip = {
        "id": f"{split}-{index:06d}",
        "split": split,
        "index": index,
        "form": form,
        "program": program,
        "file": f"clips/{split}-{index:06d}.{SUFFIX[form]}",
        "duration": timing["duration"],
        "fps": FPS,
        "rate": RATE,
        "objects": [],
        "direction": None,
        "walls": None,
        "background": None,
        "events": {"bounces": [], "appears": None, "vanishes": None},
        "sounds": [],
        "clicks": [],
        "click_at_bounce": [],
        "silent_bounces": None,
    }
    # both are drawn in every form, so that a stream's script does not depend on the other stream's
    # being there
    picture = draw_picture(program, timing, unseen, rng)
    sound = draw_sound(timing, unseen, rng)
    if form != "wav":
        clip.update(picture)
    if form in ("av", "wav"):
        clip.update(sound)
    if form == "av" and program == "bounce":
        clip["silent_bounces"] = len(set(timing["bounces"]) - set(timing["clicks"]))
    if form == "av":
        clip["click_at_bounce"] = [t in timing["bounces"] for t in sound["clicks"]]
    return clip


def draw_timing(program: str, detail: object, rng: np.random.Generator) -> dict:
    """Return when things happen, in seconds, on the grid of the frames.

    At 8 frames a second, a bounce between two frames is not seen.
    """
    shortest = {"bounce": 3.625, "first": 5.25, "when": 2.0, "still": 0.0}[program]
    frames = 0 if program == "still" else int(rng.integers(round(shortest * FPS), 6 * FPS + 1))
    timing: dict = {
        "duration": frames * FRAME,
        "bounces": [],
        "clicks": [],
        "appears": 0.0,
        "starts": None,
    }
    if program == "bounce":
        bounces, silent = detail  # type: ignore[misc]
        timing["bounces"], timing["clicks"] = draw_slots(frames, bounces, silent, rng)
    elif program == "first":
        # One stream alone knows the answer where its event is among the first or last `gap` of the
        # clip: with 0.5 s in 5-6 s a perfect eye or ear is right in 55%. A shorter gap is hard to
        # notice, a longer one gives more away.
        gap = 4
        early = int(rng.integers(1, frames - 4 - gap + 1))
        early_late = (early * FRAME, (early + gap) * FRAME)
        timing["starts"], timing["appears"] = early_late if detail == "sound" else early_late[::-1]
    elif program == "when":
        timing["appears"] = int(rng.integers(2, frames - 8 + 1)) * FRAME
    if program in ("first", "when"):
        count = int(rng.integers(0, 3))
        slots = spaced(frames, 2, 4, rng)
        timing["clicks"] = sorted(float(t) for t in rng.choice(slots, size=count, replace=False))
    return timing


def spaced(frames: int, count: int, gap: int, rng: np.random.Generator) -> np.ndarray:
    """Return `count` random seconds, at least `gap` frames apart and 3 frames from both ends."""
    free = frames - 6 - (count - 1) * gap
    offsets = np.sort(rng.integers(0, free + 1, size=count))
    return (3 + offsets + gap * np.arange(count)) * FRAME


def draw_slots(
    frames: int, bounces: int, silent: int, rng: np.random.Generator
) -> tuple[list, list]:
    """Return the times of the bounces and of the clicks.

    Each is a uniform subset of five slots, however many bounces are silent.
    """
    order = rng.permutation(spaced(frames, SLOTS, round(SLOT_GAP * FPS), rng))
    at_bounce = bounces - silent
    clicks = [*order[:at_bounce], *order[bounces : bounces + CLICKS - at_bounce]]
    return sorted(float(t) for t in order[:bounces]), sorted(float(t) for t in clicks)


def draw_things(count: int, unseen: bool, rng: np.random.Generator) -> list[dict]:
    """Return `count` things of different shapes and colours.

    With `unseen`, the first has a held-out combination. Now and then the shape or the colour of
    one has no name. Such a shape lies between two that no other thing of the clip has, so that
    names stay clear.
    """
    held = sorted(UNSEEN_THINGS)
    while True:
        shapes: list = [str(s) for s in rng.permutation(SHAPES)]
        colours: list = [str(c) for c in rng.permutation(list(COLOURS))[:count]]
        if unseen:
            shapes[0], colours[0] = held[rng.integers(len(held))]
        distinct = len(set(shapes)) == len(SHAPES) and len(set(colours)) == count
        without = rng.choice(["shape", "colour", "nothing"], p=NAMELESS)
        which = int(rng.integers(count))
        things = [{"shape": s, "colour": c} for s, c in zip(shapes[:count], colours, strict=True)]
        if without != "nothing":
            things[which][without] = None
        held_out = [is_held_out(thing) for thing in things]
        if distinct and held_out == [unseen, *[False] * (count - 1)]:
            break
    for thing in things:
        thing["size"] = str(rng.choice(list(SIZES)))
        thing["between"] = None
        thing["shade"] = None
        if not thing["shape"]:
            thing["between"] = [shapes[which], *shapes[count:]][:2]
        if not thing["colour"]:
            thing["shade"] = [int(v) for v in SHADES[rng.integers(len(SHADES))]]
    return things


def is_held_out(thing: dict) -> bool:
    """Return whether shape and colour go together in the split `unseen` alone."""
    return (thing["shape"], thing["colour"]) in UNSEEN_THINGS


def draw_picture(program: str, timing: dict, unseen: bool, rng: np.random.Generator) -> dict:
    """Return things, walls, path and background.

    The first thing moves between the walls; the others are on the far side of one.
    """
    count = int(rng.choice([1, 2, 3, 4], p=[0.52, 0.16, 0.16, 0.16]))
    things = draw_things(count, unseen, rng)
    direction = str(rng.choice(list(DIRECTIONS)))
    axis, sign = DIRECTIONS[direction]
    band = SIDE - CORRIDOR
    low = int(rng.choice([0, band])) if count > 1 else int(rng.integers(0, band + 1))
    duration = timing["duration"]
    appears = timing["appears"]
    vanishes = None
    if program == "when" and duration - appears >= 2.0 and rng.random() < 0.4:
        vanishes = float(rng.integers(round(appears * FPS) + 12, round(duration * FPS) - 2)) * FRAME
    span = (appears, duration if vanishes is None else vanishes)
    times, along, across = draw_path(things[0], span, timing["bounces"], low, rng)
    along = along if sign > 0 else [SIDE - v for v in along]
    frame_times = np.arange(max(1, round(duration * FPS))) * FRAME
    still = {"along": rng.permutation([16, 48, 80]), "across": band / 2 + (0 if low else CORRIDOR)}
    for i, thing in enumerate(things):
        if i == 0:
            a = np.interp(frame_times, times, along)
            c = np.interp(frame_times, times, across)
            has_ended = (frame_times >= span[1] - 1e-9) & (vanishes is not None)
            seen = (frame_times >= span[0] - 1e-9) & ~has_ended
        else:
            a = np.full(len(frame_times), still["along"][i - 1] + rng.uniform(-2, 2))
            c = np.full(len(frame_times), still["across"] + rng.uniform(-3, 3))
            seen = np.ones(len(frame_times), bool)
        xy = (a, c) if axis == 0 else (c, a)
        thing |= {"x": rounded(xy[0]), "y": rounded(xy[1]), "visible": seen.astype(int).tolist()}
    return {
        "objects": things,
        "direction": None if program == "still" else direction,
        "walls": {"axis": "y" if axis == 0 else "x", "at": [low, low + CORRIDOR]},
        "background": {"drift": rounded(rng.uniform(-6, 6, size=2))},
        "events": {"bounces": timing["bounces"], "appears": appears, "vanishes": vanishes},
    }


def draw_path(
    thing: dict, span: tuple, bounces: list, low: int, rng: np.random.Generator
) -> tuple[list, list, list]:
    """Return the knots of a path: seconds, pixels along the direction of travel, pixels across it.

    Across, it goes from wall to wall.
    """
    radius = SIZES[thing["size"]]
    room = SIDE - 2 * radius - 4
    travel = min(rng.uniform(40, 60), room, 40 * (span[1] - span[0]))
    start = radius + 2 + rng.uniform(0, room - travel)
    times = [span[0], *bounces, max(span[1], span[0] + FRAME)]
    along = np.interp(times, [times[0], times[-1]], [start, start + travel])
    if bounces:
        side = int(rng.integers(2))
        hits = [(side + i) % 2 for i in range(len(bounces))]
        far = rng.uniform(0.7, 0.9, size=2)  # from the wall: it is seen coming and going
        across = [abs(hits[0] - far[0]), *hits, abs(hits[-1] - far[1])]
    else:
        across = rng.permutation([rng.uniform(0.12, 0.3), rng.uniform(0.7, 0.88)]).tolist()
    reach = CORRIDOR - 2 * radius
    return times, along.tolist(), [low + radius + reach * f for f in across]


def draw_sound(timing: dict, unseen: bool, rng: np.random.Generator) -> dict:
    """Return one sound of a kind, a pitch and a timbre, and the clicks.

    Only `timing` ties it to the picture.
    """
    kinds = list(KINDS)
    while True:
        kind = str(rng.choice(kinds, p=list(KINDS.values())))
        timbre = str(rng.choice(TIMBRES))
        pitch = None if rng.random() < NAMELESS_PITCHES else str(rng.choice(list(PITCHES)))
        if bool({(kind, pitch), (kind, timbre)} & UNSEEN_SOUNDS) == unseen:
            break
    count = int(rng.choice(PULSES))
    gap = float(rng.uniform(0.4, 0.44))
    length = float(rng.uniform(0.6, 1.6))
    duration = timing["duration"]
    start = timing["starts"]
    if duration == 0:
        return {"sounds": [], "clicks": []}
    if start is None:
        if kind == "pulse":
            length = (count - 1) * gap + 0.09
        length = min(length, duration - 0.25)
        start = float(rng.uniform(0.2, duration - length - 0.05))
    elif kind == "pulse":
        gap = 0.4
        count = min(count, 1 + int((duration - start - 0.091) / gap))
    if kind == "pulse":
        length = (count - 1) * gap + 0.09
    end = min(start + length, duration)
    sound = {
        "kind": kind, "pitch": pitch, "timbre": timbre,
        "frequency": draw_frequency(pitch, rng),
        "sweep": int(rng.choice([-1, 1])), "level": round(float(rng.uniform(0.14, 0.28)), 3),
        "start": round(start, 4), "end": round(end, 4),
        "pulses": rounded(start + gap * np.arange(count), 4) if kind == "pulse" else [],
    }  # fmt: skip
    return {"sounds": [sound], "clicks": timing["clicks"]}


def draw_frequency(pitch: str | None, rng: np.random.Generator) -> float:
    """Return hertz near a pitch, or without one between two neighbours."""
    if pitch:
        return round(PITCHES[pitch] * float(rng.uniform(0.93, 1.07)), 2)
    below, above = list(pairwise(PITCHES.values()))[int(rng.integers(len(PITCHES) - 1))]
    return round(below * (above / below) ** float(rng.uniform(0.2, 0.8)), 2)


def rounded(values: np.ndarray, digits: int = 2) -> list[float]:
    """Return plain floats for JSON."""
    return [round(float(v), digits) for v in values]
