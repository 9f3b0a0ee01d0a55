"""Draw what a model saw and heard of a row as small PNGs for a page."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from avllm.data.media.load import MediaError
from avllm.data.schema import RowError, Sample
from avllm.inference.perceived import Perceived, perceive

FRAMES = 6  # of a clip, at even distances
FRAME_HEIGHT = 72  # pixels
GAP = 3  # pixels between frames
SOUND_WIDTH = 320
SOUND_HEIGHT = 64
COLOURS = 64  # of a picture's palette: a third of the bytes
MEDIA = 2  # media parts of a row that are drawn
WAVE = (74, 127, 181)


class Pictures:
    """Read the media of rows again, and draw frames and sound as the encoders got them.

    Args:
        processor: of the model.
        root: the folder that relative paths start from.
    """

    def __init__(self, processor: Any, root: Path | None) -> None:
        self.processor = processor
        self.root = root

    def of(self, prompt: Sample) -> list[str]:
        """Return PNGs in base64, of each media part its frames and its sound.

        None of a part that cannot be read: the page lists such rows with the reason.
        """
        drawn: list[str] = []
        for part in prompt.media[:MEDIA]:
            try:
                (clip,) = self.processor.load_clips([part], self.root)
                inputs = self.processor.prepare(clip, prompt.last_question)
            except (MediaError, RowError):
                continue
            order = self.processor.order(inputs)
            media = perceive(part, clip, inputs, self.processor.preprocessors, order)
            drawn += [png(picture) for picture in draw(media)]
        return drawn


def draw(media: Perceived) -> list[Image.Image]:
    """Return the frames of a media part side by side, and its spectrogram or waveform."""
    pictures: list[Image.Image] = []
    if media.frames is not None and len(media.frames):
        pictures.append(strip(media.frames))
    if media.spectrogram is not None and media.spectrogram.numel():
        pictures.append(spectrogram(media.spectrogram))
    elif media.sound is not None and len(media.sound.x):
        pictures.append(waveform(media.sound.x))
    return pictures


def strip(frames: Tensor) -> Image.Image:
    """Draw at most ``FRAMES`` of uint8 frames ``(T, H, W, 3)`` side by side."""
    places = torch.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().long()
    height = frames.shape[1]
    width = max(1, min(4 * FRAME_HEIGHT, round(frames.shape[2] * FRAME_HEIGHT / height)))
    page = Image.new("RGB", ((width + GAP) * len(places) - GAP, FRAME_HEIGHT), "white")
    for number, place in enumerate(places.tolist()):
        frame = Image.fromarray(frames[place].numpy())
        page.paste(frame.resize((width, FRAME_HEIGHT)), (number * (width + GAP), 0))
    return page


def spectrogram(bands: Tensor) -> Image.Image:
    """Draw mel bands ``(mels, time)``, low ones below; black is the least of the clip."""
    values = bands.float().nan_to_num()
    low = values.min()
    scale = 255 / (values.max() - low).clamp(min=1e-6)
    grey = ((values - low) * scale).to(torch.uint8).flip(0)  # (mels, time)
    return Image.fromarray(grey.numpy()).resize((SOUND_WIDTH, SOUND_HEIGHT))


def waveform(samples: Tensor) -> Image.Image:
    """Draw the envelope of a waveform ``(S,)`` within -1 to 1."""
    page = Image.new("RGB", (SOUND_WIDTH, SOUND_HEIGHT), "white")
    pen = ImageDraw.Draw(page)
    middle = SOUND_HEIGHT / 2
    pieces = np.array_split(samples.float().nan_to_num().clamp(-1, 1).numpy(), SOUND_WIDTH)
    for x, piece in enumerate(pieces):
        if len(piece):
            top = middle - middle * float(piece.max())
            bottom = middle - middle * float(piece.min())
            pen.line((x, top, x, bottom), fill=WAVE)
    return page


def png(picture: Image.Image) -> str:
    """Return a picture of few colours as PNG in base64."""
    file = io.BytesIO()
    reduced = picture.quantize(COLOURS) if picture.mode == "RGB" else picture
    reduced.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")
