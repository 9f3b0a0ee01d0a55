"""Judge a file by its headers and by a decoded clip: sound, length, rates and suffix."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from PIL import Image

from avllm.data.check.reasons import Problem
from avllm.data.check.uses import FileJob, Use
from avllm.data.media.container.tracks import check_rate
from avllm.data.media.load import Clip, MediaError, MediaInfo, Note, Sound
from avllm.data.store.storage import open_bytes

SILENCE_DB = -60.0  # of the loudest sample, against full scale; below it a track is silent
LATE_SECONDS = 0.1
SHORT_SECONDS = 0.5  # by which sound and picture may end apart
MAX_FPS = 1000.0
PICTURE_NOTES = {"interlaced", "high_dynamic_range"}
MIN_RATE = 4_000  # samples a second
MAX_RATE = 384_000
# Suffixes of file names by container, as libav names its demuxers.
SUFFIXES = {
    "mov,mp4,m4a,3gp,3g2,mj2": {
        ".mp4",
        ".mov",
        ".m4a",
        ".m4v",
        ".3gp",
        ".3g2",
        ".mj2",
        ".qt",
        ".m4b",
        ".f4v",
    },
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


def levels(sound: Sound) -> dict[str, float]:
    """Return peak and mean level of a sound in dB of full scale."""
    peak = max(float(sound.x.abs().max()), 1e-6)
    power = max(float(sound.x.square().mean()), 1e-12)
    return {
        "peak_db": round(20 * math.log10(peak), 1),
        "level_db": round(10 * math.log10(power), 1),
    }


def sound_problems(use: Use, clip: Clip, peak: float, info: MediaInfo | None) -> list[Problem]:
    """Return whether a decoded sound is silent, late or short.

    Args:
        use: of the file.
        clip: with a sound.
        peak: of the sound, in dB of full scale.
        info: headers of the file, or None.
    """
    assert clip.sound is not None
    problems = []
    if peak < SILENCE_DB:
        problems.append(Problem("silent", f"the loudest sample is at {peak:.0f} dB"))
    if clip.sound.start > LATE_SECONDS:
        problems.append(_late_sound(clip.sound.start))
    if use.kind == "video" and info is not None and info.has_video:
        sound_end = clip.sound.start + len(clip.sound.x) / clip.sound.rate
        picture_end = clip.duration
        if info.video_duration is not None:
            picture_end = min(picture_end, info.video_duration - (use.start or 0.0))
        problems += _short_sound(sound_end, picture_end)
    return problems


def _late_sound(start: float) -> Problem:
    return Problem("late_sound", f"it begins at {start:.2f} s of the clip")


def _short_sound(sound_end: float, picture_end: float) -> list[Problem]:
    if picture_end - sound_end <= SHORT_SECONDS:
        return []
    seen = f"it ends at {sound_end:.2f} s, the picture at {picture_end:.2f} s"
    return [Problem("short_sound", seen)]


def missing_sound(use: Use, info: MediaInfo) -> list[Problem]:
    """Return whether a video whose sound is not switched off has no sound track."""
    if use.kind != "video" or use.sound != "auto" or info.has_audio:
        return []
    return [Problem("no_sound_track", "the model will see it and hear nothing")]


def past_end(use: Use, info: MediaInfo) -> list[Problem]:
    """Return whether an interval ends after the file."""
    if use.end is None or use.end <= info.duration + SHORT_SECONDS:
        return []
    return [Problem("past_end", f"end={use.end:g} s of a file of {info.duration:.2f} s")]


def result_by_headers(path: str, use: Use, info: MediaInfo) -> dict[str, Any]:
    """Return the result of a use that the headers alone allow.

    Raises:
        MediaError: reading it would fail.
    """
    if use.kind == "video" and not info.has_video:
        raise MediaError(path, "no_video", "the file has no video track")
    if not info.has_audio and (use.kind == "audio" or use.sound == "on"):
        raise MediaError(path, "no_audio", "the file has no sound track")
    if use.track is not None and use.sound != "off" and use.track >= info.sound_tracks:
        seen = f"track={use.track}, and the file has {info.sound_tracks} sound tracks"
        raise MediaError(path, "no_audio", seen)
    if info.audio_rate is not None and use.sound != "off":
        check_rate(path, info.audio_rate)
    start = use.start or 0.0
    end = info.duration if use.end is None else min(use.end, info.duration)
    if use.start is not None and start >= info.duration:
        seen = f"start={start:g} s of a file of {info.duration:.3f} s"
        raise MediaError(path, "empty_interval", seen)
    problems = [
        *missing_sound(use, info),
        *past_end(use, info),
        *_sound_problems_by_headers(use, info, start, end),
    ]
    seconds = end - start
    figures = {"seconds": round(seconds, 3), **frames_by_headers(use, info, seconds)}
    return {"problems": problems, **figures}


def frames_by_headers(use: Use, info: MediaInfo | None, seconds: float) -> dict[str, int]:
    """Return the frames that a clip has by its headers, however many of them are read."""
    if use.kind != "video" or info is None or info.fps is None:
        return {}
    return {"frames": max(1, round(info.fps * seconds))}


def _sound_problems_by_headers(
    use: Use,
    info: MediaInfo,
    start: float,
    end: float,
) -> list[Problem]:
    """Return whether the sound of the seconds from ``start`` to ``end`` is late or short."""
    if info.audio_start is None or info.audio_duration is None or use.sound == "off":
        return []
    sound_start = info.audio_start - start  # seconds of the clip
    sound_end = sound_start + info.audio_duration
    if sound_start >= end - start or sound_end <= 0:
        return []
    problems = []
    if sound_start > LATE_SECONDS:
        problems.append(_late_sound(sound_start))
    if use.kind == "video":
        picture_end = end if info.video_duration is None else min(end, info.video_duration)
        problems += _short_sound(sound_end, picture_end - start)
    return problems


def oddities(job: FileJob, info: MediaInfo) -> list[Problem]:
    """Return what is odd about a file's headers: suffix, rates, tracks, clock, kind of picture."""
    problems = [Problem(*note) for note in info.notes if _concerns(note, job.uses)]
    suffix = Path(job.path).suffix.lower()
    suffixes = SUFFIXES.get(info.container)
    if suffixes is not None and suffix not in suffixes:
        problems.append(_wrong_suffix(suffix, info.container))
    if info.fps is not None and info.fps > MAX_FPS:
        problems.append(Problem("odd_rate", f"{info.fps:g} frames a second"))
    if info.audio_rate is not None and not MIN_RATE <= info.audio_rate <= MAX_RATE:
        problems.append(Problem("odd_rate", f"sound at {info.audio_rate} Hz"))
    both_tracks = any(use.kind == "video" and use.sound != "off" for use in job.uses)
    if both_tracks and info.video_duration is not None and info.audio_duration is not None:
        sound_end = (info.audio_start or 0.0) + info.audio_duration
        if sound_end - info.video_duration > SHORT_SECONDS:
            seen = f"it ends at {info.video_duration:.2f} s, the sound at {sound_end:.2f} s"
            problems.append(Problem("short_picture", seen))
    return problems


def _concerns(note: Note, uses: tuple[Use, ...]) -> bool:
    """Return whether a note on the headers matters to some use of the file."""
    if note.reason in PICTURE_NOTES:
        return any(use.kind == "video" for use in uses)
    if note.reason == "several_tracks":
        heard = [use for use in uses if use.kind != "image" and use.sound != "off"]
        return any(use.track is None for use in heard)
    return True


def _wrong_suffix(suffix: str, container: str) -> Problem:
    return Problem("wrong_extension", f"{suffix or 'no suffix'}, but it is {container}")


def picture_suffix(path: str) -> list[Problem]:
    """Return whether the suffix of a picture is another format's; one without suffix has none."""
    suffix = Path(path).suffix.lower()
    with open_bytes(path) as file, Image.open(file) as image:
        name = image.format or ""
    if name == "MPO":  # a JPEG with a second picture in it, as cameras write it
        name = "JPEG"
    registered = Image.registered_extensions().get(suffix)
    if registered == name or (registered is None and suffix):
        return []
    return [_wrong_suffix(suffix, name)]
