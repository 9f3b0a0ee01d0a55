"""Sound that is easily misread: cancelling channels, no numbers, unknown lengths, many tracks."""

from __future__ import annotations

import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from data.media.media_files import RATE, clicks, reason, sound_frames, write_audio
from PIL import Image

from avllm.data.media.load import Clip, MediaInfo, load_audio, load_image, load_video, probe
from avllm.data.media.part import load_parts
from avllm.data.schema import AudioPart, VideoPart


def tone(hertz: float, seconds: float = 1.0, rate: int = RATE, loudness: float = 0.4) -> np.ndarray:
    """float32 (S,)."""
    return (loudness * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(
        np.float32
    )


def heard(path: Path, **options) -> Clip:
    """The sound of a file at 16 kHz."""
    return load_audio(path, rate=RATE, **options)


def reasons(notes_of: Clip | MediaInfo) -> list[str]:
    """Reasons of the notes of a clip, or of a file's headers."""
    return [note.reason for note in notes_of.notes]


# ---------------------------------------------------------------- channels

LOW = tone(300)
HIGH = tone(1500, loudness=0.3)
NOISE = 0.2 * np.random.default_rng(0).standard_normal(RATE).astype(np.float32).clip(-2, 2)
ZERO = np.zeros_like(LOW)
CANCELLING = {  # layout, channels, number of the one that is to be heard
    "one cable turned round": ("stereo", [LOW, -LOW], 0),
    "the louder is the second": ("stereo", [-0.8 * LOW, LOW], 1),
    "with a common offset": ("stereo", [0.2 + LOW, 0.2 - LOW], 0),
    "a voice turned round, and other sounds": ("stereo", [LOW + 0.2 * HIGH, -LOW + 0.2 * NOISE], 0),
    "in the front of 5.1": ("5.1", [LOW, -LOW, ZERO, ZERO, ZERO, ZERO], 0),
    "all of 5.1": ("5.1", [LOW, -LOW, HIGH, -HIGH, 0.5 * NOISE, -0.5 * NOISE], 0),
}


@pytest.mark.parametrize("name", CANCELLING)
@pytest.mark.parametrize("codec", ["pcm_s16le", "pcm_f32le"])
def test_where_channels_cancel_the_loudest_is_heard(tmp_path: Path, name: str, codec: str) -> None:
    layout, channels, loudest = CANCELLING[name]
    path = write_audio(tmp_path / "a.wav", np.stack(channels), RATE, codec, layout)
    clip = heard(path)
    assert torch.allclose(clip.sound.x, torch.from_numpy(channels[loudest]), atol=1e-3)
    assert reasons(clip) == ["cancelling_channels"]
    assert reasons(heard(path, start=0.3, end=0.7)) == ["cancelling_channels"]


MIXING = {
    "equal": ("stereo", [LOW, LOW]),
    "unrelated": ("stereo", [LOW, HIGH]),
    "one is silent": ("stereo", [LOW, ZERO]),
    "all are silent": ("stereo", [ZERO, ZERO]),
    "wide": ("stereo", [LOW + 0.3 * HIGH, LOW - 0.3 * HIGH]),
    "one of 5.1": ("5.1", [ZERO, ZERO, LOW, ZERO, ZERO, ZERO]),
}


@pytest.mark.parametrize("name", MIXING)
def test_where_channels_do_not_cancel_their_mean_is_heard(tmp_path: Path, name: str) -> None:
    layout, channels = MIXING[name]
    clip = heard(write_audio(tmp_path / "a.wav", np.stack(channels), RATE, "pcm_f32le", layout))
    assert torch.allclose(clip.sound.x, torch.from_numpy(np.mean(channels, 0)), atol=1e-5)
    assert reasons(clip) == []


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("codec", ["pcm_f32le", "pcm_f64le"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -32_768.0])
def test_samples_that_are_no_sound_are_a_bad_file(tmp_path: Path, codec: str, value: float) -> None:
    path = write_audio(tmp_path / "a.wav", LOW[None], RATE, codec)
    kind = "<f4" if codec == "pcm_f32le" else "<f8"
    data = bytearray(path.read_bytes())
    at = data.find(b"data") + 8 + 9_000 * np.dtype(kind).itemsize  # at 0.56 s
    data[at : at + np.dtype(kind).itemsize] = np.array(value, kind).tobytes()
    path.write_bytes(data)
    assert reason(lambda: heard(path)) == "bad_values"
    assert heard(path, end=0.4).sound is not None  # what is not decoded does not matter


def test_loud_sound_of_floats_is_sound(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.wav", 10 * LOW[None], RATE, "pcm_f32le")
    assert heard(path).sound.x.abs().max() == pytest.approx(4.0, rel=1e-3)


def test_a_picture_with_values_that_are_no_numbers_is_a_bad_file(tmp_path: Path) -> None:
    x = np.full((8, 8), 0.5, np.float32)
    x[2, 3] = np.nan
    Image.fromarray(x).save(tmp_path / "a.tiff")
    assert reason(lambda: load_image(tmp_path / "a.tiff")) == "bad_values"


# ------------------------------------------------ lengths that a pipe's writer did not know

PCM = (LOW * 32767).astype("<i2")
BYTES = PCM.nbytes
FORM = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16)
WAV_LENGTHS = {
    "ffmpeg": (0xFFFFFFFF, 0xFFFFFFFF),
    "zero": (0, 0),
    "2 GiB": (0x7FFFFFFF, 0x7FFFFFFF),
    "sox": (0x7FFFF024, 0x7FFFF000),
    "arecord": (0x80000024, 0x80000000),
    "header only": (36, 0),
    "below 4 GiB": (0xFFFFFFFF, 0xFFFFFFFF - 36),
}


@pytest.mark.parametrize("writer", WAV_LENGTHS)
def test_a_wav_with_a_placeholder_for_its_length_is_read_to_the_end(
    tmp_path: Path, writer: str
) -> None:
    riff, data = WAV_LENGTHS[writer]
    head = b"RIFF" + struct.pack("<I", riff) + b"WAVE" + FORM + b"data" + struct.pack("<I", data)
    assert_read_whole(tmp_path / "a.wav", head + PCM.tobytes())


@pytest.mark.parametrize(
    "lengths", [(0, 0, 0), (2**64 - 1,) * 3, (2**63 - 1,) * 3, (0xFFFFFFFF,) * 3]
)
def test_an_rf64_with_placeholders_is_read_to_the_end(
    tmp_path: Path, lengths: tuple[int, int, int]
) -> None:
    sizes = struct.pack("<4sIQQQI", b"ds64", 28, *lengths, 0)
    head = b"RF64" + b"\xff" * 4 + b"WAVE" + sizes + FORM + b"data" + b"\xff" * 4
    assert_read_whole(tmp_path / "a.wav", head + PCM.tobytes())


@pytest.mark.parametrize("length", [0, 0x7FFFFFFF, 0xFFFFFFFF, 2**64 - 1])
def test_a_wave64_with_placeholders_is_read_to_the_end(tmp_path: Path, length: int) -> None:
    data = bytearray(write_audio(tmp_path / "whole.w64", LOW[None], RATE).read_bytes())
    for at in (16, data.find(b"data") + 16):
        data[at : at + 8] = struct.pack("<Q", length)
    assert_read_whole(tmp_path / "a.w64", bytes(data))


@pytest.mark.parametrize("length", [0, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F000000])
@pytest.mark.parametrize("suffix", ["au", "aiff"])
def test_au_and_aiff_with_placeholders_are_read_to_the_end(
    tmp_path: Path, suffix: str, length: int
) -> None:
    rate = bytes.fromhex("400cfa00000000000000")  # 16,000 as a float of 80 bits
    common = struct.pack(">4sIHIH", b"COMM", 18, 1, length, 16) + rate
    heads = {
        "au": b".snd" + struct.pack(">IIIII", 28, length, 3, RATE, 1) + bytes(4),
        "aiff": struct.pack(">4sI4s", b"FORM", length, b"AIFF")
        + common
        + struct.pack(">4sIII", b"SSND", length, 0, 0),
    }
    assert_read_whole(tmp_path / f"a.{suffix}", heads[suffix] + PCM.astype(">i2").tobytes())


def assert_read_whole(path: Path, content: bytes) -> None:
    """Write a file of one second and read all of it."""
    path.write_bytes(content)
    clip = heard(path)
    assert clip.duration == pytest.approx(1.0, abs=1e-3)
    assert torch.allclose(clip.sound.x, torch.from_numpy(PCM / np.float32(32768)), atol=1e-4)
    assert probe(path).audio_duration == pytest.approx(1.0, abs=1e-3)


def test_an_honest_header_of_a_file_that_was_cut_still_is(tmp_path: Path) -> None:
    head = (
        b"RIFF"
        + struct.pack("<I", 36 + BYTES)
        + b"WAVE"
        + FORM
        + b"data"
        + struct.pack("<I", BYTES)
    )
    (tmp_path / "a.wav").write_bytes(head + PCM.tobytes()[: BYTES // 2])
    assert reason(lambda: heard(tmp_path / "a.wav")) == "truncated"


# ---------------------------------------------------------------- tracks


def write_tracks(
    path: Path, sounds: list[np.ndarray], default: int | None, comment: int | None = None
) -> Path:
    """A file with several sound tracks."""
    flags = av.stream.Disposition
    with av.open(str(path), "w") as container:
        streams = []
        for number, _ in enumerate(sounds):
            stream = container.add_stream("aac", rate=RATE, layout="mono")
            stream.disposition = flags.default if number == default else flags(0)
            if number == comment:
                stream.disposition = flags.comment
            streams.append(stream)
        for stream, sound in zip(streams, sounds, strict=True):
            for frame in [*sound_frames(stream, sound[None], RATE, "mono"), None]:
                container.mux(stream.encode(frame))
    return path


def pitch(clip: Clip) -> float:
    """Hertz of the strongest tone."""
    spectrum = torch.fft.rfft(clip.sound.x[: RATE // 2]).abs()
    return 2 * float(spectrum.argmax())


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_the_default_track_is_heard_and_others_can_be_chosen(tmp_path: Path, suffix: str) -> None:
    path = write_tracks(tmp_path / f"a.{suffix}", [LOW, HIGH, tone(800)], default=1)
    assert pitch(heard(path)) == pytest.approx(1500, abs=5)
    info = probe(path)
    assert (info.sound_tracks, reasons(info)) == (3, ["several_tracks"])
    for track, hertz in enumerate([300, 1500, 800]):
        assert pitch(heard(path, track=track)) == pytest.approx(hertz, abs=5)
        assert reasons(probe(path, track=track)) == []
        parts = [AudioPart(audio=path.name, track=track), VideoPart(video=path.name, track=track)]
        for clip in load_parts(parts, tmp_path, sampling=None, rate=RATE):
            assert pitch(clip) == pytest.approx(hertz, abs=5)
    assert reason(lambda: heard(path, track=3)) == "no_audio"
    both = [AudioPart(audio=path.name, track=0), AudioPart(audio=path.name)]
    assert [round(pitch(c), -2) for c in load_parts(both, tmp_path, sampling=None, rate=RATE)] == [
        300,
        1500,
    ]


def test_without_a_default_track_a_comment_is_not_heard(tmp_path: Path) -> None:
    path = write_tracks(tmp_path / "a.mkv", [LOW, HIGH], default=None, comment=0)
    assert pitch(heard(path)) == pytest.approx(1500, abs=5)


# ---------------------------------------------------------------- covers


def write_cover(path: Path, content: bytes | None = None) -> Path:
    """A song with an attached picture; ``content`` replaces the bytes of the picture."""
    sound_codec = {"mp3": "libmp3lame", "m4a": "aac", "flac": "flac"}[path.suffix[1:]]
    picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 200, np.uint8), "rgb24")
    with av.open(str(path), "w", format={"m4a": "mp4"}.get(path.suffix[1:])) as container:
        sound = container.add_stream(sound_codec, rate=RATE, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        (packet,) = [*cover.encode(picture.reformat(format="yuvj420p")), *cover.encode(None)]
        if content is not None:
            packet = av.Packet(content)
            packet.stream = cover
        container.mux(packet)
        for frame in [*sound_frames(sound, LOW[None], RATE, "mono"), None]:
            container.mux(sound.encode(frame))
    return path


@pytest.mark.parametrize("suffix", ["mp3", "m4a", "flac"])
@pytest.mark.parametrize(
    "content", [None, b"\xff\xd8\xff\xe0" + bytes(200), b"no picture at all" * 9]
)
def test_a_cover_is_no_video_and_spoils_nothing(
    tmp_path: Path, suffix: str, content: bytes | None
) -> None:
    path = write_cover(tmp_path / f"a.{suffix}", content)
    info = probe(path)
    assert (info.has_video, info.has_audio, reasons(info)) == (False, True, [])
    assert info.duration == pytest.approx(1.0, abs=0.15)
    assert pitch(heard(path)) == pytest.approx(300, abs=5)
    assert (
        reason(lambda: load_video(path, sampling=None, rate=RATE, sound="on", start=9))
        == "empty_interval"
    )


def test_a_click_keeps_its_place_in_a_chosen_track(tmp_path: Path) -> None:
    click = clicks(1, RATE, [0.5])[0]
    path = write_tracks(tmp_path / "a.mka", [LOW, click], default=0)
    loud = heard(path, track=1).sound
    assert loud.start + int(loud.x.abs().argmax()) / RATE == pytest.approx(0.5, abs=0.07)
