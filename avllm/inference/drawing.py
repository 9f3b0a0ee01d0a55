"""Draw the encoders' view of a media part: frames, mel bands and waveform, a line of numbers."""

from __future__ import annotations

import html
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from avllm.inference.perceived import Perceived

SHEET_WIDTH = 1280  # pixels: a sheet of frames is at most so wide
SMALLEST = 128  # pixels: narrower frames are enlarged
LABEL = 14  # pixels: height of the line of text below a frame


def sheet(frames: Tensor, span: Tensor | None = None) -> Image.Image:
    """Draw uint8 frames ``(T, H, W, 3)`` in rows from left to right; enlarge small ones.

    Args:
        frames: at least one.
        span: ``(T, 2)`` seconds of the clip; the middle of each is written below its frame.
    """
    scale = max(1, SMALLEST // frames.shape[2])
    height = scale * frames.shape[1]
    width = scale * frames.shape[2]
    row_height = height if span is None else height + LABEL
    columns = max(1, min(len(frames), SHEET_WIDTH // width))
    rows = -(-len(frames) // columns)  # rounded up

    page = Image.new("RGB", (columns * width, rows * row_height))
    pen = ImageDraw.Draw(page)
    for number, frame in enumerate(frames):
        x = number % columns * width
        y = number // columns * row_height
        image = Image.fromarray(frame.numpy())
        page.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        if span is not None:
            seconds = float(span[number].mean())
            pen.text((x + 3, y + height + 1), f"{seconds:.2f} s", "white")
    return page


def plot_sound(media: Perceived, path: Path) -> None:
    """Draw the encoder's mel bands, or else the waveform, over the seconds of the clip."""
    from matplotlib.figure import Figure

    sound = media.sound
    assert sound is not None
    start = sound.start
    end = start + len(sound.x) / sound.rate
    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.add_subplot()
    if media.spectrogram is not None:
        bands = media.spectrogram
        extent = (start, end, 0, len(bands))
        axes.imshow(bands.numpy(), origin="lower", aspect="auto", extent=extent)
        axes.set_ylabel("mel band")
    else:
        axes.plot(np.linspace(start, end, len(sound.x)), sound.x.numpy(), linewidth=0.5)
    axes.set_xlabel("seconds of the clip")
    figure.savefig(path, dpi=100)


def escaped(text: str) -> str:
    """Return text whose punctuation Markdown shows unchanged: no emphasis, tags or links."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def as_html(text: str) -> str:
    """Return HTML that a browser shows as the text: tags and entities are escaped, nothing else."""
    return re.sub(r"<(?=[A-Za-z/!?])|&(?=[#\w])", lambda mark: html.escape(mark[0]), text)


def facts(perceived: Perceived) -> str:
    """Return one line in Markdown: seconds, frames, sound, tokens, and what was left out."""
    name = f"**{escaped(Path(perceived.part.path).name)}**"
    warnings = [f"⚠️ {escaped(warning)}" for warning in perceived.warnings]
    return " · ".join([name, *perceived.numbers, *warnings])


def frame_pictures(perceived: Perceived) -> list[tuple[Image.Image, str]]:
    """Return each frame with the seconds of the clip that it represents."""
    assert perceived.frames is not None
    assert perceived.span is not None
    pictures = []
    for frame, (start, end) in zip(perceived.frames, perceived.span.tolist(), strict=True):
        caption = f"{start:.2f}-{end:.2f} s" if end > start else ""
        pictures.append((Image.fromarray(frame.numpy()), caption))
    return pictures


def sound_picture(perceived: Perceived) -> Image.Image:
    """Draw the waveform and, below it, the encoder's mel bands.

    For an encoder of the waveform, a spectrogram is computed, for the eye only.
    """
    from matplotlib.figure import Figure

    sound = perceived.sound
    assert sound is not None
    extent = (sound.start, sound.start + len(sound.x) / sound.rate)
    figure = Figure(figsize=(7.2, 3.0), dpi=110, layout="constrained")
    wave, bands = figure.subplots(2, 1, sharex=True, height_ratios=[1, 2.2])

    step = max(1, len(sound.x) // 4000)
    seconds = [sound.start + i / sound.rate for i in range(0, len(sound.x), step)]
    wave.plot(seconds, sound.x[::step], linewidth=0.5)
    wave.set_ylabel("waveform")

    if perceived.spectrogram is not None:
        borders = (*extent, 0, len(perceived.spectrogram))
        bands.imshow(
            perceived.spectrogram, origin="lower", aspect="auto", extent=borders, cmap="magma"
        )
        bands.set_ylabel("mel band")
    else:
        width = min(256, len(sound.x))
        overlap = width // 2
        bands.specgram(sound.x, width, sound.rate, noverlap=overlap, xextent=extent, cmap="magma")
        bands.set_ylabel("Hz (for the eye only)")
    bands.set_xlabel("seconds of the clip")
    bands.set_xlim(*extent)
    for axes in (wave, bands):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
