"""Describe a file by its headers and its first frame."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from avllm.data.media.clip import MediaInfo, Note
from avllm.data.media.container.joined import second_file
from avllm.data.media.container.length import file_duration, stream_end
from avllm.data.media.container.reread import reading
from avllm.data.media.container.tracks import pixel_aspect, sound_tracks
from avllm.data.media.frames import first_frame
from avllm.data.media.open import OpenMedia, no_track, open_media, require_file
from avllm.data.media.pictures.animation import is_animation, probe_animation
from avllm.data.media.pictures.display import display_matrix, displayed_size, rotation
from avllm.data.media.pictures.tone import HDR_TRANSFERS
from avllm.data.media.window import read_window

if TYPE_CHECKING:
    from av.video.frame import VideoFrame


def probe(path: str | Path, timeout: float = 60.0, track: int | None = None) -> MediaInfo:
    """Read the headers of a video or sound file, and its first frame for the rotation.

    Args:
        path: of the file.
        timeout: seconds.
        track: number of the sound track that is described, from 0; None = the default one.

    Raises:
        MediaError: missing, zero_byte, undecodable, absurd_header, truncated, timeout; ``no_video``
            when there is neither video nor sound in the file; ``no_audio`` without this track.
    """
    require_file(path)
    if is_animation(path):
        return probe_animation(path, timeout)
    with open_media(path, timeout, track=track) as media:
        return reading(media, _describe)


def _describe(media: OpenMedia) -> MediaInfo:
    if media.video is None and media.audio is None:
        detail = "the file has neither a video nor a sound track"
        raise no_track(media.path, "no_video", detail)
    duration = file_duration(media)
    fields = {**_video_info(media), **_audio_info(media)}
    notes = [*fields.pop("picture_notes", ()), *_sound_notes(media)]
    if media.clock is not None:
        seen = f"times begin again or jump ahead {len(media.clock.stretches) - 1} times"
        notes.append(Note("clock_restarts", f"{seen}; the parts are played one after the other"))
    container = media.container.format.name
    second = second_file(media.path, container)
    if second is not None:
        notes.append(Note("second_file", f"it begins at byte {second}, and is not read"))
    return MediaInfo(
        duration=duration,
        has_video=media.video is not None,
        has_audio=media.audio is not None,
        container=container,
        notes=tuple(notes),
        **fields,
    )


def _video_info(media: OpenMedia) -> dict[str, Any]:
    if media.video is None:
        return {}
    window = read_window(media, 0.0, 0.0)
    frame = first_frame(media, window)
    width, height = displayed_size(frame, pixel_aspect(media.video))
    rate = media.video.average_rate
    return {
        "width": width,
        "height": height,
        "fps": float(rate) if rate else None,
        "num_frames": media.video.frames or None,
        "rotation": rotation(display_matrix(frame)),
        "video_codec": media.video.codec_context.name,
        "edit_list": window.cut,
        "video_duration": stream_end(media, media.video),
        "picture_notes": _picture_notes(frame),
    }


def _picture_notes(frame: VideoFrame) -> list[Note]:
    notes = []
    if frame.interlaced_frame:
        notes.append(Note("interlaced", "every second line of each frame is read"))
    transfer = HDR_TRANSFERS.get(int(frame.color_trc))
    if transfer is not None:
        seen = f"its transfer function is {transfer}; it is mapped to the standard range"
        notes.append(Note("high_dynamic_range", seen))
    return notes


def _sound_notes(media: OpenMedia) -> list[Note]:
    tracks = sound_tracks(media.container)
    if media.audio is None or len(tracks) < 2 or media.track is not None:
        return []
    number = [track.index for track in tracks].index(media.audio.index)
    seen = f"{len(tracks)} sound tracks; track {number} is read"
    return [Note("several_tracks", f"{seen} (numbers begin with 0)")]


def _audio_info(media: OpenMedia) -> dict[str, Any]:
    if media.audio is None:
        return {}
    stream = media.audio
    start = media.second(stream.start_time or 0, stream.time_base)
    end = stream_end(media, stream)
    return {
        "audio_rate": stream.codec_context.sample_rate,
        "audio_channels": stream.codec_context.layout.nb_channels,
        "audio_start": start,
        "audio_duration": None if end is None else end - start,
        "audio_codec": stream.codec_context.name,
        "sound_tracks": len(sound_tracks(media.container)),
    }
