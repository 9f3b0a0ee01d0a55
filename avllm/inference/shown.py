"""One row of a manifest as the model gets it: the chat with its media runs, what is trained on, seen and heard."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageDraw
from rich.text import Text
from torch import Tensor

from avllm.data.row import IGNORE, Row
from avllm.data.schema import RowError, Sample
from avllm.data.store.storage import local_path
from avllm.inference.perceived import Perceived, perceive

if TYPE_CHECKING:
    from avllm.models.processing_avllm import AVProcessor

STYLES = {"text": "", "trained": "bold green", "media": "cyan"}
SHEET_WIDTH, SMALLEST, LABEL = 1280, 128, 14  # pixels: of a sheet of frames, of a frame's width, of the line below it


@dataclass(frozen=True)
class Piece:
    """A stretch of a row's tokens: plain ``text``, text that is ``trained`` on, or a ``media`` run."""

    kind: Literal["text", "trained", "media"]
    text: str
    tokens: int


@dataclass(frozen=True)
class Shown:
    """A row as the model gets it.

    Attributes:
        sample: as the manifest has it. row: its token ids and labels.
        pieces: the row, stretch by stretch.
        media: what was perceived of each media part.
    """

    sample: Sample
    row: Row
    pieces: list[Piece]
    media: list[Perceived]

    @property
    def text(self) -> Text:
        """The pieces with colours: what is trained on in green, media in cyan."""
        found = Text()
        for piece in self.pieces:
            found.append(piece.text, STYLES[piece.kind])
        return found

    @property
    def marked(self) -> str:
        """The pieces without colours: what is trained on in ``[[`` and ``]]``."""
        return "".join(f"[[{piece.text}]]" if piece.kind == "trained" else piece.text for piece in self.pieces)


def show(processor: AVProcessor, sample: Sample, root: Path | None) -> Shown:
    """Make the training row of a sample, and look at it.

    Args:
        processor: of the model. root: the manifest's folder.

    Raises:
        MediaError: a file cannot be read. RowError: no row can be made; ``no_answer``: no token of it is trained on;
            ``cut_run``: a media run is not whole.
    """
    clips = processor.load_clips(sample.media, root)
    inputs = [processor.prepare(clip) for clip in clips]
    orders = [processor.order(each) for each in inputs]
    row = processor.row(sample, inputs, runs=orders)
    names = {i: stream for stream, i in processor.config.media_token_ids.items()}
    check_row(row, orders, names)
    media = [
        perceive(part, clip, each, processor.preprocessors, order)
        for part, clip, each, order in zip(sample.media, clips, inputs, orders, strict=True)
    ]
    return Shown(sample, row, list(pieces(row, names, processor)), media)


def check_row(row: Row, orders: Sequence[list[str]], names: dict[int, str]) -> None:
    """Whether something of a row is trained on, and its placeholders are those of its media.

    Args:
        row: token ids and labels. orders: the stream of each token of each media part. names: streams by placeholder.

    Raises:
        RowError: ``no_answer`` or ``cut_run``.
    """
    if row.num_targets == 0:
        raise RowError("no_answer", "no token of this row is trained on: every label is masked")
    there = [names[int(i)] for i in row.input_ids if int(i) in names]
    expected = list(itertools.chain.from_iterable(orders))
    if there != expected:
        seen = f"the row holds {dict(Counter(there))} placeholders in {len(orders)} runs"
        raise RowError("cut_run", f"{seen}; its media make {dict(Counter(expected))}. A media run was cut or moved")


def pieces(row: Row, names: dict[int, str], processor: AVProcessor) -> Iterator[Piece]:
    """A row's tokens, stretch by stretch."""

    def kind(place: int) -> Literal["text", "trained", "media"]:
        if int(row.input_ids[place]) in names:
            return "media"
        return "text" if int(row.labels[place]) == IGNORE else "trained"

    for found, places in itertools.groupby(range(len(row.input_ids)), kind):
        ids = [int(row.input_ids[i]) for i in places]
        if found == "media":
            streams = Counter(names[i] for i in ids)
            text = "⟨" + " + ".join(f"{count} {stream}" for stream, count in streams.items()) + "⟩"
        else:
            text = str(processor.tokenizer.decode(ids))
        yield Piece(found, text, len(ids))


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
            written.append(folder / f"frames-{number}.png")
            moving = media.span is not None and media.duration > 0
            sheet(media.frames, media.span if moving else None).save(written[-1])
        if media.sound is not None:
            written.append(folder / f"sound-{number}.png")
            plot_sound(media, written[-1])
    return written


def sheet(frames: Tensor, span: Tensor | None = None) -> Image.Image:
    """uint8 frames ``(T, H, W, 3)`` in rows from left to right, small ones enlarged.

    Args:
        span: ``(T, 2)`` seconds of the clip; with it, the middle of each stands below its frame.
    """
    times, larger = len(frames), max(1, SMALLEST // frames.shape[2])
    height, width = larger * frames.shape[1], larger * frames.shape[2]
    columns, below = max(1, min(times, SHEET_WIDTH // width)), 0 if span is None else LABEL
    page = Image.new("RGB", (columns * width, -(-times // columns) * (height + below)))
    for number, frame in enumerate(frames):
        x, y = number % columns * width, number // columns * (height + below)
        page.paste(Image.fromarray(frame.numpy()).resize((width, height), Image.Resampling.NEAREST), (x, y))
        if span is not None:
            ImageDraw.Draw(page).text((x + 3, y + height + 1), f"{float(span[number].mean()):.2f} s", "white")
    return page


def plot_sound(media: Perceived, path: Path) -> None:
    """The spectrogram as the encoder takes it, or else the waveform, over seconds of the clip."""
    from matplotlib.figure import Figure

    assert media.sound is not None
    start = media.sound.start
    end = start + len(media.sound.x) / media.sound.rate
    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.add_subplot()
    if media.spectrogram is not None:
        bands = media.spectrogram
        axes.imshow(bands.numpy(), origin="lower", aspect="auto", extent=(start, end, 0, len(bands)))
        axes.set_ylabel("mel band")
    else:
        axes.plot(np.linspace(start, end, len(media.sound.x)), media.sound.x.numpy(), linewidth=0.5)
    axes.set_xlabel("seconds of the clip")
    figure.savefig(path, dpi=100)
