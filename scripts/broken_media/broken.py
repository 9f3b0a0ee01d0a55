"""Files that cannot be used, or not as the row asks."""

from __future__ import annotations

import zlib

import numpy as np
from classes import CONTAINERS, FRONT, SOUNDS, SPOILT, Part, Place, audio, image, odd, video
from PIL import Image
from writing import cut, flip, noise_packets, patch, wav_header


@odd("missing")
def missing(place: Place) -> Part:
    """Name a file that does not exist."""
    return place.one_of([video, audio, image])(place.file(".mp4"))


@odd("missing")
def folder(place: Place) -> Part:
    """Make a folder with the name of a clip."""
    place.file(".mp4").mkdir()
    return video(place.file(".mp4"))


@odd("zero_byte")
def zero_byte(place: Place) -> Part:
    """Write a file of zero bytes."""
    return place.one_of([video, audio, image])(place.text(".mp4", ""))


@odd("undecodable")
def text_named_mp4(place: Place) -> Part:
    """Write text with the suffix of a clip."""
    return place.one_of([video, audio, image])(place.text(".mp4", "this is no film\n" * 200))


@odd("undecodable")
def error_page(place: Place) -> Part:
    """Write a server's error page in the place of a file."""
    page = (
        "<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>"
        + "<p>nothing</p>" * 50
    )
    return place.one_of([video, audio])(place.text(place.one_of([".mp4", ".wav"]), page))


@odd("undecodable")
def playlist(place: Place) -> Part:
    """Write a playlist that names another file."""
    return video(place.text(".mp4", "#EXTM3U\n#EXTINF:4,\nother.mp4\n#EXT-X-ENDLIST\n"))


@odd(*SPOILT)
def random_bytes(place: Place) -> Part:
    """Write random bytes."""
    suffix = place.one_of([".mp4", ".wav", ".avi", ".flac"])
    return video(place.text(suffix, place.draw.bytes(20_000)))


@odd("undecodable")
def zeros(place: Place) -> Part:
    """Write zeros."""
    return video(place.text(".mp4", bytes(10_000)))


@odd("truncated", "undecodable")
def no_moov(place: Place) -> Part:
    """Write a clip without its index."""
    path = place.clip()
    data = path.read_bytes()
    path.write_bytes(data[: data.rfind(b"moov") - 4])
    return video(path)


@odd("truncated", "undecodable")
def truncated_mp4(place: Place) -> Part:
    """Cut a clip whose index is at its end."""
    return video(cut(place.clip(), place.share(0.02, 0.98)))


@odd("truncated", "undecodable")
def truncated_index_first(place: Place) -> Part:
    """Cut a clip whose index comes first."""
    return video(cut(place.clip(**FRONT), place.share(0.05, 0.8)))


@odd("truncated", "undecodable")
def truncated_other(place: Place) -> Part:
    """Cut a clip of another container."""
    suffix, options = place.one_of([CONTAINERS[0], CONTAINERS[2], (".mov", {})])
    return video(cut(place.clip(suffix, **options), place.share(0.05, 0.7)))


@odd("truncated", "undecodable")
def truncated_sound(place: Place) -> Part:
    """Cut a sound file."""
    suffix, codec = place.one_of([(".wav", "pcm_s16le"), (".flac", "flac"), (".m4a", "aac")])
    return audio(cut(place.sound(suffix, codec), place.share(0.02, 0.8)))


