"""Show a row of a manifest as the model gets it.

The chat with its media runs, the text that is trained on, and the encoders' view of the media.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.text import Text

from avllm.data.row import IGNORE, Row
from avllm.data.schema import RowError, Sample
from avllm.data.store.storage import local_path
from avllm.inference.drawing import plot_sound, sheet
from avllm.inference.perceived import Perceived, perceive

if TYPE_CHECKING:
    from avllm.models.processing_avllm import AVProcessor

STYLES = {"text": "", "trained": "bold green", "media": "cyan"}


@dataclass(frozen=True)
class Piece:
    """A stretch of a row's tokens: plain ``text``, ``trained`` text, or a ``media`` run."""

    kind: Literal["text", "trained", "media"]
    text: str
    tokens: int


@dataclass(frozen=True)
class Shown:
    """A row as the model gets it.

    Attributes:
        sample: the row of the manifest.
        row: its token ids and labels.
        pieces: the row, stretch by stretch.
        media: the encoders' view of each media part.
    """

    sample: Sample
    row: Row
    pieces: list[Piece]
    media: list[Perceived]

    @property
    def text(self) -> Text:
        """The pieces with colours: text that is trained on in green, media in cyan."""
        coloured = Text()
        for piece in self.pieces:
            coloured.append(piece.text, STYLES[piece.kind])
        return coloured

    @property
    def marked(self) -> str:
        """The pieces without colours: text that is trained on in ``[[`` and ``]]``."""
        texts = []
        for piece in self.pieces:
            text = f"[[{piece.text}]]" if piece.kind == "trained" else piece.text
            texts.append(text)
        return "".join(texts)


def show(processor: AVProcessor, sample: Sample, root: Path | None) -> Shown:
    """Make the training row of a sample and collect what is shown of it.

    Args:
        processor: the model's.
        sample: the row of the manifest.
        root: the manifest's folder.

    Raises:
        MediaError: a file cannot be read.
        RowError: no row can be made; ``no_answer``: no token of it is trained on; ``cut_run``: a
            media run is not whole.
    """
    clips = processor.load_clips(sample.media, root)
    inputs = [processor.prepare(clip) for clip in clips]
    orders = [processor.order(streams) for streams in inputs]
    row = processor.row(sample, inputs, runs=orders)
    media_token_ids = processor.config.media_token_ids
    streams_by_id = {token_id: stream for stream, token_id in media_token_ids.items()}
    check_row(row, orders, streams_by_id)
    media = [
        perceive(part, clip, streams, processor.preprocessors, order)
        for part, clip, streams, order in zip(sample.media, clips, inputs, orders, strict=True)
    ]
    return Shown(sample, row, list(pieces(row, streams_by_id, processor)), media)


def check_row(row: Row, orders: Sequence[list[str]], streams_by_id: dict[int, str]) -> None:
    """Check that a token of a row is trained on, and that its placeholders match its media.

    Args:
        row: token ids and labels.
        orders: for each media part, the stream of each of its tokens.
        streams_by_id: the stream of each placeholder's token id.

    Raises:
        RowError: ``no_answer`` or ``cut_run``.
    """
    if row.num_targets == 0:
        raise RowError("no_answer", "no token of this row is trained on: every label is masked")
    token_ids = row.input_ids.tolist()
    placeholders = [streams_by_id[i] for i in token_ids if i in streams_by_id]
    expected = list(itertools.chain.from_iterable(orders))
    if placeholders != expected:
        raise RowError(
            "cut_run",
            f"the row holds {dict(Counter(placeholders))} placeholders in {len(orders)} runs; "
            f"its media make {dict(Counter(expected))}. A media run was cut or moved",
        )


def pieces(row: Row, streams_by_id: dict[int, str], processor: AVProcessor) -> Iterator[Piece]:
    """Yield a row's tokens, stretch by stretch."""

    def kind_at(place: int) -> Literal["text", "trained", "media"]:
        if int(row.input_ids[place]) in streams_by_id:
            return "media"
        return "text" if int(row.labels[place]) == IGNORE else "trained"

    for kind, places in itertools.groupby(range(len(row.input_ids)), kind_at):
        token_ids = [int(row.input_ids[place]) for place in places]
        if kind == "media":
            counts = Counter(streams_by_id[i] for i in token_ids)
            runs = " + ".join(f"{count} {stream}" for stream, count in counts.items())
            text = f"⟨{runs}⟩"
        else:
            text = str(processor.tokenizer.decode(token_ids))
        yield Piece(kind, text, len(token_ids))


def save_pictures(shown: Shown, folder: Path) -> list[Path]:
    """Write the frames of each media part side by side, and its spectrogram, as PNG.

    Returns:
        The files: ``frames-0.png``, ``sound-0.png``, ...
    """
    folder = local_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, media in enumerate(shown.media):
        if media.frames is not None:
            path = folder / f"frames-{number}.png"
            span = media.span if media.duration > 0 else None
            sheet(media.frames, span).save(path)
            written.append(path)
        if media.sound is not None:
            path = folder / f"sound-{number}.png"
            plot_sound(media, path)
            written.append(path)
    return written
