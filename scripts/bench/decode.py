"""Measure reading 16 frames at 224 and the sound of 10 s of 640x360 H.264 with AAC, on one core.

    python scripts/bench/decode.py [--json] [--turns 15] [--memory 5000] [--backend auto]

Three contestants, turn by turn in one process, so that whatever else the machine does meets all of
them:

    ours    `load_video`
    plain   the usual loop: decord at full size, resized in torch; the whole file's sound decoded
            and resampled
    limit   libav alone decodes the packets that the 16 frames and the sound need; nothing is
            converted, scaled or resampled

`--memory N` then reads N clips and prints by how many MiB the process grew.
"""

from __future__ import annotations

import argparse
import bisect
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torchaudio
from av.audio.frame import AudioFrame
from av.video.frame import VideoFrame

from avllm.data.media.load import Sampling, load_video
from avllm.evaluation.environment import environment

WIDTH = 640
HEIGHT = 360
FPS = 30
SECONDS = 10
BIT_RATE = 800_000  # of the picture; clips of this size on the web have 600,000 to 1,000,000
SOUND = 44_100  # samples a second of the clip
RATE = 16_000  # samples a second that are asked for
FRAMES = 16
SIDE = 224
FASTER_THAN_PLAIN = 1.15
OVER_LIMIT = 1.10


def make_clip(path: Path) -> None:
    """Write a clip of a drifting landscape and two balls, with a chord and noise in stereo."""
    drawn = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, : 2 * WIDTH].astype(np.float32)
    hills = 110 + 60 * np.sin(x / 37 + 2 * np.sin(y / 23)) + 40 * np.sin(y / 11)
    scene = np.stack([hills, np.roll(hills, 90, 1), np.roll(hills, 200, 1)], -1)  # (H, 2W, 3)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS, options={"preset": "medium"})
        video.bit_rate = BIT_RATE
        video.width = WIDTH
        video.height = HEIGHT
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_count = 1
        sound = container.add_stream("aac", rate=SOUND, layout="stereo")
        for number in range(FPS * SECONDS):
            picture = scene[:, 2 * number : 2 * number + WIDTH] + drawn.normal(
                0, 4, (HEIGHT, WIDTH, 1)
            )
            for ball, colour in ((1, (230, 40, 40)), (2, (40, 60, 230))):
                at = (
                    WIDTH / 2 + 250 * np.sin(number / 20 * ball),
                    HEIGHT / 2 + 120 * np.cos(number / 13 * ball),
                )
                picture[(x[:, :WIDTH] - at[0]) ** 2 + (y[:, :WIDTH] - at[1]) ** 2 < 900] = colour
            container.mux(
                video.encode(
                    VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), "rgb24")
                )
            )
        container.mux(video.encode())
        t = np.arange(SOUND * SECONDS) / SOUND
        wave = np.stack(
            [
                0.2 * np.sin(2 * np.pi * 330 * t) + 0.1 * np.sin(2 * np.pi * 1175 * t),
                drawn.normal(0, 0.05, len(t)),
            ]
        )
        frame = AudioFrame.from_ndarray(wave.astype(np.float32), "fltp", "stereo")
        frame.sample_rate = SOUND
        frame.pts = 0
        container.mux(sound.encode(frame))
        container.mux(sound.encode())


def moments() -> list[float]:
    """Return the centre of each of the 16 parts of the clip, in seconds."""
    return [(number + 0.5) * SECONDS / FRAMES for number in range(FRAMES)]


def ours(path: Path, backend: str = "auto") -> tuple[Any, Any]:
    """Return frames ``(16, 224, W, 3)`` and sound ``(S,)``."""
    sampling = Sampling(num_frames=FRAMES, short_side=SIDE)
    clip = load_video(path, sampling=sampling, rate=RATE, backend=backend)
    assert clip.frames is not None
    assert clip.sound is not None
    return clip.frames.x, clip.sound.x


def plain(path: Path) -> tuple[Any, Any]:
    """Return the same, as it is usually written."""
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    indices = [min(int(moment * reader.get_avg_fps()), len(reader) - 1) for moment in moments()]
    pictures = torch.from_numpy(reader.get_batch(indices).asnumpy()).permute(
        0, 3, 1, 2
    )  # (T, 3, H, W)
    size = (SIDE, round(WIDTH * SIDE / HEIGHT))
    small = torch.nn.functional.interpolate(
        pictures, size, mode="bilinear", antialias=True
    ).permute(0, 2, 3, 1)
    with av.open(str(path)) as container:
        container.streams.audio[0].thread_count = 1
        pieces = [frame.to_ndarray() for frame in container.decode(audio=0)]  # (C, S) each
    heard = torch.from_numpy(np.concatenate(pieces, 1).mean(0))
    return small.contiguous(), torchaudio.functional.resample(heard, SOUND, RATE)


def limit(path: Path) -> tuple[Any, Any]:
    """Decode what has to be decoded; how many frames of each kind there were."""
    seen = heard = 0
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        audio = container.streams.audio[0]
        for stream in (video, audio):
            stream.codec_context.thread_count = 1
        packets = []
        for packet in container.demux(video, audio):
            if packet.stream is audio:
                heard += len(audio.codec_context.decode(packet))
            elif packet.size:
                packets.append(packet)
        at_moments, needed = packets_of(packets)
        for number, packet in enumerate(packets):
            if number in needed:
                video.codec_context.skip_frame = "DEFAULT" if number in at_moments else "NONREF"
                seen += len(video.codec_context.decode(packet))
        seen += len(video.codec_context.decode(None))
    return seen, heard


