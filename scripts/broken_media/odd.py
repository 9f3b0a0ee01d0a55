"""Files that are odd and can be used all the same; some deserve a warning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from classes import CONTAINERS, FRONT, SOUNDS, Part, Place, audio, image, odd, video
from PIL import Image
from writing import copy_from, patch


@odd()
def plain(place: Place) -> Part:
    """Write an ordinary clip."""
    return video(place.clip())


@odd()
def variable_frame_rate(place: Place) -> Part:
    """Write a clip whose frames last unequally long."""
    times = np.cumsum(place.draw.choice([0.02, 0.08, 0.3], 16)).tolist()
    return video(place.clip(times=[0.0, *times], seconds=times[-1]))


@odd(warnings=("no_sound_track",))
def one_frame(place: Place) -> Part:
    """Write a clip of one frame."""
    return video(place.clip(seconds=1 / 25, fps=25, sound=None))


@odd()
def hundredth_of_a_second(place: Place) -> Part:
    """Write a clip, or a sound, of 10 ms."""
    return place.one_of(
        [
            video(place.clip(seconds=0.01, fps=100, sound=None), sound="off"),
            audio(place.sound(seconds=0.01)),
        ]
    )


@odd()
def surround_sound(place: Place) -> Part:
    """Write a clip with eight channels of sound."""
    return video(place.clip(layout="7.1", rate=48_000))


@odd()
def telephone_sound(place: Place) -> Part:
    """Write a clip with sound at 8 kHz."""
    return video(place.clip(rate=8_000))


@odd()
def studio_sound(place: Place) -> Part:
    """Write a sound at 192 kHz."""
    return audio(place.sound(".flac", "flac", rate=192_000, seconds=1.0))


@odd()
def rotated(place: Place) -> Part:
    """Write a clip that a player turns."""
    return video(place.clip(rotate=place.one_of([90, 180, 270])))


@odd()
def odd_size(place: Place) -> Part:
    """Write a clip whose sides are odd numbers of pixels."""
    size = (int(place.draw.integers(8, 60)) * 2 + 1, int(place.draw.integers(8, 60)) * 2 + 1)
    return video(place.clip(size=size, pixels="yuv444p"))


@odd(warnings=("no_sound_track",))
def tiny_picture(place: Place) -> Part:
    """Write a clip of a few pixels."""
    return video(place.clip(size=place.one_of([(2, 2), (16, 2), (4, 64)]), sound=None))


@odd()
def other_container(place: Place) -> Part:
    """Write a clip of another container."""
    suffix, options = place.one_of(CONTAINERS)
    return video(place.clip(suffix, **options))


@odd()
def sound_file(place: Place) -> Part:
    """Write a sound file."""
    suffix, codec = place.one_of(SOUNDS)
    return audio(place.sound(suffix, codec))


@odd()
def sound_only_mp4(place: Place) -> Part:
    """Write an mp4 with sound alone."""
    return audio(place.sound(".mp4", "aac"))


@odd(warnings=("no_sound_track",))
def no_sound_track(place: Place) -> Part:
    """Write a clip without a sound track."""
    return video(place.clip(sound=None))


@odd(warnings=("several_tracks",))
def two_sound_tracks(place: Place) -> Part:
    """Write a clip with two sound tracks."""
    return video(place.clip(tracks=2))


@odd(warnings=("no_sound_track",))
def cut_without_encoding(place: Place) -> Part:
    """Cut a clip without decoding it."""
    whole = place.clip("-whole.mp4", sound=None, seconds=3)
    path = copy_from(whole, place.file(".mp4"), place.share(0.3, 1.5))
    whole.unlink()
    return video(path)


@odd()
def index_first(place: Place) -> Part:
    """Write a clip whose index comes first."""
    return video(place.clip(**FRONT))


@odd()
def slow_pictures(place: Place) -> Part:
    """Write a clip of one frame a second."""
    return video(place.clip(fps=1, seconds=4))


@odd()
def picture(place: Place) -> Part:
    """Write a picture."""
    path = place.file(place.one_of([".png", ".jpg", ".gif", ".webp"]))
    x = place.draw.integers(0, 256, (37, 51, 3), np.uint8)
    Image.fromarray(x).save(path)
    return image(path)


@odd()
def claims_hours(place: Place) -> Part:
    """Write a clip that declares hours."""
    path = place.clip()
    hours = int(place.draw.integers(10, 1000)) * 3600
    for box, where in ((b"mvhd", (16, 20)), (b"tkhd", (None, 24)), (b"mdhd", (16, 20))):
        patch_duration(path, box, where, hours)
    return video(path)


def patch_duration(path: Path, box: bytes, where: tuple[int | None, int], seconds: int) -> None:
    """Overwrite the duration in a header box (version 0, ISO 14496-12).

    `tkhd` counts in the movie's time scale.
    """
    data = path.read_bytes()
    clock, place = where
    at = data.find(b"mvhd" if clock is None else box)
    scale = int.from_bytes(data[at + 16 : at + 20], "big")
    value = min(seconds * scale, 2**32 - 2)
    patch(path, box, place, value.to_bytes(4, "big"))


@odd(warnings=("late_sound",))
def late_sound(place: Place) -> Part:
    """Write a clip whose sound begins later than its pictures."""
    late = place.share(0.3, 1.0)
    return video(place.clip(sound_start=late, sound_seconds=2 - late))


@odd(warnings=("short_sound",))
def short_sound(place: Place) -> Part:
    """Write a clip whose sound ends early."""
    return video(place.clip(seconds=3, sound_seconds=place.share(0.5, 2.0)))


@odd(warnings=("short_picture",))
def short_picture(place: Place) -> Part:
    """Write a clip whose pictures end early."""
    return video(place.clip(seconds=1, sound_seconds=place.share(2.0, 3.0)))


@odd(warnings=("silent",))
def silent(place: Place) -> Part:
    """Write a clip whose sound is silence."""
    return video(place.clip(loudness=0.0))


@odd(warnings=("wrong_extension",))
def wrong_extension(place: Place) -> Part:
    """Write a clip with the suffix of another container."""
    path = place.clip()
    return video(path.rename(path.with_suffix(place.one_of([".avi", ".mkv", ".wav"]))))


@odd(warnings=("past_end",))
def interval_past_the_end(place: Place) -> Part:
    """Ask for an interval that ends after the clip."""
    return video(place.clip(), start=0.5, end=10.0)


@odd(warnings=("odd_rate", "no_sound_track"))
def absurd_frame_rate(place: Place) -> Part:
    """Write a clip of 5,000 frames a second."""
    return video(place.clip(seconds=0.01, fps=5000, sound=None))
