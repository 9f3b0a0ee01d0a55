"""ESC-50, or its older form ESC-10 -> captions and questions of one fold of a cross-validation.

    python data_recipes/esc50.py SOURCE --output DIR --test-fold 1 [--esc10]

SOURCE holds either meta/esc50.csv and audio/*.wav (https://github.com/karolpiczak/ESC-50) or, in the older form, one
folder a class, `NNN - Class name/FOLD-CLIPID-TAKE.ogg`.

The authors' five folds are made for cross-validation: one is tested on, the others train. captions_train.jsonl (sound,
caption) and train.jsonl (sound, question, answer) hold each clip in several wordings; captions_validation.jsonl and
validation.jsonl a share of the training folds, drawn class by class and by source recording (CLIPID); test.jsonl the
test fold. Clips of other folds that share their source recording with the test fold are left out. A clip that is
missing changes no split. Paper: K. J. Piczak, ESC: Dataset for Environmental Sound Classification, ACM Multimedia 2015.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from avllm.data.schema import RowError
from avllm.recipes import frame as recipe
from avllm.recipes.frame import Dataset, Drop, RecipeError, Record, Row, drops_of, read_csv

ABOUT = Dataset(
    title="ESC-50 and its older form ESC-10",
    licence="CC BY-NC 3.0; ESC-10 CC BY 3.0; each clip of Freesound has its own",
    size="2,000 / 400 sounds of 5 s in five folds, 0.6 GB",
    where="https://github.com/karolpiczak/ESC-50",
    layout="""
        meta/esc50.csv | * - *  the table; in the older form a folder a class, `NNN - Class name`
        [audio/  *.wav]
    """,
    citation="Piczak, ESC: Dataset for Environmental Sound Classification, ACM Multimedia 2015",
    command="python data_recipes/esc50.py SOURCE --output DIR --test-fold 1",
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
    """One clip.

    Attributes:
        path: relative to the data set's folder.
        source: the recording that it was cut from (CLIPID); two clips may share it.
    """

    path: str
    fold: int
    source: str
    take: str
    category: str
    esc10: bool


def rows(
    source: Path,
    test_fold: Annotated[int, typer.Option(help="The fold to be tested on; all others train.")],
    esc10: Annotated[bool, typer.Option("--esc10", help="Of ESC-50, only the ten classes of ESC-10.")] = False,
    validation: Annotated[float, typer.Option(min=0.0, help="Share of the training folds' clips held out.")] = 0.1,
    wordings: Annotated[
        int, typer.Option(min=1, max=len(QUESTIONS), help="Captions, and questions, of each training clip.")
    ] = len(QUESTIONS),
    seed: Annotated[int, typer.Option(min=0, help="Draws the validation split.")] = 0,
) -> Iterator[Row | Drop]:
    """Captions and questions of the training folds, of what is held out of them, and questions of the test fold."""
    if validation >= 1:
        raise RecipeError(f"--validation {validation}; expected a share from 0 to below 1")
    found: list[Recording] = []
    yield from read_source(source, found)
    if esc10:
        yield from (Drop("not_in_esc10", r.path, r.category) for r in found if not r.esc10)
        found = [r for r in found if r.esc10]
    if not found:
        return
    parts, shared = split(sorted(found, key=lambda r: Path(r.path).name), test_fold, validation, seed)
    yield from (Drop("shares_source_with_test", r.path, f"recording {r.source}") for r in shared)
    yield from split_rows(parts, wordings)


def read_source(source: Path, found: list[Recording]) -> Iterator[Row | Drop]:
    """Fills in the recordings of either form; gives what is left out."""
    table = source / "meta" / "esc50.csv"
    if table.is_file():
        yield from drops_of(read_csv(table, COLUMNS), lambda record: found.append(recording_of(record)))
    else:
        yield from read_folders(source, found)


def recording_of(record: Record) -> Recording:
    """A row of meta/esc50.csv.

    Raises:
        RecipeError: the fold is no number.
        RowError: this recipe has no words for the class.
    """
    category, fold = record.text("category"), record.text("fold")
    if category not in ANSWERS:
        raise RowError("unknown_class", repr(category))
    if not fold.isdecimal():
        raise RecipeError(f"fold is {fold!r}; expected a number")
    path, is_esc10 = f"audio/{record.text('filename')}", record.text("esc10") == "True"
    return Recording(path, int(fold), record.text("src_file"), record.text("take"), category, is_esc10)


def read_folders(source: Path, found: list[Recording]) -> Iterator[Drop]:
    """The older form: fold, source recording and take stand in the file's name, the class in the folder's."""
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        name = FOLDER.fullmatch(folder.name)
        category = OLD_NAMES.get(name[1]) if name else None
        for file in sorted(folder.iterdir()):
            path, parts = f"{folder.name}/{file.name}", FILE.fullmatch(file.name)
            if category is None:
                yield Drop("unknown_class", path, repr(folder.name))
            elif parts is None:
                yield Drop("no_sound_of_the_set", path, "expected FOLD-CLIPID-TAKE.ogg")
            else:
                found.append(Recording(path, int(parts[1]), parts[2], parts[3], category, True))


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
        raise RecipeError(f"--test-fold {test_fold}: there are folds {folds}; choose one of at least two")
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


def split_rows(parts: Split, wordings: int) -> Iterator[Row]:
    """The rows of all manifests; where answers are scored, each names the classes that occur."""
    every = [*parts.train, *parts.validation, *parts.test]
    choices = [answer for category, answer in ANSWERS.items() if any(r.category == category for r in every)]
    yield from captions("captions_train", parts.train, wordings)
    yield from captions("captions_validation", parts.validation, 1)
    yield from questions("train", parts.train, wordings)
    yield from questions("validation", parts.validation, 1, choices)
    yield from questions("test", parts.test, 1, choices)


def captions(name: str, recordings: Sequence[Recording], wordings: int) -> Iterator[Row]:
    """Each clip with its first captions."""
    for recording in recordings:
        for number, wording in enumerate(CAPTIONS[:wordings]):
            yield Row(sample(recording, f"c{number}", None, wording.format(ANSWERS[recording.category])), name)


def questions(name: str, recordings: Sequence[Recording], wordings: int, choices: Sequence[str] = ()) -> Iterator[Row]:
    """Each clip with its first questions; the very first is 'What do you hear?'."""
    closed = {"choices": choices} if choices else {}
    for recording in recordings:
        for number, question in enumerate(QUESTIONS[:wordings]):
            yield Row(sample(recording, f"q{number}", question, ANSWERS[recording.category]) | closed, name)


def sample(recording: Recording, name: str, question: str | None, answer: str) -> dict[str, Any]:
    """A manifest row; without a question it is a caption."""
    asked = [{"type": "text", "text": question}] if question else []
    esc = "esc10" if recording.esc10 else "esc50"
    return {
        "id": f"{esc}-{recording.fold}-{recording.source}-{recording.take}-{recording.category}-{name}",
        "source": esc,
        "kind": f"heard.{recording.category}",
        "messages": [
            {"role": "user", "content": [{"type": "audio", "audio": recording.path, "end": SECONDS}, *asked]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "licence": LICENCES[recording.esc10],
        "meta": {"fold": recording.fold, "clip": recording.source, "take": recording.take},
    }


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
