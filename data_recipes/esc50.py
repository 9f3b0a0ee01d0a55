"""ESC-50, or its older form ESC-10, as its author distributes it -> manifests for one test fold.

    python data_recipes/esc50.py SOURCE OUT --test-fold 1 [--esc10]

SOURCE holds either meta/esc50.csv and audio/*.wav (https://github.com/karolpiczak/ESC-50) or, in the older form, one
folder a class, `NNN - Class name/FOLD-CLIPID-TAKE.ogg`. Nothing is downloaded and no sound is copied.

OUT gets captions_train.jsonl (sound, caption), train.jsonl (sound, question, answer), the same two for a validation
split that is taken out of the training folds by source recording, and test.jsonl (the test fold). Data set: K. J.
Piczak, ESC: Dataset for Environmental Sound Classification, ACM Multimedia 2015.
"""

import argparse
import csv
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from avllm.data.manifest import write_manifest
from avllm.data.recipe_about import Dataset

ABOUT = Dataset(
    title="ESC-50 and its older form ESC-10",
    licence="CC BY-NC 3.0; ESC-10 CC BY 3.0",
    size="2,000 / 400 sounds of 5 s, 0.6 GB",
    where="https://github.com/karolpiczak/ESC-50",
    layout="""
        meta/esc50.csv | * - *  the table; in the older form a folder a class, `NNN - Class name`
        [audio/  *.wav]
    """,
    citation="Piczak, ESC: Dataset for Environmental Sound Classification, ACM Multimedia 2015",
    command="python data_recipes/esc50.py SOURCE OUT --test-fold 1",
)
COLUMNS = ("filename", "fold", "target", "category", "esc10", "src_file", "take")
FOLDER = re.compile(r"\d{3} - (.+)")
FILE = re.compile(r"(\d+)-([^-]+)-([A-Z])\.(?:ogg|wav)")
SECONDS = 5.0  # a clip's length; the older form has a few files that are longer

ANSWERS = {
    "dog": "a dog barking",
    "rooster": "a rooster crowing",
    "pig": "a pig grunting",
    "cow": "a cow mooing",
    "frog": "a frog croaking",
    "cat": "a cat meowing",
    "hen": "a hen clucking",
    "insects": "insects buzzing",
    "sheep": "a sheep bleating",
    "crow": "a crow cawing",
    "rain": "rain falling",
    "sea_waves": "sea waves",
    "crackling_fire": "a fire crackling",
    "crickets": "crickets chirping",
    "chirping_birds": "birds singing",
    "water_drops": "water dripping",
    "wind": "wind blowing",
    "pouring_water": "water being poured",
    "toilet_flush": "a toilet flushing",
    "thunderstorm": "a thunderstorm",
    "crying_baby": "a baby crying",
    "sneezing": "a person sneezing",
    "clapping": "people clapping",
    "breathing": "a person breathing",
    "coughing": "a person coughing",
    "footsteps": "footsteps",
    "laughing": "a person laughing",
    "brushing_teeth": "someone brushing teeth",
    "snoring": "a person snoring",
    "drinking_sipping": "someone taking a sip",
    "door_wood_knock": "a knock on a wooden door",
    "mouse_click": "mouse clicks",
    "keyboard_typing": "typing on a keyboard",
    "door_wood_creaks": "a wooden door creaking",
    "can_opening": "a can being opened",
    "washing_machine": "a washing machine running",
    "vacuum_cleaner": "a vacuum cleaner humming",
    "clock_alarm": "an alarm clock ringing",
    "clock_tick": "a clock ticking",
    "glass_breaking": "glass breaking",
    "helicopter": "a helicopter flying",
    "chainsaw": "a chainsaw running",
    "siren": "a siren wailing",
    "car_horn": "a car horn",
    "engine": "an engine running",
    "train": "a train passing",
    "church_bells": "church bells ringing",
    "airplane": "an airplane passing",
    "fireworks": "fireworks going off",
    "hand_saw": "sawing by hand",
}
OLD_NAMES = {
    "Dog bark": "dog",
    "Rain": "rain",
    "Sea waves": "sea_waves",
    "Baby cry": "crying_baby",
    "Clock tick": "clock_tick",
    "Person sneeze": "sneezing",
    "Helicopter": "helicopter",
    "Chainsaw": "chainsaw",
    "Rooster": "rooster",
    "Fire crackling": "crackling_fire",
}
CAPTIONS = ["{}", "the sound of {}", "you can hear {}", "a recording of {}"]
QUESTIONS = ["What do you hear?", "What sound is this?", "Which sound do you hear?", "What is making this sound?"]
LICENCES = {True: "CC BY 3.0 (ESC-10; the clips' own licences are in the data set's LICENSE)", False: "CC BY-NC 3.0"}


@dataclass(frozen=True)
class Recording:
    """One clip: ``source`` is the recording that it was cut from (CLIPID), so two clips may share it."""

    path: Path
    fold: int
    source: str
    take: str
    category: str
    esc10: bool


