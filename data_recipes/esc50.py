"""Turn ESC-50, or its older form ESC-10, into captions and questions of one test fold.

    python data_recipes/esc50.py SOURCE --output DIR --test-fold 1 [--esc10]

SOURCE holds either meta/esc50.csv and audio/*.wav (https://github.com/karolpiczak/ESC-50) or, in
the older form, one folder a class, `NNN - Class name/FOLD-CLIPID-TAKE.ogg`.

The authors' five folds are made for cross-validation: one is tested on, the others train.
captions_train.jsonl (sound, caption) and train.jsonl (sound, question, answer) hold each clip in
several wordings; captions_validation.jsonl and validation.jsonl a share of the training folds,
drawn class by class and by source recording (CLIPID); test.jsonl the test fold. Clips of other
folds that share their source recording with the test fold are left out. A clip that is missing
changes no split. Paper: K. J. Piczak, ESC: Dataset for Environmental Sound Classification, ACM
Multimedia 2015.
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
from avllm.recipes.frame import Dataset, Drop, RecipeError, RecipeRow, Record, drops_of, read_csv

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
FOLDER = re.compile(r"\d{3} - (?P<name>.+)")
FILE = re.compile(r"(?P<fold>\d+)-(?P<source>[^-]+)-(?P<take>[A-Z])\.(?:ogg|wav)")
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
QUESTIONS = [
    "What do you hear?",
    "What sound is this?",
    "Which sound do you hear?",
    "What is making this sound?",
]
LICENCES = {
    True: "CC BY 3.0 (ESC-10; the clips' own licences are in the data set's LICENSE)",
    False: "CC BY-NC 3.0",
}


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
    esc10: Annotated[
        bool, typer.Option("--esc10", help="Of ESC-50, only the ten classes of ESC-10.")
    ] = False,
    validation: Annotated[
        float, typer.Option(min=0.0, help="Share of the training folds' clips held out.")
    ] = 0.1,
    wordings: Annotated[
        int,
        typer.Option(
            min=1, max=len(QUESTIONS), help="Captions, and questions, of each training clip."
        ),
    ] = len(QUESTIONS),
    seed: Annotated[int, typer.Option(min=0, help="Draws the validation split.")] = 0,
) -> Iterator[RecipeRow | Drop]:
    """Yield captions and questions of the training and validation clips, and test questions."""
    if validation >= 1:
        raise RecipeError(
            f"--validation {validation}; expected a share from 0 to below 1", reason="bad_share"
        )
    recordings: list[Recording] = []
    yield from read_source(source, recordings)
    if esc10:
        for recording in recordings:
            if not recording.esc10:
                yield Drop("not_in_esc10", recording.path, recording.category)
        recordings = [recording for recording in recordings if recording.esc10]
    if not recordings:
        return
    recordings.sort(key=lambda recording: Path(recording.path).name)
    split = split_of(recordings, test_fold, validation, seed)
    for recording in split.shared:
        yield Drop("shares_source_with_test", recording.path, f"recording {recording.source}")
    yield from split_rows(split, wordings)


def read_source(source: Path, recordings: list[Recording]) -> Iterator[RecipeRow | Drop]:
    """Fill in the recordings of either form, and yield a drop for each that is left out."""
    table = source / "meta" / "esc50.csv"
    if table.is_file():
        records = read_csv(table, COLUMNS)
        yield from drops_of(records, lambda record: recordings.append(recording_of(record)))
    else:
        yield from read_folders(source, recordings)


def recording_of(record: Record) -> Recording:
    """Return the recording of a row of meta/esc50.csv.

    Raises:
        RecipeError: the fold is no number.
        RowError: this recipe has no words for the class.
    """
    category = record.text("category")
    fold = record.text("fold")
    if category not in ANSWERS:
        raise RowError("unknown_class", repr(category))
    if not fold.isdecimal():
        raise RecipeError(f"fold is {fold!r}; expected a number")
    return Recording(
        path=f"audio/{record.text('filename')}",
        fold=int(fold),
        source=record.text("src_file"),
        take=record.text("take"),
        category=category,
        esc10=record.text("esc10") == "True",
    )


def read_folders(source: Path, recordings: list[Recording]) -> Iterator[Drop]:
    """Fill in the recordings of the older form, and yield a drop for each file that is left out.

    The file's name holds fold, source recording and take, the folder's name the class.
    """
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        match = FOLDER.fullmatch(folder.name)
        category = OLD_NAMES.get(match["name"]) if match else None
        for file in sorted(folder.iterdir()):
            path = f"{folder.name}/{file.name}"
            parts = FILE.fullmatch(file.name)
            if category is None:
                yield Drop("unknown_class", path, repr(folder.name))
            elif parts is None:
                yield Drop("no_sound_of_the_set", path, "expected FOLD-CLIPID-TAKE.ogg")
            else:
                fold = int(parts["fold"])
                recordings.append(
                    Recording(path, fold, parts["source"], parts["take"], category, esc10=True)
                )


@dataclass(frozen=True)
class Split:
    """Recordings by use; no source recording is in two of the first three lists.

    Attributes:
        shared: recordings of other folds that share their source with the test fold: left out.
    """

    train: list[Recording]
    validation: list[Recording]
    test: list[Recording]
    shared: list[Recording]


def split_of(recordings: list[Recording], test_fold: int, share: float, seed: int) -> Split:
    """Split recordings into a test fold and the others, of which a share is for validation.

    The share is drawn by source recordings, class by class.

    Raises:
        RecipeError: the test fold, or every other fold, is empty.
    """
    folds = sorted({recording.fold for recording in recordings})
    if test_fold not in folds or len(folds) < 2:
        raise RecipeError(
            f"--test-fold {test_fold}: there are folds {folds}; choose one of at least two",
            reason="no_fold",
        )
    test = [recording for recording in recordings if recording.fold == test_fold]
    others = [recording for recording in recordings if recording.fold != test_fold]
    test_sources = {recording.source for recording in test}
    shared = [recording for recording in others if recording.source in test_sources]
    usable = [recording for recording in others if recording.source not in test_sources]
    held_out = validation_sources(usable, share, seed)
    return Split(
        train=[recording for recording in usable if recording.source not in held_out],
        validation=[recording for recording in usable if recording.source in held_out],
        test=test,
        shared=shared,
    )


def validation_sources(recordings: list[Recording], share: float, seed: int) -> set[str]:
    """Draw source recordings class by class, about ``share`` of each class's clips."""
    rng = np.random.default_rng([seed, 50])
    held_out: set[str] = set()
    for category in sorted({recording.category for recording in recordings}):
        clips = Counter(r.source for r in recordings if r.category == category)
        target = share * sum(clips.values())
        taken = sum(count for source, count in clips.items() if source in held_out)
        for source in rng.permutation(sorted(clips)).tolist():
            if taken + clips[source] / 2 > target:
                break
            held_out.add(source)
            taken += clips[source]
    return held_out


