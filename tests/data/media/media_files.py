"""Write and read the media of tests: frames show their number, clicks lie at known times."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.audio.frame import AudioFrame
from av.video.frame import VideoFrame

from avllm.data.media.load import Clip, MediaError, Sampling, load_video

WIDTH, HEIGHT, BITS = 160, 96, 10
RATE = 16_000  # of the sound that is read
QUIET = {"libx265": {"x265-params": "log-level=none"}, "libsvtav1": {"preset": "10"}}

FORMATS: dict[str, tuple[str, dict[str, str]]] = {
    "a.mp4": ("libx264", {}),
    "a.mkv": ("libx264", {}),
    "open.mp4": ("libx264", {"x264-params": "open-gop=1:bframes=3:keyint=25:scenecut=0"}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=none:open-gop=1:keyint=25"}),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "mpeg4.avi": ("mpeg4", {}),
    "h264.avi": ("libx264", {}),
    "a.ts": ("libx264", {}),
    "a.flv": ("libx264", {}),
    "a.mpg": ("mpeg2video", {}),
    "av1.mp4": ("libsvtav1", {"preset": "10"}),
}


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """RGB (H, W, 3): the number as black and white columns above, red left, green right below."""
    x = np.zeros((height, width, 3), np.uint8)
    for bit in range(BITS):
        x[: height // 2, bit * width // BITS : (bit + 1) * width // BITS] = 255 * (
            number >> bit & 1
        )
    x[height // 2 :, : width // 2] = (255, 0, 0)
    x[height // 2 :, width // 2 :] = (0, 255, 0)
    return x


def number_of(frame: np.ndarray) -> int:
    """The number that a frame (H, W, 3) shows."""
    height, width = frame.shape[:2]
    row = frame[height // 4].mean(-1)
    return sum(1 << bit for bit in range(BITS) if row[int((bit + 0.5) * width / BITS)] > 127)


def numbers(frames: object) -> list[int]:
    """The numbers that frames (T, H, W, 3) show."""
    return [number_of(np.asarray(frame)) for frame in frames]  # type: ignore[attr-defined]


def clicks(seconds: float, rate: int, at: Sequence[float], channels: int = 1) -> np.ndarray:
    """float32 (C, S): silence with 2 ms of tone at each of the times."""
    x = np.zeros((channels, round(seconds * rate)), np.float32)
    tone = 0.8 * np.sin(2 * np.pi * 1000 * np.arange(round(0.002 * rate)) / rate + 0.5).astype(
        np.float32,
    )
    for time in at:
        first = round(time * rate)
        x[:, first : first + len(tone)] = tone[: x.shape[1] - first]
    return x


def write_clip(
    path: Path,
    *,
    times: Sequence[float] | None = None,
    seconds: float = 4.0,
    fps: int = 25,
    codec: str = "libx264",
    gop: int = 50,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    options: dict[str, str] | None = None,
    rotate: int | None = None,
    sound: np.ndarray | None = None,
    rate: int = 48_000,
    sound_codec: str = "aac",
    sound_start: float = 0.0,
    layout: str = "mono",
    container_options: dict[str, str] | None = None,
) -> Path:
    """Write a clip; ``times`` (seconds of each frame) vary the rate, ``sound`` is (C, S) floats."""
    pts = [round(t * 1000) for t in times] if times else list(range(round(seconds * fps)))
    base = Fraction(1, 1000) if times else Fraction(1, fps)
    with same_scheduling(), av.open(str(path), "w", options=container_options or {}) as container:
        video = container.add_stream(codec, rate=fps, options=options or QUIET.get(codec, {}))
        video.width, video.height, video.pix_fmt, video.gop_size = *size, "yuv420p", gop
        video.codec_context.time_base = base
        video.codec_context.thread_count = 1
        if rotate is not None:
            video.set_display_rotation(rotate)
        audio = (
            None if sound is None else container.add_stream(sound_codec, rate=rate, layout=layout)
        )
        chunks = (
            []
            if audio is None or sound is None
            else list(sound_frames(audio, sound, rate, layout, sound_start))
        )
        for number, at in enumerate(pts):
            frame = VideoFrame.from_ndarray(picture(number, *size), "rgb24")
            frame.pts, frame.time_base = at, base
            container.mux(video.encode(frame))
            while audio is not None and chunks and chunks[0].pts * chunks[0].time_base <= at * base:
                container.mux(audio.encode(chunks.pop(0)))
        container.mux(video.encode(None))
        if audio is not None:
            for chunk in [*chunks, None]:
                container.mux(audio.encode(chunk))
    return path


@contextmanager
def same_scheduling() -> Iterator[None]:
    """SVT-AV1 makes its thread a realtime one where it may (as root), and all started later."""
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, priority)


def write_format(folder: Path, name: str) -> Path:
    """One of ``FORMATS``: 3 s with a key frame every second."""
    codec, options = FORMATS[name]
    path = folder / name
    return (
        path if path.exists() else write_clip(path, seconds=3, codec=codec, gop=25, options=options)
    )


def sound_frames(
    audio,
    sound: np.ndarray,
    rate: int,
    layout: str,
    start: float = 0.0,
) -> Iterator[AudioFrame]:
    """Frames of (C, S) float32 for an encoder; explicit timestamps let it signal its priming."""
    resampler = av.AudioResampler(audio.codec_context.format.name, layout, rate)
    size = audio.codec_context.frame_size or 1024
    for first in range(0, sound.shape[1], size):
        packed = np.ascontiguousarray(sound[:, first : first + size].T).reshape(1, -1)
        frame = AudioFrame.from_ndarray(packed, "flt", layout)
        frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
        frame.pts = first + round(start * rate)
        yield from resampler.resample(frame)


def write_audio(
    path: Path,
    sound: np.ndarray,
    rate: int,
    codec: str = "pcm_s16le",
    layout: str = "mono",
) -> Path:
    """Write a file with sound only."""
    with av.open(str(path), "w") as container:
        audio = container.add_stream(codec, rate=rate, layout=layout)
        for frame in [*sound_frames(audio, sound, rate, layout), None]:
            container.mux(audio.encode(frame))
    return path


def cut_copy(source: Path, target: Path, start: float) -> Path:
    """Cut without re-encoding: an edit list hides the frames from the key frame to ``start``."""
    with av.open(str(source)) as read, av.open(str(target), "w") as write:
        video = read.streams.video[0]
        copy = write.add_stream_from_template(video)
        shift = round(start / video.time_base)
        read.seek(shift, stream=video)
        for packet in read.demux(video):
            if packet.size:
                packet.pts -= shift
                packet.dts -= shift
                packet.stream = copy
                write.mux(packet)
    return target


def drop_sound_packets(source: Path, target: Path, first: float, last: float) -> Path:
    """Copy a file without the sound packets between two times: a hole in the track."""
    with av.open(str(source)) as read, av.open(str(target), "w") as write:
        copies = {s.index: write.add_stream_from_template(s) for s in read.streams}
        for packet in read.demux():
            inside = packet.pts is not None and first <= packet.pts * packet.time_base < last
            if packet.size and not (packet.stream.type == "audio" and inside):
                packet.stream = copies[packet.stream.index]
                write.mux(packet)
    return target


def spoil_sound(source: Path, target: Path) -> Path:
    """Copy a file with every sound packet replaced by noise."""
    noise = np.random.default_rng(0)
    with av.open(str(source)) as read, av.open(str(target), "w") as write:
        copies = {s.index: write.add_stream_from_template(s) for s in read.streams}
        for packet in read.demux():
            if not packet.size:
                continue
            if packet.stream.type == "audio":
                bad = av.Packet(noise.bytes(packet.size))
                bad.pts, bad.dts, bad.time_base = packet.pts, packet.dts, packet.time_base
                bad.stream = copies[packet.stream.index]
                write.mux(bad)
            else:
                packet.stream = copies[packet.stream.index]
                write.mux(packet)
    return target


def reason(call: Callable[[], object]) -> str:
    """The reason of the ``MediaError`` that a call must raise."""
    with pytest.raises(MediaError) as caught:
        call()
    return caught.value.reason


def click_times(found: Clip) -> list[float]:
    """Seconds of the clip at which a click begins."""
    assert found.sound is not None
    loud = torch.nonzero(found.sound.x.abs() > 0.2).flatten().tolist()
    firsts = [i for k, i in enumerate(loud) if k == 0 or i - loud[k - 1] > 0.1 * found.sound.rate]
    return [found.sound.start + i / found.sound.rate for i in firsts]


def video(path: Path, n: int = 8, **options) -> Clip:
    """``n`` uniform frames, no sound."""
    options = {"sampling": Sampling(num_frames=n), "rate": None, **options}
    return load_video(path, **options)


def write_plain_mp3(path: Path, sound: np.ndarray, rate: int) -> Path:
    """An MP3 of variable bit rate that does not say how long it is."""
    with av.open(str(path), "w", options={"write_xing": "0"}) as container:
        options = {"global_quality": str(5 * 118), "flags": "+qscale"}
        audio = container.add_stream("libmp3lame", rate=rate, layout="mono", options=options)
        for frame in [*sound_frames(audio, sound, rate, "mono"), None]:
            container.mux(audio.encode(frame))
    return path


def set_display_matrix(source: Path, target: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Copy an MP4 whose one track is shown through the matrix (a, b, c, d) of ISO 14496-12."""
    data = bytearray(source.read_bytes())
    at = data.find(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    target.write_bytes(data)
    return target
