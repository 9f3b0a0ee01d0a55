"""Media files that recipes make: H.264 + AAC in mp4, written piece by piece on one clock, and 16-bit wav.

The same pieces give the same bytes. Frame ``i`` stands at ``i / fps`` seconds and sample ``j`` at ``j / rate``.
"""

from __future__ import annotations

import wave
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
from PIL import Image

AAC_FRAME = 1024  # samples
AAC_RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 64_000, 88_200, 96_000)
X264 = {"preset": "veryfast", "crf": "20", "bf": "0", "threads": "1"}
"""No B-frames, so that the picture needs no edit list; one thread, so that the bytes follow from the frames."""


class Mp4Writer:
    """An mp4 with H.264 and, when ``rate`` is given, mono AAC.

    The AAC encoder puts 1,024 samples of priming before time 0 and the muxer writes them into the edit list, as long as
    each frame carries its time; left without one they are counted from 0 and the sound is late by them.

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
            raise ValueError(f"a picture of {width}x{height}; H.264 wants even numbers")
        self.fps, self.rate = fps, rate
        self.frames = self.samples = 0
        self._left = np.zeros(0, np.float32)  # samples that do not fill an AAC frame yet
        self._file: Any = av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"})
        self._video: Any = self._file.add_stream("libx264", rate=fps, options=X264)
        self._video.width, self._video.height, self._video.pix_fmt = width, height, "yuv420p"
        self._audio: Any = None
        if rate is not None:
            self._audio = self._file.add_stream("aac", rate=rate, layout="mono", options={"aac_coder": "fast"})
            self._audio.bit_rate = 96_000

    def add(self, frames: np.ndarray, sound: np.ndarray | None) -> None:
        """Append uint8 frames ``(T, H, W, 3)`` and float32 samples ``(S,)``, full scale 1."""
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = self.frames, Fraction(1, self.fps)
            self._file.mux(self._video.encode(frame))
            self.frames += 1
        if sound is not None and self._audio is not None:
            self._left = np.concatenate([self._left, np.clip(sound, -1, 1).astype(np.float32)])
            whole = len(self._left) // AAC_FRAME * AAC_FRAME
            self._encode(self._left[:whole])
            self._left = self._left[whole:]

    def _encode(self, x: np.ndarray) -> None:
        rate = int(self._audio.rate)
        for first in range(0, len(x), AAC_FRAME):
            piece = np.ascontiguousarray(x[None, first : first + AAC_FRAME])
            frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, self.samples, Fraction(1, rate)
            self._file.mux(self._audio.encode(frame))
            self.samples += piece.shape[1]

    def close(self) -> None:
        """Write what the encoders still hold, and the index."""
        self._file.mux(self._video.encode(None))
        if self._audio is not None:
            self._encode(self._left)
            self._file.mux(self._audio.encode(None))
        self._file.close()

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
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
    """Frames ``(T, H, W, 3)`` at another size, their aspect kept, on black: ``(T, height, width, 3)``."""
    old_height, old_width = frames.shape[1:3]
    if (old_width, old_height) == (width, height):
        return frames
    scale = min(width / old_width, height / old_height)
    w, h = max(1, round(old_width * scale)), max(1, round(old_height * scale))
    x, y = (width - w) // 2, (height - h) // 2
    out = np.zeros((len(frames), height, width, 3), np.uint8)
    for number, frame in enumerate(frames):
        out[number, y : y + h, x : x + w] = np.asarray(Image.fromarray(frame).resize((w, h), Image.Resampling.BILINEAR))
    return out


def faster(x: np.ndarray, rate: int, speed: float, length: int) -> np.ndarray:
    """Sound ``(S,)`` played ``speed`` times as fast at the same pitch, exactly ``length`` samples long.

    FFmpeg's ``atempo``, an overlap-add of windows: beginning and end are kept, what is between may stand off by 40 ms.
    """
    y = x if speed == 1 else np.concatenate([np.zeros(0, np.float32), *_tempo(x, rate, speed)])
    return np.pad(y[:length], (0, max(0, length - len(y))))


def _tempo(x: np.ndarray, rate: int, speed: float) -> Iterator[np.ndarray]:
    graph = av.filter.Graph()
    source = graph.add_abuffer(sample_rate=rate, format="flt", layout="mono", time_base=Fraction(1, rate))
    graph.link_nodes(source, graph.add("atempo", f"{speed:.6f}"), graph.add("abuffersink")).configure()
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(x[None]), format="flt", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    graph.push(frame)
    graph.push(None)
    while True:
        try:
            yield graph.pull().to_ndarray().reshape(-1)  # type: ignore[union-attr]
        except (av.error.EOFError, av.error.BlockingIOError):
            return
