"""Make clips of one colour and one tone for tests of recipes, and find both again in a file."""

from __future__ import annotations

import importlib
import json
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np

from avllm.data.media.load import Sampling, load_audio, load_video

RATE = 16_000
COLOURS = {
    "red": (200, 20, 20),
    "green": (20, 180, 20),
    "blue": (20, 20, 220),
    "white": (235, 235, 235),
}
RECIPES = Path(__file__).resolve().parents[1] / "data_recipes"


def recipe_module(name: str) -> ModuleType:
    """Return a recipe as a module; workers of other processes find it under the same name."""
    if str(RECIPES) not in sys.path:
        sys.path.append(str(RECIPES))
    return importlib.import_module(name)


def tone(hertz: float, seconds: float, level: float = 0.3) -> np.ndarray:
    """Return a tone, float32 ``(S,)``."""
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(RATE * seconds)) / RATE)).astype(
        np.float32
    )


def write_clip(path: Path, colour: str, hertz: float | None, seconds: float, fps: int = 10) -> Path:
    """Write a H.264 + AAC mp4, 48x32; no sound track when ``hertz`` is None."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "threads": "1"})
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        audio = None if hertz is None else out.add_stream("aac", rate=RATE, layout="mono")
        for number in range(round(fps * seconds)):
            frame = av.VideoFrame.from_ndarray(
                np.full((32, 48, 3), COLOURS[colour], np.uint8), "rgb24"
            )
            frame.pts, frame.time_base = number, Fraction(1, fps)
            out.mux(video.encode(frame))
        out.mux(video.encode())
        if audio is not None and hertz is not None:
            x = tone(hertz, seconds)
            for at in range(0, len(x), 1024):
                piece = av.AudioFrame.from_ndarray(x[None, at : at + 1024].copy(), "fltp", "mono")
                piece.sample_rate, piece.pts, piece.time_base = RATE, at, Fraction(1, RATE)
                out.mux(audio.encode(piece))
            out.mux(audio.encode())
    return path


def captioned_row(
    name: str, kind: str, file: str, caption: str, licence: str | None = "CC0"
) -> dict[str, Any]:
    """Return a manifest row of one clip and one caption."""
    content = [{"type": kind, kind: file}, {"type": "text", "text": "Describe it."}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": caption}]
    return {"id": name, "messages": messages, **({"licence": licence} if licence else {})}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def colour_changes(path: Path, fps: int) -> list[tuple[float, str]]:
    """Return (second, colour) of each change of the colour, the first at 0, frame by frame."""
    frames = load_video(path, sampling=Sampling(fps=fps), rate=None).frames
    assert frames is not None
    height, width = frames.x.shape[1:3]
    pixels = frames.x[:, height // 2, width // 2].numpy().astype(int)  # (T, 3)
    names = [min(COLOURS, key=lambda c: np.abs(np.subtract(p, COLOURS[c])).sum()) for p in pixels]
    starts = frames.span[:, 0].tolist()
    return [(starts[i], name) for i, name in enumerate(names) if i == 0 or name != names[i - 1]]


def heard_between(path: Path, hertz: float) -> tuple[float, float]:
    """Return the seconds between which a tone has half of its loudness, to a millisecond."""
    sound = load_audio(path, rate=RATE).sound
    assert sound is not None
    x = sound.x.numpy()
    turned = x * np.exp(-2j * np.pi * hertz * np.arange(len(x)) / RATE)
    size = RATE // 100  # windows of 10 ms
    sums = np.concatenate([[0], np.cumsum(turned)])
    level = np.abs(sums[size:] - sums[:-size]) / size  # level[i]: window from i to i + size
    loud = np.flatnonzero(level > np.quantile(level, 0.98) / 2)
    offset = sound.start + size / 2 / RATE
    return loud[0] / RATE + offset, loud[-1] / RATE + offset
