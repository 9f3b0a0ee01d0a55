"""Render scripts with numpy and write them with PyAV: H.264 + AAC mp4, wav and jpg."""

import os
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image
from scripting import COLOURS, FPS, RATE, SIDE, SIZES, SPLITS

AAC_FRAME = 1024
LIT = 2  # frames for which a wall is lit after it was hit
PARTIALS = {
    "sine": {1: 1.0}, "organ": {1: 0.6, 2: 0.5, 4: 0.4}, "horn": {1: 0.4, 2: 0.7, 3: 0.4},
    "reed": {1: 0.4, 2: 0.4, 3: 0.4, 4: 0.4, 5: 0.4},
}  # fmt: skip
GRID = np.arange(SIDE, dtype=np.float32) + 0.5  # centres of the pixels


def paint(thing: dict) -> tuple[int, int, int]:
    """Return red, green and blue of a thing."""
    return COLOURS[thing["colour"]] if thing["colour"] else thing["shade"]


def outline(thing: dict, dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    """Return the signed distance to a thing's outline.

    Without a named shape, the outline is half way between two of them.
    """
    shapes = [thing["shape"]] if thing["shape"] else thing["between"]
    return sum(distance(shape, dx, dy, r) for shape in shapes) / len(shapes)


def distance(shape: str, dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    """Return the signed distance in pixels to the outline of `shape` of radius `r`, < 0 inside."""
    if shape == "circle":
        return np.hypot(dx, dy) - r
    if shape == "ring":
        return np.abs(np.hypot(dx, dy) - 0.74 * r) - 0.26 * r
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - 0.88 * r
    if shape == "triangle":
        return np.maximum(np.abs(dx) * 0.866 - dy * 0.5 - 0.5 * r, dy - 0.62 * r)
    if shape == "cross":
        x = np.abs(dx)
        y = np.abs(dy)
        return np.minimum(np.maximum(x - r, y - 0.34 * r), np.maximum(y - r, x - 0.34 * r))
    raise ValueError(
        f"shape {shape!r} is not drawn here; expected circle, ring, square, triangle or cross"
    )


def draw_thing(frame: np.ndarray, thing: dict, x: float, y: float) -> None:
    """Blend one thing into a float32 frame (H, W, 3), anti-aliased, centre (x, y) in pixels."""
    r = SIZES[thing["size"]]
    x0 = max(0, int(x - r - 2))
    x1 = min(SIDE, int(x + r + 3))
    y0 = max(0, int(y - r - 2))
    y1 = min(SIDE, int(y + r + 3))
    inside = outline(thing, GRID[None, x0:x1] - x, GRID[y0:y1, None] - y, r)
    cover = np.clip(0.5 - inside, 0, 1)[..., None]
    frame[y0:y1, x0:x1] += cover * (np.asarray(paint(thing), np.float32) - frame[y0:y1, x0:x1])


def texture(rng: np.random.Generator) -> np.ndarray:
    """Return a smooth periodic texture (H, W, 3) of low contrast around a dark tint."""
    waves = np.fft.fftfreq(SIDE)[:, None] ** 2 + np.fft.fftfreq(SIDE)[None, :] ** 2
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((SIDE, SIDE))) * np.exp(-waves * 220)).real
    tint = rng.uniform(62, 92, size=3)
    return (tint + noise[..., None] / noise.std() * 9.0).astype(np.float32)


def draw_walls(frame: np.ndarray, clip: dict, t: int) -> None:
    """Draw two grey walls, 3 px thick; the one that is hit lights up for LIT frames."""
    axis = clip["walls"]["axis"]
    low, high = clip["walls"]["at"]
    mover = clip["objects"][0][axis]
    bounces = [round(second * FPS) for second in clip["events"]["bounces"]]
    hits = [frame_number for frame_number in bounces if 0 <= t - frame_number < LIT]
    lit = None
    if hits:
        place = mover[hits[0]]
        lit = low if place - low < high - place else high
    for at, edge in ((low, slice(low, low + 3)), (high, slice(high - 3, high))):
        where = (edge, slice(None)) if axis == "y" else (slice(None), edge)
        frame[where] = (255.0, 255.0, 255.0) if at == lit else (125.0, 125.0, 125.0)


def render_frames(clip: dict, rng: np.random.Generator) -> np.ndarray:
    """Return the frames of a script, uint8 (T, H, W, 3)."""
    steps = len(clip["objects"][0]["x"])
    ground = texture(rng)
    dx, dy = clip["background"]["drift"]
    frames = np.empty((steps, SIDE, SIDE, 3), np.uint8)
    for t in range(steps):
        frame = np.roll(ground, (round(dy * t / FPS), round(dx * t / FPS)), axis=(0, 1))
        draw_walls(frame, clip, t)
        for thing in reversed(clip["objects"]):
            if thing["visible"][t]:
                draw_thing(frame, thing, thing["x"][t], thing["y"][t])
        frames[t] = np.clip(frame + 0.5, 0, 255).astype(np.uint8)
    return frames