def packets_of(packets: list[Any]) -> tuple[set[int], set[int]]:
    """Return the numbers of the packets shown at the moments, and of all that they need.

    A packet needs those from the key frame before it on.
    """
    shown = [(float(packet.pts * packet.time_base), n) for n, packet in enumerate(packets)]
    shown.sort()
    key_frames = [number for number, packet in enumerate(packets) if packet.is_keyframe]
    at_moments = set()
    needed: set[int] = set()
    for moment in moments():
        last = bisect.bisect(shown, (moment + 1e-6, len(shown))) - 1
        _, number = shown[last]
        at_moments.add(number)
        key_frame = max(key for key in key_frames if key <= number)
        needed.update(range(key_frame, number + 1))
    return at_moments, needed


def measure(path: Path, turns: int, backend: str) -> dict[str, Any]:
    """Return medians of each contestant and of the ratios of turns taken side by side.

    Figures of ``cpu`` leave out the time that other processes used.
    """
    contestants: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(path, backend),
        "plain": lambda: plain(path),
        "limit": lambda: limit(path),
    }
    check(path, backend)
    order = list(contestants)
    wall: dict[str, list[float]] = {name: [] for name in order}
    cpu: dict[str, list[float]] = {name: [] for name in order}
    for turn in range(turns + 1):
        for name in order:
            began = time.perf_counter()
            worked = time.process_time()
            contestants[name]()
            if turn:  # the first turn warms up
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - worked)
        order = order[1:] + order[:1]

    def ratio(of: dict[str, list[float]], one: str, other: str) -> float:
        return round(statistics.median(a / b for a, b in zip(of[one], of[other], strict=True)), 3)

    return {
        "faster_than_plain": ratio(wall, "plain", "ours"),
        "bar_plain": FASTER_THAN_PLAIN,
        "time_over_limit": ratio(wall, "ours", "limit"),
        "bar_limit": OVER_LIMIT,
        "cpu": {
            "faster_than_plain": ratio(cpu, "plain", "ours"),
            "time_over_limit": ratio(cpu, "ours", "limit"),
        },
        "clips_per_second": {name: round(1 / statistics.median(t), 2) for name, t in wall.items()},
        "milliseconds": {name: round(1000 * statistics.median(t), 2) for name, t in wall.items()},
        "cpu_milliseconds": {
            name: round(1000 * statistics.median(t), 2) for name, t in cpu.items()
        },
        "turns": turns,
        "backend": backend,
    }


def check(path: Path, backend: str) -> None:
    """Ours and the plain loop have to read the same clip, or a comparison would mean nothing."""
    frames, sound = ours(path, backend)
    others, heard = plain(path)
    assert frames.shape == others.shape == (FRAMES, SIDE, round(WIDTH * SIDE / HEIGHT), 3), (
        frames.shape,
        others.shape,
    )
    apart = float((frames.float() - others.float()).abs().mean())
    assert apart < 3, f"frames differ by {apart} of 255 in the mean"
    assert abs(len(sound) - len(heard)) <= RATE // 10, (len(sound), len(heard))


def growth(path: Path, clips: int, backend: str) -> dict[str, Any]:
    """Return MiB of resident memory before and after reading clips; a tenth more warm up."""
    for _ in range(max(1, clips // 10)):
        ours(path, backend)
    before = resident()
    points = [before]
    for number in range(clips):
        ours(path, backend)
        if (number + 1) % max(1, clips // 10) == 0:
            points.append(resident())
    return {
        "clips": clips,
        "mib_before": before,
        "mib_after": points[-1],
        "mib_grown": round(points[-1] - before, 1),
        "mib": points,
    }


def resident() -> float:
    """Return MiB of this process in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def main() -> None:
    """Measure, with the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
    parser.add_argument("--turns", type=int, default=15, help="of each contestant")
    parser.add_argument(
        "--memory", type=int, metavar="CLIPS", help="read so many clips and report the growth"
    )
    parser.add_argument("--backend", default="auto", help="of load_video")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        make_clip(path)
        figures = measure(path, arguments.turns, arguments.backend)
        figures["clip_bytes"] = path.stat().st_size
        if arguments.memory:
            figures["memory"] = growth(path, arguments.memory, arguments.backend)
    took = figures["milliseconds"]
    print(
        f"ours {took['ours']} ms, plain loop {took['plain']} ms: "
        f"{figures['faster_than_plain']} times as fast (bar {FASTER_THAN_PLAIN})"
    )
    print(
        f"libav alone {took['limit']} ms: "
        f"ours takes {figures['time_over_limit']}x of it (bar {OVER_LIMIT}x)"
    )
    if "memory" in figures:
        print(f"{figures['memory']['clips']} clips: {figures['memory']['mib_grown']} MiB more")
    if arguments.json:
        print(json.dumps({**figures, "environment": environment()}))


if __name__ == "__main__":
    main()