@odd("truncated", "undecodable")
def truncated_picture(place: Place) -> Part:
    """Cut a picture."""
    path = place.file(place.one_of([".jpg", ".png"]))
    Image.fromarray(place.draw.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    return image(cut(path, place.share(0.02, 0.8)))


@odd(*SPOILT, either=True)
def flipped_bytes(place: Place) -> Part:
    """Replace random bytes of a clip."""
    return video(flip(place.clip(), place.draw, int(place.draw.integers(1, 200))))


@odd(*SPOILT, either=True)
def flipped_bytes_elsewhere(place: Place) -> Part:
    """Replace random bytes of a clip of another container."""
    suffix, options = place.one_of(CONTAINERS)
    return video(flip(place.clip(suffix, **options), place.draw, int(place.draw.integers(1, 200))))


@odd(*SPOILT, either=True)
def flipped_header(place: Place) -> Part:
    """Replace random bytes at the beginning of a clip."""
    return video(flip(place.clip(**FRONT), place.draw, 12, high=0.1))


@odd(*SPOILT, either=True)
def flipped_sound(place: Place) -> Part:
    """Replace random bytes of a sound file."""
    suffix, codec = place.one_of(SOUNDS)
    return audio(flip(place.sound(suffix, codec), place.draw, int(place.draw.integers(1, 100))))


@odd("undecodable")
def noise_for_sound(place: Place) -> Part:
    """Put noise in the place of a clip's sound."""
    whole = place.clip("-whole.mp4")
    path = noise_packets(whole, place.file(".mp4"), place.draw)
    whole.unlink()
    return audio(path)


@odd("absurd_header", "undecodable")
def huge_video_header(place: Place) -> Part:
    """Write a clip that declares pictures of an absurd size."""
    path = place.clip(".avi", codec="rawvideo", sound=None, seconds=0.2, size=(32, 32))
    side = int(place.draw.integers(*place.one_of([(9_000, 16_000), (20_000, 65_000)])))
    patch(path, b"avih", 40, side.to_bytes(4, "little") * 2)  # the main header: width, height
    return video(
        patch(path, b"strf", 12, side.to_bytes(4, "little") * 2)
    )  # BITMAPINFOHEADER: the same


@odd("absurd_header", "undecodable")
def huge_picture_header(place: Place) -> Part:
    """Write a picture that declares an absurd size."""
    path = place.file(".png")
    Image.fromarray(place.draw.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = int(place.draw.integers(50_000, 2**31)).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return image(place.text(".png", bytes(data)))


@odd("truncated")
def wav_claims_more(place: Place) -> Part:
    """Write a wav that declares more sound than it has."""
    data = (3000 * place.draw.standard_normal(16_000)).astype("<i2").tobytes()
    return audio(place.text(".wav", wav_header(16_000, 10 * len(data)) + data))


@odd("absurd_header", "undecodable")
def wav_claims_one_hertz(place: Place) -> Part:
    """Write a wav that declares one sample a second."""
    data = (3000 * place.draw.standard_normal(200_000)).astype("<i2").tobytes()
    return audio(place.text(".wav", wav_header(1, len(data)) + data))


@odd("absurd_header", "undecodable")
def wav_claims_gigahertz(place: Place) -> Part:
    """Write a wav that declares an absurd sampling rate."""
    data = (3000 * place.draw.standard_normal(16_000)).astype("<i2").tobytes()
    rate = place.one_of([0, 2**31 - 1, 2**32 - 1, 900_000_000])
    return audio(place.text(".wav", wav_header(rate, len(data)) + data))


@odd("bad_values")
def sound_of_no_numbers(place: Place) -> Part:
    """Write a wav of floats, some of which are no numbers, or far from sound."""
    path = place.sound(".wav", "pcm_f32le")
    data = bytearray(path.read_bytes())
    value = place.one_of([np.nan, np.inf, -np.inf, 1e30])
    at = data.find(b"data") + 8 + 4 * 5_000
    data[at : at + 4] = np.array(value, "<f4").tobytes()
    return audio(place.text(".wav", bytes(data)))


@odd("absurd_header")
def far_timestamp(place: Place) -> Part:
    """Write a clip whose last frame is days after the one before."""
    days = float(place.draw.uniform(1, 20)) * 86_400
    return video(place.clip(".mkv", times=[0.0, 0.1, 0.2, days], sound=None, options={"bf": "0"}))


@odd("no_audio")
def asked_for_sound(place: Place) -> Part:
    """Ask for the sound of a clip without any."""
    path = place.clip(sound=None)
    return place.one_of([audio(path), video(path, sound="on")])


@odd("no_video")
def asked_for_picture(place: Place) -> Part:
    """Ask for the pictures of a sound file."""
    return video(place.one_of([place.sound, lambda: place.sound(".mp4", "aac")])())


@odd("undecodable")
def picture_as_film(place: Place) -> Part:
    """Ask for a picture as a clip."""
    path = place.file(".mp4")
    Image.fromarray(place.draw.integers(0, 256, (32, 32, 3), np.uint8)).save(path, "PNG")
    return video(path)


@odd("undecodable")
def film_as_picture(place: Place) -> Part:
    """Ask for a clip as a picture."""
    return image(place.clip())


@odd("empty_interval")
def interval_behind_the_end(place: Place) -> Part:
    """Ask for an interval after the end of a clip."""
    return video(place.clip(), start=30.0, end=40.0)