def oscillate(phase: np.ndarray, timbre: str, frequency: float) -> np.ndarray:
    """Return a wave of a timbre at the given phase, in radians.

    It is a sum of a few partials, or of the first harmonics below 7 kHz of a square or saw.
    """
    if timbre in PARTIALS:
        partials = [loud * np.sin(order * phase) for order, loud in PARTIALS[timbre].items()]
        return np.sum(partials, axis=0)
    step = 2 if timbre == "square" else 1
    orders = np.arange(1, max(2, min(20, int(7000 / (1.5 * frequency)) + 1)), step)
    return 0.75 * np.sum(np.sin(orders[:, None] * phase[None]) / orders[:, None], axis=0)


def render_sound(sound: dict, rng: np.random.Generator) -> np.ndarray:
    """Return the waveform of one sound from its start to its end, float (S,)."""
    n = max(1, round((sound["end"] - sound["start"]) * RATE))
    t = np.arange(n) / RATE
    f = sound["frequency"]
    fade = np.minimum(1, np.minimum(t, t[::-1]) / 0.005)
    if sound["kind"] == "noise":
        spectrum = np.fft.rfft(rng.standard_normal(n))
        band = np.abs(np.log2(np.maximum(np.fft.rfftfreq(n, 1 / RATE), 1) / f)) < 0.5
        noise = np.fft.irfft(spectrum * band, n)
        return fade * noise / max(1e-9, noise.std()) * 0.6
    if sound["kind"] == "chirp":
        sweep = sound["sweep"] * np.linspace(-0.65, 0.65, n)  # octaves
        return fade * oscillate(2 * np.pi * np.cumsum(f * 2.0**sweep) / RATE, sound["timbre"], f)
    wave_form = oscillate(2 * np.pi * f * t, sound["timbre"], f)
    if sound["kind"] == "tone":
        return fade * wave_form
    since = (t[:, None] - (np.asarray(sound["pulses"]) - sound["start"])[None] + 1e-9).clip(-1)
    since = np.where(since >= 0, since, np.inf).min(axis=1)
    return wave_form * np.clip(np.minimum(since, 0.09 - since) / 0.005, 0, 1)


def render_audio(clip: dict, rng: np.random.Generator) -> np.ndarray:
    """Return the sound track of a script, float32 (S,) at 16 kHz: sound, clicks, a faint hiss."""
    total = round(clip["duration"] * RATE)
    if clip["form"] == "silent":
        return np.zeros(total, np.float32)
    x = rng.standard_normal(total) * rng.uniform(0.001, 0.006)
    for sound in clip["sounds"]:
        at = round(sound["start"] * RATE)
        y = sound["level"] * render_sound(sound, rng)
        x[at : at + len(y)] += y[: total - at]
    for click in clip["clicks"]:
        at = round(click * RATE)
        length = min(240, total - at)
        decay = np.exp(-np.arange(length) / 50)
        x[at : at + length] += 0.7 * decay * np.sign(rng.standard_normal(length))
    return np.clip(x, -1, 1).astype(np.float32)


def write_mp4(path: Path, frames: np.ndarray, audio: np.ndarray | None) -> None:
    """Write H.264 (no B-frames, so that the video needs no edit list) and AAC.

    The encoder puts its 1,024 samples of priming before time 0 and the muxer writes them into the
    sound's edit list, as long as every frame carries its time: left without one they are counted
    from 0 and the sound is 64 ms late.
    """
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as out:
        options = {"preset": "ultrafast", "crf": "20", "bf": "0", "threads": "1"}
        video = out.add_stream("libx264", rate=FPS, options=options)
        video.width = frames.shape[2]
        video.height = frames.shape[1]
        video.pix_fmt = "yuv420p"
        fast = {"aac_coder": "fast"}  # the default coder takes half of the whole time
        sound = None
        if audio is not None:
            sound = out.add_stream("aac", rate=RATE, layout="mono", options=fast)
            sound.bit_rate = 64000
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i
            frame.time_base = Fraction(1, FPS)
            out.mux(video.encode(frame))
        out.mux(video.encode())
        if audio is not None and sound is not None:
            for at in range(0, len(audio), AAC_FRAME):
                chunk = av.AudioFrame.from_ndarray(
                    audio[None, at : at + AAC_FRAME].copy(), format="fltp", layout="mono"
                )
                chunk.sample_rate = RATE
                chunk.pts = at
                chunk.time_base = Fraction(1, RATE)
                out.mux(sound.encode(chunk))
            out.mux(sound.encode())


def write_wav(path: Path, audio: np.ndarray) -> None:
    """Write 16 bit PCM."""
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes((audio * 32767).round().astype("<i2").tobytes())


def render_clip(clip: dict, seed: int, folder: Path) -> None:
    """Write the clip's file under `folder`, whole or not at all.

    All that is random follows from (seed, split, index).
    """
    key = [seed, SPLITS.index(clip["split"]), 3, clip["index"]]
    path = folder / clip["file"]
    part = path.with_name(path.name + ".part")
    frames = None
    audio = None
    if clip["form"] != "wav":
        frames = render_frames(clip, np.random.default_rng([*key, 0]))
    if clip["form"] in ("av", "silent", "wav"):
        audio = render_audio(clip, np.random.default_rng([*key, 1]))
    if clip["form"] == "jpg":
        Image.fromarray(frames[0]).save(part, format="JPEG", quality=92)  # type: ignore[index]
    elif clip["form"] == "wav":
        write_wav(part, audio)  # type: ignore[arg-type]
    else:
        write_mp4(part, frames, audio)  # type: ignore[arg-type]
    os.replace(part, path)
