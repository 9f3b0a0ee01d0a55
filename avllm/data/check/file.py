"""One media file under the glass: headers, a decode of what training would read, and what is odd about it.

:func:`examine` runs in worker processes (``check_workers.py``); its answer is JSON-able, since a journal keeps it.
"""

from __future__ import annotations

import base64
import io
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from PIL import Image

from avllm.data.check.reasons import REASONS
from avllm.data.media.load import Clip, MediaError, MediaInfo, Sampling, Sound, load_image, load_video, probe
from avllm.data.media.part import load_parts
from avllm.data.media.sound import check_rate
from avllm.data.media.whole import decode_whole
from avllm.data.schema import AudioPart, ImagePart, MediaPart, RowError, VideoPart
from avllm.data.store.storage import StoreError, open_bytes
from avllm.tokens import EncoderInput

Decode = Literal["headers", "sample", "full"]

SILENCE_DB = -60.0  # loudest sample, against full scale; below it a track counts as silent
LATE_SECONDS = 0.1
SHORT_SECONDS = 0.5  # by which sound and picture may end apart
MAX_FPS, MIN_RATE, MAX_RATE = 1000.0, 4_000, 384_000
DAMAGED_SHARE = 0.05  # of packets; above it a file that is decoded whole counts as undecodable
THUMBNAIL = 120  # pixels of the shorter side
# Which names go with a container, as libav's demuxers are called.
SUFFIXES = {
    "mov,mp4,m4a,3gp,3g2,mj2": {".mp4", ".mov", ".m4a", ".m4v", ".3gp", ".3g2", ".mj2", ".qt", ".m4b", ".f4v"},
    "matroska,webm": {".mkv", ".webm", ".mka"},
    "avi": {".avi"},
    "mpegts": {".ts", ".mts", ".m2ts"},
    "mpeg": {".mpg", ".mpeg", ".vob", ".m2p"},
    "flv": {".flv", ".f4v"},
    "asf": {".wmv", ".wma", ".asf"},
    "ogg": {".ogg", ".oga", ".ogv", ".opus"},
    "wav": {".wav", ".wave"},
    "mp3": {".mp3"},
    "flac": {".flac"},
    "aac": {".aac"},
    "gif": {".gif"},
}


class Use(NamedTuple):
    """How rows use a file: the fields of a media part beside its path."""

    kind: str
    start: float | None = None
    end: float | None = None
    sound: str = "auto"

    @classmethod
    def of(cls, part: MediaPart) -> Use:
        """The use that a part makes of its file."""
        if isinstance(part, ImagePart):
            return cls("image")
        return cls(part.type, part.start, part.end, part.sound if isinstance(part, VideoPart) else "auto")

    def part(self, path: str) -> MediaPart:
        """The part again."""
        if self.kind == "image":
            return ImagePart(image=path)
        if self.kind == "audio":
            return AudioPart(audio=path, start=self.start, end=self.end)
        return VideoPart.model_validate({"video": path, "start": self.start, "end": self.end, "sound": self.sound})


class Reader(Protocol):
    """What reads a part as training does (AVProcessor, or :class:`PlainReader`)."""

    @property
    def timeout(self) -> float:
        """Seconds after which decoding a part is given up."""
        ...

    def load_clips(self, parts: Sequence[MediaPart], root: Path | None) -> list[Clip]:
        """Decode media parts."""
        ...

    def prepare(self, clip: Clip) -> dict[str, EncoderInput]:
        """Each stream of a clip as its encoder takes it."""
        ...

    def order(self, clip: dict[str, EncoderInput]) -> list[str]:
        """The stream of each token that the clip becomes."""
        ...


@dataclass(frozen=True)
class PlainReader:
    """Reads as a usual model would: eight frames and the sound at 16 kHz. No tokens, since there is no model."""

    sampling: Sampling = Sampling(num_frames=8, short_side=224)
    rate: int = 16_000
    timeout: float = 60.0

    def load_clips(self, parts: Sequence[MediaPart], root: Path | None) -> list[Clip]:
        """Decode media parts."""
        return load_parts(parts, root, sampling=self.sampling, rate=self.rate, timeout=self.timeout)

    def prepare(self, clip: Clip) -> dict[str, EncoderInput]:
        """Nothing: no encoder is known."""
        return {}

    def order(self, clip: dict[str, EncoderInput]) -> list[str]:
        """Nothing: no connector is known."""
        return []


@dataclass(frozen=True)
class Job:
    """A file, and how rows use it."""

    path: str
    uses: tuple[Use, ...]