@dataclass
class Found:
    """What a source folder holds, and what was left out of it: reason -> names."""

    recordings: list[Recording]
    left_out: dict[str, list[str]]


class RecipeError(SystemExit):
    """A source that cannot be read; the message says what was seen, what was expected and what to do."""


def read_source(source: Path, only_esc10: bool) -> Found:
    """The recordings of either form, in the order of their file names.

    Raises:
        RecipeError: the folder has neither form, or there is nothing usable in it.
    """
    left_out: dict[str, list[str]] = defaultdict(list)
    table = source / "meta" / "esc50.csv"
    if table.is_file():
        listed = list(read_table(table, source / "audio", left_out))
    elif source.is_dir() and any(FOLDER.fullmatch(p.name) for p in source.iterdir()):
        listed = list(read_folders(source, left_out))
    else:
        raise RecipeError(
            f"{source} has neither meta/esc50.csv nor folders named 'NNN - Class name'; give ESC's folder"
        )
    kept = []
    for recording in tqdm(sorted(listed, key=lambda r: r.path.name), desc="files", unit="file", disable=None):
        reason = unusable(recording, only_esc10)
        if reason:
            left_out[reason].append(str(recording.path))
        else:
            kept.append(recording)
    if not kept:
        raise RecipeError(f"{source}: no usable recording; left out: {summary(left_out) or 'nothing was there'}")
    return Found(kept, dict(left_out))


def read_table(table: Path, audio: Path, left_out: dict[str, list[str]]) -> Iterator[Recording]:
    """The rows of meta/esc50.csv; a class that this recipe has no words for is left out."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        absent = [c for c in COLUMNS if c not in (rows.fieldnames or [])]
        if absent:
            raise RecipeError(f"{table} has no column {', '.join(absent)}; expected {', '.join(COLUMNS)}")
        for row in rows:
            if row["category"] not in ANSWERS:
                left_out["unknown class"].append(f"{table} line {rows.line_num}: {row['category']!r}")
                continue
            if not (row["fold"] or "").isdigit():
                raise RecipeError(f"{table} line {rows.line_num}: fold is {row['fold']!r}; expected a number")
            path, esc10 = audio / row["filename"], row["esc10"] == "True"
            yield Recording(path, int(row["fold"]), row["src_file"], row["take"], row["category"], esc10)


def read_folders(source: Path, left_out: dict[str, list[str]]) -> Iterator[Recording]:
    """The older form: fold, source recording and take stand in the file's name, the class in the folder's."""
    for folder in sorted(p for p in source.iterdir() if p.is_dir()):
        name = FOLDER.fullmatch(folder.name)
        category = OLD_NAMES.get(name.group(1)) if name else None
        for path in sorted(folder.iterdir()):
            parts = FILE.fullmatch(path.name)
            if category is None or parts is None:
                left_out["unknown class" if category is None else "no sound of the data set"].append(str(path))
            else:
                yield Recording(path, int(parts.group(1)), parts.group(2), parts.group(3), category, True)


def unusable(recording: Recording, only_esc10: bool) -> str | None:
    """Why a recording cannot be used, None when it can."""
    if only_esc10 and not recording.esc10:
        return "not in ESC-10"
    if not recording.path.is_file():
        return "missing"
    return "empty file" if recording.path.stat().st_size == 0 else None


@dataclass(frozen=True)
class Split:
    """Recordings of one test fold's three parts; no source recording stands in two of them."""

    train: list[Recording]
    validation: list[Recording]
    test: list[Recording]


def split(recordings: list[Recording], test_fold: int, share: float, seed: int) -> tuple[Split, list[Recording]]:
    """Test fold, and of the other folds a share of the source recordings of each class for validation.

    Returns:
        the split, and recordings of other folds that share their source with the test fold: they are in no part.

    Raises:
        RecipeError: the test fold, or every other fold, is empty.
    """
    folds = sorted({r.fold for r in recordings})
    if test_fold not in folds or len(folds) < 2:
        raise RecipeError(f"test fold {test_fold}: there are folds {folds}; choose one of at least two")
    test = [r for r in recordings if r.fold == test_fold]
    tested = {r.source for r in test}
    rest = [r for r in recordings if r.fold != test_fold]
    shared = [r for r in rest if r.source in tested]
    rest = [r for r in rest if r.source not in tested]
    held = validation_sources(rest, share, seed)
    train = [r for r in rest if r.source not in held]
    return Split(train, [r for r in rest if r.source in held], test), shared


def validation_sources(recordings: list[Recording], share: float, seed: int) -> set[str]:
    """Source recordings, drawn class by class, so that the share of each class's clips is about ``share``."""
    rng = np.random.default_rng([seed, 50])
    held: set[str] = set()
    for category in sorted({r.category for r in recordings}):
        clips = Counter(r.source for r in recordings if r.category == category)
        wanted = share * sum(clips.values())
        taken = sum(n for source, n in clips.items() if source in held)
        for source in rng.permutation(sorted(clips)).tolist():
            if taken + clips[source] / 2 > wanted:
                break
            held.add(source)
            taken += clips[source]
    return held


