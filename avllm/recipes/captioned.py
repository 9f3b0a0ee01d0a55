"""What recipes that make data are made of: the rows of a manifest that pair one media file with one text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from avllm.data.manifest import ManifestError, digest, iterate
from avllm.data.media.open import MediaError
from avllm.data.schema import ImagePart, Sample, resolve
from avllm.recipes.frame import Drop
from avllm.recipes.readers import EMPTY, MISSING, RecipeError

NAMES = frozenset({"i", "christmas", "english", "french", "german", "spanish", "chinese", "african", "american"})
"""First words of captions that keep their capital."""


@dataclass(frozen=True)
class Captioned:
    """A row of one media file and one caption.

    Attributes:
        row: its place among the manifest's rows, from 0.
        where: ``file:line``.
        path: the file, absolute.
        start: seconds of the file; None = its beginning.
        end: seconds of the file; None = its end.
        caption: the last answer, white space tidied.
    """

    row: int
    where: str
    id: str
    path: str
    start: float | None
    end: float | None
    caption: str
    licence: str | None


def captioned(manifest: Path, kind: Literal["video", "sound"]) -> Iterator[Captioned | Drop]:
    """The rows of a manifest that caption one clip.

    Args:
        manifest: JSONL, as any recipe writes it.
        kind: ``video`` = a video part; ``sound`` = an audio or a video part, whose sound is meant.

    Raises:
        RecipeError: no such file, or a line that is no sample.
    """
    try:
        for row, (line, sample) in enumerate(iterate(manifest)):
            yield _captioned(sample, row, f"{manifest.name}:{line}", manifest.parent, kind)
    except ManifestError as error:
        raise RecipeError(str(error)) from error


def unusable(error: MediaError, where: str) -> Drop:
    """Why a clip is left out; one that is not there, or empty, is told in the frame's words, which lists its file."""
    reason = {"missing": MISSING, "zero_byte": EMPTY}.get(error.reason)
    return Drop(reason, where, error.path) if reason else Drop(error.reason, where, str(error))


def file_digest(path: Path) -> str:
    """SHA-256 of a file that decides what is made, by which a second start knows that the work is the same.

    Raises:
        RecipeError: no such file.
    """
    if not path.is_file():
        raise RecipeError(f"{path} is not there; expected a file that the recipe's options name (--manifest, ...)")
    return digest(path)


def _captioned(sample: Sample, row: int, where: str, root: Path, kind: str) -> Captioned | Drop:
    caption = " ".join((sample.answer or "").split())
    if not caption:
        return Drop("no_caption", where, sample.id)
    if len(sample.media) != 1:
        return Drop("not_one_clip", where, f"{sample.id}: {len(sample.media)} media parts; expected one")
    part = sample.media[0]
    if isinstance(part, ImagePart) or (kind == "video" and part.type != "video"):
        return Drop(f"no_{kind}", where, f"{sample.id}: a part of type {part.type}")
    path = str(resolve(part, root.resolve()))
    return Captioned(row, where, sample.id, path, part.start, part.end, caption, sample.licence)


def licences(names: list[str | None]) -> dict[str, str]:
    """The ``licence`` field of a row that is made of clips under these; it says so where a clip names none."""
    known = sorted({name for name in names if name})
    return {"licence": "; ".join(known) if all(names) else "unknown: a clip names none"}


def clause(caption: str) -> str:
    """A caption as a part of a sentence: no full stop, the first letter small unless the word is initials or a name."""
    text = caption.strip().rstrip(".!").strip()
    first = text.split(" ", 1)[0]
    small = first == "A" or (first[:1].isupper() and first[1:].islower() and first.lower() not in NAMES)
    return text[:1].lower() + text[1:] if small else text


def sentence(text: str) -> str:
    """A clause as a sentence: first letter large, a full stop behind."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
