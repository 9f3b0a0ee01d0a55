"""Write short clips of every form with PyAV, and damage them."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image


def write(
    path: Path,
    draw: np.random.Generator,
    *,
    seconds: float = 2.0,
    fps: int = 12,
    size: tuple[int, int] = (96, 64),
    codec: str | None = "libx264",
    pixels: str = "yuv420p",
    times: Sequence[float] | None = None,
    rotate: int | None = None,
    sound: str | None = "aac",
    rate: int = 16_000,
    layout: str = "mono",
    sound_start: float = 0.0,
    sound_seconds: float | None = None,
    loudness: float = 0.3,
    tracks: int = 1,
    options: dict[str, str] | None = None,
    form: dict[str, str] | None = None,
) -> Path:
    """Write a clip of noise that moves and tones that change.

    `codec` or `sound` None leaves out the track.
    """
    with av.open(str(path), "w", options={"fflags": "+bitexact", **(form or {})}) as out:
        pictures = []
        sounds = []
        if codec is not None:
            video = out.add_stream(codec, rate=fps, options=options or {})
            video.width, video.height, video.pix_fmt = *size, pixels
            video.codec_context.thread_count = 1
            if times is not None:
                video.codec_context.time_base = Fraction(1, 1000)
            if rotate is not None:
                video.set_display_rotation(rotate)
            at = [i / fps for i in range(max(1, round(seconds * fps)))] if times is None else times
            base = Fraction(1, fps) if times is None else Fraction(1, 1000)
            pictures = [
                (time, video, frame)
                for time, frame in zip(at, frames(draw, at, size, base), strict=True)
            ]
        for _ in range(tracks if sound is not None else 0):
            audio = out.add_stream(sound, rate=rate, layout=layout)
            x = loudness * tones(draw, seconds if sound_seconds is None else sound_seconds, rate)
            sounds += [
                (time, audio, frame) for time, frame in pieces(audio, x, rate, layout, sound_start)
            ]
        for _, stream, frame in sorted([*pictures, *sounds], key=lambda item: item[0]):
            out.mux(stream.encode(frame))
        for stream in out.streams:
            out.mux(stream.encode(None))
    return path


def frames(
    draw: np.random.Generator, times: Sequence[float], size: tuple[int, int], base: Fraction
) -> Iterator[av.VideoFrame]:
    """Yield a blurred random picture that is pushed along."""
    width, height = size
    small = draw.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), np.uint8)
    picture = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC))
    for number, time in enumerate(times):
        frame = av.VideoFrame.from_ndarray(
            np.ascontiguousarray(np.roll(picture, 3 * number, 1)), "rgb24"
        )
        frame.pts, frame.time_base = round(time / base), base
        yield frame


def tones(draw: np.random.Generator, seconds: float, rate: int) -> np.ndarray:
    """float32 ``(S,)``: two tones and a little noise."""
    t = np.arange(max(1, round(seconds * rate))) / rate
    pitches = draw.uniform(200, min(1800, rate / 4), 2)
    x = sum(np.sin(2 * np.pi * pitch * t) for pitch in pitches) / 2 + 0.05 * draw.standard_normal(
        len(t)
    )
    return np.asarray(x, np.float32).clip(-1.3, 1.3)


def pieces(
    audio: Any, x: np.ndarray, rate: int, layout: str, start: float
) -> list[tuple[float, av.AudioFrame]]:
    """Return frames of a sound, as long as the encoder needs them, each with its time."""
    resampler = av.AudioResampler(audio.codec_context.format.name, layout, rate)
    each = audio.codec_context.frame_size or 1024
    channels = av.AudioLayout(layout).nb_channels
    frames: list[tuple[float, av.AudioFrame]] = []
    for first in range(0, len(x), each):
        packed = np.repeat(x[first : first + each], channels)[None]
        frame = av.AudioFrame.from_ndarray(packed, "flt", layout)
        frame.sample_rate = rate
        frame.time_base = Fraction(1, rate)
        frame.pts = first + round(start * rate)
        frames += [(start + first / rate, part) for part in resampler.resample(frame)]
    return frames


def cut(path: Path, share: float) -> Path:
    """Keep only the beginning of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: max(1, int(len(data) * share))])
    return path


def flip(
    path: Path, draw: np.random.Generator, count: int, low: float = 0.0, high: float = 1.0
) -> Path:
    """Replace some bytes by random ones."""
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    at = draw.integers(int(low * len(data)), max(1, int(high * len(data))), count)
    data[at] = draw.integers(0, 256, count)
    path.write_bytes(data.tobytes())
    return path


def patch(path: Path, mark: bytes, offset: int, value: bytes) -> Path:
    """Overwrite the bytes at an offset from each occurrence of a mark."""
    data = bytearray(path.read_bytes())
    at = -1
    while (at := data.find(mark, at + 1)) >= 0:
        data[at + offset : at + offset + len(value)] = value
    path.write_bytes(data)
    return path


def noise_packets(source: Path, target: Path, draw: np.random.Generator) -> Path:
    """Copy a file with noise in the place of its sound."""
    with av.open(str(source)) as read, av.open(str(target), "w") as out:
        copies = {s.index: out.add_stream_from_template(s) for s in read.streams}
        for packet in read.demux():
            if not packet.size:
                continue
            copy = packet
            if packet.stream.type == "audio":
                copy = av.Packet(draw.bytes(packet.size))
                copy.pts = packet.pts
                copy.dts = packet.dts
                copy.time_base = packet.time_base
            copy.stream = copies[packet.stream.index]
            out.mux(copy)
    return target


def copy_from(source: Path, target: Path, start: float) -> Path:
    """Cut without decoding, as most data sets are; an edit list hides what is before the start."""
    with av.open(str(source)) as read, av.open(str(target), "w") as out:
        stream = read.streams.video[0]
        copy = out.add_stream_from_template(stream)
        shift = round(start / stream.time_base)
        for packet in read.demux(stream):
            if packet.size:
                packet.pts -= shift
                packet.dts -= shift
                packet.stream = copy
                out.mux(packet)
    return target


def wav_header(rate: int, size: int, block: int = 2) -> bytes:
    """Return 44 bytes that announce 16-bit mono sound."""
    form = struct.pack(
        "<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, (rate * block) & 0xFFFFFFFF, block, 16
    )
    return (
        b"RIFF"
        + struct.pack("<I", (36 + size) & 0xFFFFFFFF)
        + b"WAVE"
        + form
        + struct.pack("<4sI", b"data", size)
    )