def examine(reader: Reader, decode: Decode, job: Job) -> dict[str, Any]:
    """Look at a file.

    Args:
        reader: reads its parts.
        decode: ``headers``, ``sample`` (what the reader reads) or ``full`` (every packet beside).
        job: the file.

    Returns:
        ``problems`` ([reason, detail] of the file itself), ``uses`` (for each use its ``problems``, seconds, frames,
        sound level in dB of full scale, tokens by stream) and ``seconds`` (of one core, that it took).
    """
    torch.set_num_threads(1)
    began = time.process_time()
    try:
        found = _examined(reader, decode, job)
    except (StoreError, OSError) as error:  # a store that does not answer is no fault of the file
        found = nothing_but(job, "unreachable", str(error))
    return {**found, "seconds": round(time.process_time() - began, 3)}


def nothing_but(job: Job, reason: str, detail: str) -> dict[str, Any]:
    """The result of a file of which nothing can be said but this."""
    return {"problems": [], "uses": [{"problems": [(reason, detail)]}] * len(job.uses)}


def _examined(reader: Reader, decode: Decode, job: Job) -> dict[str, Any]:
    """What :func:`examine` says, but for the time that it took."""
    about: MediaInfo | None = None
    known: list[tuple[str, str]] = []
    pictures = all(use.kind == "image" for use in job.uses)
    try:
        about = None if pictures else probe(job.path, reader.timeout)
    except MediaError as error:
        known.append((error.reason, error.detail))
    uses = [_examine_use(reader, decode, job.path, use, about, known) for use in job.uses]
    problems: list[tuple[str, str]] = []
    if about is not None:
        problems += _oddities(job, about)
        # what cannot be used at all needs no further look
        problems += _whole(job.path, reader.timeout) if decode == "full" and any(map(can_be_used, uses)) else []
    elif pictures and not uses[0]["problems"]:
        problems += _picture_suffix(job.path)
    return {"problems": problems, "uses": uses}


def can_be_used(use: dict[str, Any]) -> bool:
    """Whether what was found about a use is nothing, or nothing but warnings."""
    return not any(REASONS[reason].severity == "error" for reason, _ in use["problems"])


def _examine_use(
    reader: Reader, decode: Decode, path: str, use: Use, about: MediaInfo | None, known: list[tuple[str, str]]
) -> dict[str, Any]:
    """One use of a file: read as training reads it, or, of headers alone, judged by them.

    ``known``: what is wrong with the headers of a video or sound file.
    """
    if use.kind == "image":
        about, known = None, []
    if known and (decode == "headers" or known[0][0] in ("missing", "zero_byte")):
        return {"problems": known}
    try:
        if decode == "headers" and about is not None:
            return _by_headers(path, use, about)
        (clip,) = reader.load_clips([use.part(path)], None)
        order = reader.order(reader.prepare(clip))
    except (MediaError, RowError) as error:
        return {"problems": [(error.reason, error.detail)]}
    damage = [("damaged", detail) for _, detail in known]  # its headers are, and training reads it all the same
    found: dict[str, Any] = {"problems": damage}
    if use.kind != "image":
        found["seconds"] = round(clip.duration, 3)
    found["tokens"] = {stream: order.count(stream) for stream in sorted(set(order))}
    if clip.frames is not None:
        found |= {"frames": len(clip.frames.x)} | _frames_of(use, about, clip.duration)
    if clip.sound is not None:
        found |= _levels(clip.sound)
        found["problems"] += _sound_problems(use, clip, found["peak_db"], about)
    if about is not None:
        found["problems"] += [*_mute(use, about), *_past_end(use, about)]
    return found


def _levels(sound: Sound) -> dict[str, float]:
    peak, power = sound.x.abs().max(), sound.x.square().mean()
    return {
        "peak_db": round(20 * math.log10(max(float(peak), 1e-6)), 1),
        "level_db": round(10 * math.log10(max(float(power), 1e-12)), 1),
    }


def _sound_problems(use: Use, clip: Clip, peak: float, about: MediaInfo | None) -> list[tuple[str, str]]:
    assert clip.sound is not None
    found = []
    if peak < SILENCE_DB:
        found.append(("silent", f"the loudest sample is at {peak:.0f} dB"))
    seen = use.kind == "video" and about is not None and about.has_video
    if clip.sound.start > LATE_SECONDS:
        found.append(("late_sound", f"it begins at {clip.sound.start:.2f} s of the clip"))
    end, until = clip.sound.start + len(clip.sound.x) / clip.sound.rate, clip.duration
    if seen and about is not None and about.video_duration is not None:
        until = min(until, about.video_duration - (use.start or 0.0))
    if seen and until - end > SHORT_SECONDS:
        found.append(("short_sound", f"it ends at {end:.2f} s, the picture at {until:.2f} s"))
    return found


def _mute(use: Use, about: MediaInfo) -> list[tuple[str, str]]:
    if use.kind != "video" or use.sound != "auto" or about.has_audio:
        return []
    return [("no_sound_track", "the model will see it and hear nothing")]


def _past_end(use: Use, about: MediaInfo) -> list[tuple[str, str]]:
    if use.end is None or use.end <= about.duration + SHORT_SECONDS:
        return []
    return [("past_end", f"end={use.end:g} s of a file of {about.duration:.2f} s")]