def sound_part(recording: Recording, out: Path) -> dict:
    """The media part, with a path relative to the manifests where there is one."""
    try:
        path = os.path.relpath(recording.path.resolve(), out.resolve())
    except ValueError:  # another drive
        path = str(recording.path.resolve())
    return {"type": "audio", "audio": Path(path).as_posix(), "end": SECONDS}


def row(recording: Recording, out: Path, name: str, question: str | None, answer: str) -> dict:
    """A manifest row; without a question it is a caption."""
    asked = [{"type": "text", "text": question}] if question else []
    esc = "esc10" if recording.esc10 else "esc50"
    return {
        "id": f"{esc}-{recording.fold}-{recording.source}-{recording.take}-{recording.category}-{name}",
        "source": esc,
        "kind": f"heard.{recording.category}",
        "messages": [
            {"role": "user", "content": [sound_part(recording, out), *asked]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "licence": LICENCES[recording.esc10],
        "meta": {"fold": recording.fold, "clip": recording.source, "take": recording.take},
    }


def caption_rows(recordings: list[Recording], out: Path, wordings: int) -> list[dict]:
    """Each clip with its first ``wordings`` captions."""
    return [
        row(r, out, f"c{i}", None, CAPTIONS[i].format(ANSWERS[r.category])) for r in recordings for i in range(wordings)
    ]


def question_rows(recordings: list[Recording], out: Path, wordings: int) -> list[dict]:
    """Each clip with its first ``wordings`` questions; the first is 'What do you hear?'."""
    return [row(r, out, f"q{i}", QUESTIONS[i], ANSWERS[r.category]) for r in recordings for i in range(wordings)]


def write_split(parts: Split, out: Path, wordings: int) -> dict[str, int]:
    """Write the manifests; returns rows by file. A part without clips (no validation asked for) gets no file."""
    every = [*parts.train, *parts.validation, *parts.test]
    choices = [answer for category, answer in ANSWERS.items() if any(r.category == category for r in every)]
    files = {
        "captions_train": caption_rows(parts.train, out, wordings),
        "captions_validation": caption_rows(parts.validation, out, 1),
        "train": question_rows(parts.train, out, wordings),
        "validation": [r | {"choices": choices} for r in question_rows(parts.validation, out, 1)],
        "test": [r | {"choices": choices} for r in question_rows(parts.test, out, 1)],
    }
    for name, rows in files.items():
        (out / f"{name}.jsonl").unlink(missing_ok=True)
        if rows:
            write_manifest(out / f"{name}.jsonl", rows)
    return {name: len(rows) for name, rows in files.items()}


def summary(left_out: dict[str, list[str]]) -> str:
    """Counts by reason, and the first few names of each."""
    lines = []
    for reason, names in sorted(left_out.items()):
        shown = "" if reason == "not in ESC-10" else ": " + ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        lines.append(f"{len(names)} {reason}{shown}")
    return "; ".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="ESC-50's folder (meta/, audio/), or ESC-10's with a folder a class")
    parser.add_argument("out", type=Path, help="folder to write the manifests into")
    parser.add_argument("--test-fold", type=int, required=True, help="the fold to be tested on; all others train")
    parser.add_argument("--esc10", action="store_true", help="of ESC-50, only the ten classes of ESC-10")
    parser.add_argument(
        "--validation",
        type=float,
        default=0.1,
        help="share of the training folds' clips held out (default 0.1; 0 = none)",
    )
    parser.add_argument(
        "--wordings", type=int, default=len(QUESTIONS), choices=range(1, len(QUESTIONS) + 1),
        help="how many wordings of caption and question each training clip gets (default: all)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="draws the validation split (default 0)")
    args = parser.parse_args(argv)
    if not 0 <= args.validation < 1:
        parser.error(f"--validation is {args.validation}; expected a share from 0 to below 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Write the manifests of one test fold and say what is in them; 1 when files are missing or empty."""
    args = parse(argv)
    found = read_source(args.source, args.esc10)
    parts, shared = split(found.recordings, args.test_fold, args.validation, args.seed)
    if shared:
        found.left_out["shares its source with the test fold"] = [str(r.path) for r in shared]
    counts = write_split(parts, args.out, args.wordings)
    clips = {name: len(getattr(parts, name)) for name in ("train", "validation", "test")}
    print(f"{args.out}: clips {clips}, rows {counts}")
    if found.left_out:
        print(f"left out: {summary(found.left_out)}", file=sys.stderr)
    return 1 if {"missing", "empty file"} & set(found.left_out) else 0


if __name__ == "__main__":
    sys.exit(main())