def split_rows(split: Split, wordings: int) -> Iterator[RecipeRow]:
    """Yield the rows of all manifests.

    Where answers are scored, each row names the classes that occur as its choices.
    """
    categories = {r.category for r in [*split.train, *split.validation, *split.test]}
    choices = [answer for category, answer in ANSWERS.items() if category in categories]
    yield from caption_rows("captions_train", split.train, wordings)
    yield from caption_rows("captions_validation", split.validation, 1)
    yield from question_rows("train", split.train, wordings)
    yield from question_rows("validation", split.validation, 1, choices)
    yield from question_rows("test", split.test, 1, choices)


def caption_rows(name: str, recordings: Sequence[Recording], wordings: int) -> Iterator[RecipeRow]:
    """Yield each clip with its first captions."""
    for recording in recordings:
        for number, wording in enumerate(CAPTIONS[:wordings]):
            caption = wording.format(ANSWERS[recording.category])
            yield RecipeRow(sample(recording, f"c{number}", None, caption), name)


def question_rows(
    name: str, recordings: Sequence[Recording], wordings: int, choices: Sequence[str] = ()
) -> Iterator[RecipeRow]:
    """Yield each clip with its first questions; the very first is 'What do you hear?'."""
    closed = {"choices": choices} if choices else {}
    for recording in recordings:
        answer = ANSWERS[recording.category]
        for number, question in enumerate(QUESTIONS[:wordings]):
            yield RecipeRow(sample(recording, f"q{number}", question, answer) | closed, name)


def sample(recording: Recording, name: str, question: str | None, answer: str) -> dict[str, Any]:
    """Return a manifest row; without a question it is a caption."""
    content: list[dict[str, Any]] = [{"type": "audio", "audio": recording.path, "end": SECONDS}]
    if question:
        content.append({"type": "text", "text": question})
    esc = "esc10" if recording.esc10 else "esc50"
    clip = f"{esc}-{recording.fold}-{recording.source}-{recording.take}-{recording.category}"
    return {
        "id": f"{clip}-{name}",
        "source": esc,
        "kind": f"heard.{recording.category}",
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "licence": LICENCES[recording.esc10],
        "meta": {"fold": recording.fold, "clip": recording.source, "take": recording.take},
    }


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