def _by_headers(path: str, use: Use, about: MediaInfo) -> dict[str, Any]:
    """What headers alone tell of a use.

    Raises:
        MediaError: it would fail.
    """
    if use.kind == "video" and not about.has_video:
        raise MediaError(path, "no_video", "the file has no video track")
    if not about.has_audio and (use.kind == "audio" or use.sound == "on"):
        raise MediaError(path, "no_audio", "the file has no sound track")
    if about.audio_rate is not None and use.sound != "off":
        check_rate(path, about.audio_rate)
    start, end = use.start or 0.0, about.duration if use.end is None else min(use.end, about.duration)
    if start >= about.duration and use.start is not None:
        raise MediaError(path, "empty_interval", f"start={start:g} s of a file of {about.duration:.3f} s")
    found = {"problems": [*_mute(use, about), *_past_end(use, about), *_sound_by_headers(use, about, start, end)]}
    return found | {"seconds": round(end - start, 3)} | _frames_of(use, about, end - start)


def _frames_of(use: Use, about: MediaInfo | None, seconds: float) -> dict[str, int]:
    """Frames that a clip has by its headers, however many of them are read."""
    if use.kind != "video" or about is None or about.fps is None:
        return {}
    return {"frames": max(1, round(about.fps * seconds))}


def _sound_by_headers(use: Use, about: MediaInfo, start: float, end: float) -> list[tuple[str, str]]:
    """Whether the sound of the seconds from start to end is late or short."""
    if about.audio_start is None or about.audio_duration is None or use.sound == "off":
        return []
    begins, ends = about.audio_start - start, about.audio_start + about.audio_duration - start
    if begins >= end - start or ends <= 0:
        return []
    found = []
    if begins > LATE_SECONDS:
        found.append(("late_sound", f"it begins at {begins:.2f} s of the clip"))
    until = min(end, end if about.video_duration is None else about.video_duration) - start
    if use.kind == "video" and until - ends > SHORT_SECONDS:
        found.append(("short_sound", f"it ends at {ends:.2f} s, the picture at {until:.2f} s"))
    return found


def _oddities(job: Job, about: MediaInfo) -> list[tuple[str, str]]:
    """What the headers alone tell: the name, the rates, tracks of different length."""
    found = []
    suffix, known = Path(job.path).suffix.lower(), SUFFIXES.get(about.container)
    if known is not None and suffix not in known:
        found.append(("wrong_extension", f"{suffix or 'no suffix'}, but it is {about.container}"))
    if about.fps is not None and about.fps > MAX_FPS:
        found.append(("odd_rate", f"{about.fps:g} frames a second"))
    if about.audio_rate is not None and not MIN_RATE <= about.audio_rate <= MAX_RATE:
        found.append(("odd_rate", f"sound at {about.audio_rate} Hz"))
    both = any(use.kind == "video" and use.sound != "off" for use in job.uses)
    if both and about.video_duration is not None and about.audio_duration is not None:
        heard = (about.audio_start or 0.0) + about.audio_duration
        if heard - about.video_duration > SHORT_SECONDS:
            found.append(("short_picture", f"it ends at {about.video_duration:.2f} s, the sound at {heard:.2f} s"))
    return found


def _picture_suffix(path: str) -> list[tuple[str, str]]:
    suffix = Path(path).suffix.lower()
    with open_bytes(path) as file, Image.open(file) as image:
        name = image.format or ""
    name = "JPEG" if name == "MPO" else name  # with a second picture behind the first, as cameras write it
    if Image.registered_extensions().get(suffix) in (name, None if suffix else name):
        return []
    return [("wrong_extension", f"{suffix or 'no suffix'}, but it is {name}")]


def _whole(path: str, timeout: float) -> list[tuple[str, str]]:
    """Decode everything: what lies between the frames that training happens to look at."""
    try:
        whole = decode_whole(path, timeout)
    except MediaError as error:
        return [(error.reason, error.detail)]
    if not whole.broken:
        return []
    seen = f"{whole.broken} of {whole.packets} packets cannot be decoded"
    return [("undecodable" if whole.broken > DAMAGED_SHARE * whole.packets else "damaged", seen)]


def thumbnail(path: str) -> str:
    """The first picture that a file gives, small, as a JPEG in base64; "" when it gives none."""
    for load in (load_image, _first_frame):
        try:
            frames = load(path).frames
        except (MediaError, StoreError, OSError):  # it is among the problems already, or no picture but a film
            continue
        if frames is not None:
            image = Image.fromarray(frames.x[0].numpy())
            image.thumbnail((2 * THUMBNAIL, THUMBNAIL))
            out = io.BytesIO()
            image.save(out, "JPEG", quality=70)
            return base64.b64encode(out.getvalue()).decode()
    return ""


def _first_frame(path: str) -> Clip:
    return load_video(path, end=0.01, sampling=Sampling(num_frames=1, short_side=THUMBNAIL), rate=None)
