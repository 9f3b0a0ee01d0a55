"""Write media files piece by piece: H.264 + AAC in mp4 on one clock, and 16-bit wav.

The same pieces give the same bytes. Frame ``i`` is at ``i / fps`` seconds and sample ``j`` at
``j / rate``.
"""

from __future__ import annotations

import wave
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

AAC_FRAME = 1024  # samples
AAC_RATES = (
    *(8_000, 11_025, 12_000, 16_000, 22_050, 24_000),
    *(32_000, 44_100, 48_000, 64_000, 88_200, 96_000),
)
X264 = {"preset": "veryfast", "crf": "20", "bf": "0", "threads": "1"}
"""No B-frames, so that the picture needs no edit list; one thread, so that equal frames give equal
bytes."""


class Mp4Writer:
    """Write an mp4 with H.264 and, when ``rate`` is given, mono AAC.

    The AAC encoder puts 1,024 samples of priming before time 0. The muxer writes them into the edit
    list if each frame has a time; otherwise they are counted from 0, and the sound is late by them.

    Args:
        path: the file.
        fps: frames a second.
        width: pixels, even.
        height: pixels, even.
        rate: samples a second, one of ``AAC_RATES``; None = no sound track.

    Attributes:
        frames: frames written.
        samples: samples written.
    """

    def __init__(self, path: Path, *, fps: int, width: int, height: int, rate: int | None) -> None:
        if width % 2 or height % 2:
            raise ValueError(f"a picture of {width}x{height}; H.264 needs even numbers")
        self.fps = fps
        self.rate = rate
        self.frames = 0
        self.samples = 0
        self._rest = np.zeros(0, np.float32)  # samples that do not fill an AAC frame yet
        self._file: Any = av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"})
        self._video: Any = self._file.add_stream("libx264", rate=fps, options=X264)
        self._video.width = width
        self._video.height = height
        self._video.pix_fmt = "yuv420p"
        self._audio: Any = None
        if rate is not None:
            options = {"aac_coder": "fast"}
            self._audio = self._file.add_stream("aac", rate=rate, layout="mono", options=options)
            self._audio.bit_rate = 96_000

    def add(self, frames: np.ndarray, sound: np.ndarray | None) -> None:
        """Append uint8 frames ``(T, H, W, 3)`` and float32 samples ``(S,)``, full scale 1."""
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = self.frames
            frame.time_base = Fraction(1, self.fps)
            self._file.mux(self._video.encode(frame))
            self.frames += 1
        if sound is not None and self._audio is not None:
            samples = np.concatenate([self._rest, np.clip(sound, -1, 1).astype(np.float32)])
            whole = len(samples) // AAC_FRAME * AAC_FRAME
            self._encode(samples[:whole])
            self._rest = samples[whole:]

    def _encode(self, x: np.ndarray) -> None:
        rate = int(self._audio.rate)
        for first in range(0, len(x), AAC_FRAME):
            piece = np.ascontiguousarray(x[None, first : first + AAC_FRAME])
            frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="mono")
            frame.sample_rate = rate
            frame.pts = self.samples
            frame.time_base = Fraction(1, rate)
            self._file.mux(self._audio.encode(frame))
            self.samples += piece.shape[1]

    def close(self) -> None:
        """Write the frames that the encoders hold, and the index."""
        self._file.mux(self._video.encode(None))
        if self._audio is not None:
            self._encode(self._rest)
            self._file.mux(self._audio.encode(None))
        self._file.close()

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def write_wav(path: Path, x: np.ndarray, rate: int) -> None:
    """Write float32 samples ``(S,)``, full scale 1, as 16-bit mono."""
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((np.clip(x, -1, 1) * 32767).round().astype("<i2").tobytes())


def fitted(frames: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize frames ``(T, H, W, 3)`` with their aspect, on black: ``(T, height, width, 3)``."""
    old_height, old_width = frames.shape[1:3]
    if (old_width, old_height) == (width, height):
        return frames
    scale = min(width / old_width, height / old_height)
    w = max(1, round(old_width * scale))
    h = max(1, round(old_height * scale))
    x = (width - w) // 2
    y = (height - h) // 2
    out = np.zeros((len(frames), height, width, 3), np.uint8)
    for number, frame in enumerate(frames):
        picture = Image.fromarray(frame).resize((w, h), Image.Resampling.BILINEAR)
        out[number, y : y + h, x : x + w] = np.asarray(picture)
    return out


def faster(x: np.ndarray, rate: int, speed: float, length: int) -> np.ndarray:
    """Play a sound ``(S,)`` ``speed`` times as fast at the same pitch, ``length`` samples long.

    It is FFmpeg's ``atempo``, an overlap-add of windows: beginning and end are exact, samples
    between may be off by 40 ms.
    """
    y = x
    if speed != 1:
        y = np.concatenate([np.zeros(0, np.float32), *_tempo(x, rate, speed)])
    return np.pad(y[:length], (0, max(0, length - len(y))))


def _tempo(x: np.ndarray, rate: int, speed: float) -> Iterator[np.ndarray]:
    """Yield the pieces of a sound at another tempo."""
    graph = av.filter.Graph()
    source = graph.add_abuffer(
        sample_rate=rate,
        format="flt",
        layout="mono",
        time_base=Fraction(1, rate),
    )
    tempo = graph.add("atempo", f"{speed:.6f}")
    graph.link_nodes(source, tempo, graph.add("abuffersink")).configure()
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(x[None]), format="flt", layout="mono")
    frame.sample_rate = rate
    frame.pts = 0
    frame.time_base = Fraction(1, rate)
    graph.push(frame)
    graph.push(None)
    while True:
        try:
            yield graph.pull().to_ndarray().reshape(-1)  # type: ignore[union-attr]
        except (av.error.EOFError, av.error.BlockingIOError):
            return
