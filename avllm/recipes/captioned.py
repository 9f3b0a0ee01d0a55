"""Read, pair and group rows of one media file and one text, for recipes that make data."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from avllm.data.manifest import ManifestError, digest, iterate
from avllm.data.media.errors import MediaError
from avllm.data.schema import ImagePart, Sample, resolve
from avllm.recipes.frame import Drop
from avllm.recipes.media import EMPTY, MISSING
from avllm.recipes.readers import RecipeError

NAMES = frozenset(
    {"i", "christmas", "english", "french", "german", "spanish", "chinese", "african", "american"}
)
"""First words of captions that keep their capital."""

OPEN_GROUPS = 16
"""Groups of clips that are filled at a time."""

FRAME_REASONS = {"missing": MISSING, "zero_byte": EMPTY}
"""Reasons of media errors for which the frame has a name, since it lists the files."""


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
    """Yield the rows of a manifest that caption one clip, and a drop for each other row.

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
    """Return the drop of a clip that cannot be read.

    A file that is missing or empty gets the frame's reason, so that ``missing.txt`` names it.
    """
    if error.reason in FRAME_REASONS:
        return Drop(FRAME_REASONS[error.reason], where, error.path)
    return Drop(error.reason, where, str(error))


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file that decides what is made.

    A second start compares it, to know that the work is the same.

    Raises:
        RecipeError: no such file.
    """
    if not path.is_file():
        raise RecipeError(
            f"{path} is not there; expected a file that an option names (--manifest, ...)",
            reason="no_file",
        )
    return digest(path)


def _captioned(sample: Sample, row: int, where: str, root: Path, kind: str) -> Captioned | Drop:
    caption = " ".join((sample.answer or "").split())
    if not caption:
        return Drop("no_caption", where, sample.id)
    if len(sample.media) != 1:
        count = len(sample.media)
        return Drop("not_one_clip", where, f"{sample.id}: {count} media parts; expected one")
    part = sample.media[0]
    if isinstance(part, ImagePart) or (kind == "video" and part.type != "video"):
        return Drop(f"no_{kind}", where, f"{sample.id}: a part of type {part.type}")
    return Captioned(
        row=row,
        where=where,
        id=sample.id,
        path=str(resolve(part, root.resolve())),
        start=part.start,
        end=part.end,
        caption=caption,
        licence=sample.licence,
    )


def licences(names: list[str | None]) -> dict[str, str]:
    """Return the ``licence`` field of a row made of clips under these licences.

    Where a clip names none, the field says that it is unknown.
    """
    if not all(names):
        return {"licence": "unknown: a clip names none"}
    return {"licence": "; ".join(sorted({name for name in names if name}))}


def clause(caption: str) -> str:
    """Return a caption as a part of a sentence, without a full stop and with a small first letter.

    The first letter stays large where the first word is initials or a name.
    """
    text = caption.strip().rstrip(".!").strip()
    first = text.split(" ", 1)[0]
    capitalised = first[:1].isupper() and first[1:].islower()
    if first == "A" or (capitalised and first.lower() not in NAMES):
        return text[:1].lower() + text[1:]
    return text


def sentence(text: str) -> str:
    """Return a clause as a sentence, with a large first letter and a full stop at its end."""
    full_stop = "" if text.endswith((".", "!", "?")) else "."
    return text[:1].upper() + text[1:] + full_stop


def words(clip: Captioned) -> str:
    """Return the caption in the form in which captions are compared."""
    return clause(clip.caption).lower()


def pairs(
    clips: Sequence[Captioned], rng: np.random.Generator
) -> tuple[list[tuple[Captioned, Captioned]], list[Captioned]]:
    """Return the clips in random order, two by two, and those that have no partner.

    Two clips of the same caption are never a pair.
    """
    paired: list[tuple[Captioned, Captioned]] = []
    waiting: deque[Captioned] = deque()  # all of one caption
    for i in rng.permutation(len(clips)):
        if waiting and words(waiting[0]) != words(clips[i]):
            paired.append((waiting.popleft(), clips[i]))
        else:
            waiting.append(clips[i])
    return paired, list(waiting)


@dataclass(eq=False)
class OpenGroup:
    """Clips of a future video that has room for more: ``size`` in all."""

    size: int
    clips: list[Captioned]

    def takes(self, clip: Captioned) -> bool:
        """Return whether no clip of the group has the same caption."""
        return all(words(clip) != words(other) for other in self.clips)


def groups(
    clips: Sequence[Captioned], sizes: tuple[int, int], rng: np.random.Generator
) -> Iterator[list[Captioned]]:
    """Yield clips in random order, in groups of random size without two equal captions.

    Args:
        clips: all clips.
        sizes: the fewest and the most clips of a group; the last groups may be smaller.
        rng: draws order and sizes.
    """
    fewest, most = sizes
    open_groups: list[OpenGroup] = []
    for i in rng.permutation(len(clips)):
        clip = clips[i]
        group = next((group for group in open_groups if group.takes(clip)), None)
        if group is None:
            open_groups.append(OpenGroup(int(rng.integers(fewest, most + 1)), [clip]))
        else:
            group.clips.append(clip)
            if len(group.clips) == group.size:
                open_groups.remove(group)
                yield group.clips
        if len(open_groups) > OPEN_GROUPS:
            yield open_groups.pop(0).clips
    yield from (group.clips for group in open_groups)


def clusters(
    captions: Sequence[str], size: int, seed: int, vectors: np.ndarray | None = None
) -> np.ndarray:
    """Return the cluster of each caption, int ``(N,)``, about ``size`` captions in each.

    k-means on TF-IDF, or on the embeddings ``(N, D)`` that are given.
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    count = max(1, round(len(captions) / size))
    if count == 1:
        return np.zeros(len(captions), int)
    if vectors is None:
        vectors = TfidfVectorizer(
            stop_words="english", sublinear_tf=True, max_features=20_000
        ).fit_transform(captions)
    return MiniBatchKMeans(count, random_state=seed, n_init=3, batch_size=4096).fit_predict(vectors)
