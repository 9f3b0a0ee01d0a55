"""Pictures that are easily misread (clocks, pixels, ranges), and files that claim too much."""

from __future__ import annotations

import gc
import importlib.util
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from data.media.media_files import (
    RATE,
    click_times,
    clicks,
    number_of,
    numbers,
    picture,
    reason,
    video,
    write_audio,
    write_clip,
)
from PIL import Image

from avllm.data.media.container import joined as joined_files
from avllm.data.media.load import (
    Clip,
    MediaInfo,
    Sampling,
    is_animation,
    load_audio,
    load_image,
    load_video,
    probe,
)
from avllm.data.media.pictures import tone
from avllm.data.media.whole import decode_whole
from avllm.encoders._visual import VisualPreprocessor


def reasons(notes_of: Clip | MediaInfo) -> list[str]:
    """Reasons of the notes of a clip, or of a file's headers."""
    return [note.reason for note in notes_of.notes]


# ---------------------------------------------------------------- sized by what a file claims


def far_packet(source: Path, target: Path, kind: str, seconds: float) -> Path:
    """Copy a file; the last packet of a kind of stream is so many seconds later."""
    with av.open(str(source)) as read, av.open(str(target), "w") as write:
        copies = {s.index: write.add_stream_from_template(s) for s in read.streams}
        packets = [packet for packet in read.demux() if packet.size]
        last = max(i for i, packet in enumerate(packets) if packet.stream.type == kind)
        for number, packet in enumerate(packets):
            if number == last:
                later = round(seconds / packet.time_base)
                packet.pts += later
                packet.dts += later
            packet.stream = copies[packet.stream.index]
            write.mux(packet)
    return target


@pytest.mark.parametrize("seconds", [1e4, 4e4])
@pytest.mark.parametrize(
    "name", ["a.mp4", "a.mkv", "a.webm", "sound.mka", "sound.m4a", "sound.ogg"]
)
def test_one_far_timestamp_is_a_bad_file(tmp_path: Path, name: str, seconds: float) -> None:
    whole = tmp_path / f"whole-{name}"
    codecs = {".webm": "libvpx-vp9", ".m4a": "aac", ".mka": "aac", ".ogg": "libopus"}
    codec = codecs.get(whole.suffix, "libx264")
    if name.startswith("sound"):
        write_audio(whole, clicks(1, 48_000, [0.5]), 48_000, codec)
    else:
        write_clip(whole, seconds=0.2, codec=codec, options={})
    path = far_packet(
        whole, tmp_path / name, "audio" if name.startswith("sound") else "video", seconds
    )
    assert path.stat().st_size < 30_000
    for call in (lambda: load_audio(path, rate=RATE), lambda: probe(path)):
        assert reason(call) == "absurd_header"
    if not name.startswith("sound"):
        for sampling in (Sampling(num_frames=8), Sampling(fps=25)):
            assert reason(lambda s=sampling: video(path, sampling=s, rate=RATE)) == "absurd_header"


def test_headers_that_claim_days_are_a_bad_file(tmp_path: Path) -> None:
    matroska = bytearray(write_clip(tmp_path / "a.mkv", seconds=0.4).read_bytes())
    at = matroska.find(b"\x44\x89\x88")  # Duration, a float of 8 bytes
    matroska[at + 3 : at + 11] = struct.pack(">d", 1e12)
    (tmp_path / "a.mkv").write_bytes(matroska)
    flac = bytearray(
        write_audio(tmp_path / "a.flac", clicks(1, RATE, [0.5]), RATE, "flac").read_bytes()
    )
    flac[22:26] = b"\xff" * 4  # the number of samples
    (tmp_path / "a.flac").write_bytes(flac)
    for name in ("a.mkv", "a.flac"):
        for call in (load_audio, lambda path, rate: probe(path)):
            assert (
                reason(lambda call=call, name=name: call(tmp_path / name, rate=RATE))
                == "absurd_header"
            )


def test_a_long_quiet_file_is_believed(tmp_path: Path) -> None:
    path = write_clip(
        tmp_path / "a.mp4", times=[0.0, 120.0, 240.0], size=(64, 48), options={"bf": "0"}
    )
    assert probe(path).duration > 230
    silence = write_audio(
        tmp_path / "a.flac", np.zeros((1, 8_000 * 900), np.float32), 8_000, "flac"
    )
    assert load_audio(silence, rate=8_000).duration == pytest.approx(900)


def test_a_hole_of_hours_in_a_sound_track_is_a_bad_file(tmp_path: Path) -> None:
    """Padding makes the file as large as its seconds may be; the silence is not allocated."""
    noise = 0.3 * np.random.default_rng(0).standard_normal((1, 48_000)).astype(np.float32)
    path = far_packet(
        write_audio(tmp_path / "whole.mka", noise, 48_000, "pcm_s16le"),
        tmp_path / "a.mka",
        "audio",
        5_000,
    )
    assert path.stat().st_size > 5_000 * 8
    assert reason(lambda: load_audio(path, rate=48_000)) == "absurd_header"


def test_frames_of_8k_are_shrunk_one_by_one(tmp_path: Path) -> None:
    path = write_clip(
        tmp_path / "a.mp4", seconds=0.1, fps=20, size=(7680, 4320), options={"preset": "ultrafast"}
    )
    clip = video(path, 2)
    assert clip.frames.x.shape == (2, 1080, 1920, 3)
    assert numbers(clip.frames.x) == [0, 1]
    assert (
        video(path, 1, sampling=Sampling(num_frames=1, short_side=2000)).frames.x.shape[1] == 2000
    )


@pytest.mark.parametrize("size", [(16_000, 1), (1, 16_000), (3_000, 64)])
def test_a_strip_is_cut_before_it_is_resized(size: tuple[int, int]) -> None:
    width, height = size
    ramp = np.linspace(0, 255, max(size)).astype(np.uint8).reshape(-1, 1)
    strip = np.broadcast_to(ramp if height > width else ramp.T, (height, width))
    x = torch.from_numpy(strip.copy())[None, None].expand(1, 3, -1, -1)
    resized = VisualPreprocessor((224, 224), 1, shortest=224).resize(x)
    assert resized.shape == (1, 3, 224, 224)
    assert resized.float().mean() == pytest.approx(127, abs=3)
    if min(size) == 1:  # all of it would take 192 GB
        large = VisualPreprocessor((2_000, 2_000), 1, shortest=2_000).resize(x)
        assert large.shape == (1, 3, 2_000, 2_000)


# ---------------------------------------------------------------- clocks


def joined(target: Path, *parts: Path) -> Path:
    """Join files byte by byte."""
    target.write_bytes(b"".join(part.read_bytes() for part in parts))
    return target


@pytest.mark.parametrize("suffix", ["ts", "mpg"])
@pytest.mark.parametrize(
    ("lengths", "later"),
    [((2.0, 2.0), 0), ((3.0, 1.0), 0), ((1.0, 2.0, 1.0), 0), ((2.0, 1.0), 100), ((1, 1, 2), 3600)],
    ids=str,
)
def test_times_that_begin_again_or_jump_ahead_are_joined(
    tmp_path: Path, suffix: str, lengths: tuple[float, ...], later: int
) -> None:
    """Each part begins ``later`` seconds after the one before, or all at 0."""
    parts = []
    for number, seconds in enumerate(lengths):
        options = {"codec": "mpeg2video", "sound_codec": "mp2"} if suffix == "mpg" else {}
        sound = clicks(seconds, 48_000, [0.5])
        parts.append(
            write_clip(
                tmp_path / f"{number}.{suffix}",
                seconds=seconds,
                gop=25,
                sound=sound,
                container_options={"output_ts_offset": str(later * number)},
                **options,
            )
        )
    path = joined(tmp_path / f"a.{suffix}", *parts)
    total = sum(lengths)
    clip = load_video(path, sampling=Sampling(fps=4), rate=RATE)
    assert clip.duration == pytest.approx(total, abs=0.35)
    starts = np.cumsum([0, *lengths[:-1]])
    shown = numbers(clip.frames.x)
    for step, (low, high) in enumerate(clip.frames.span.tolist()):
        centre = (low + high) / 2
        part = int(np.searchsorted(starts, centre, "right")) - 1
        if abs(starts - centre).min() > 0.3 and centre < total - 0.1:
            assert shown[step] == pytest.approx(25 * (centre - starts[part]), abs=5)
    loud = torch.nonzero(clip.sound.x.abs() > 0.2).flatten().numpy() / RATE
    for start in starts:
        assert np.abs(loud - (start + 0.5)).min() < 0.15
    assert reasons(probe(path)) == ["clock_restarts"]
    late = load_video(
        path, sampling=Sampling(num_frames=1), rate=RATE, start=total - 0.5, end=total - 0.3
    )
    assert numbers(late.frames.x)[0] == pytest.approx(25 * (lengths[-1] - 0.4), abs=5)
    assert decode_whole(path).frames >= 25 * total - 3


def test_a_clock_that_rises_is_left_alone(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.ts", seconds=2, gop=25, sound=clicks(2, 48_000, [0.5]))
    assert reasons(probe(path)) == []
    assert numbers(video(path, 4).frames.x) == pytest.approx([6, 18, 31, 43], abs=1)


def test_pictures_that_come_seldom_do_not_jump_ahead(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.ts", times=[0, 15, 30, 45, 60], options={"bf": "0"})
    assert reasons(probe(path)) == []
    clip = load_video(path, sampling=Sampling(num_frames=4), rate=None)
    assert clip.duration == pytest.approx(60, abs=1)
    assert numbers(clip.frames.x) == [0, 1, 2, 3]


def cluster_times(source: Path, target: Path, times: list[int]) -> Path:
    """Copy a Matroska file of short clusters; the first clusters begin at these milliseconds."""
    data = bytearray(source.read_bytes())
    at = -1
    for time in times:
        at = data.index(b"\xe7", data.index(b"\x1f\x43\xb6\x75", at + 1))
        size = data[at + 1] & 0x7F
        data[at + 2 : at + 2 + size] = time.to_bytes(size, "big")
    target.write_bytes(data)
    return target


def test_times_that_step_back_in_a_file_with_an_index_rise(tmp_path: Path) -> None:
    whole = write_clip(
        tmp_path / "whole.mkv",
        seconds=4,
        gop=25,
        options={"bf": "0"},
        container_options={"cluster_time_limit": "1000"},
    )
    data = whole.read_bytes()
    count = data.count(b"\x1f\x43\xb6\x75")
    path = cluster_times(
        whole, tmp_path / "a.mkv", [1000 * n if n < 2 else 1000 * (n - 2) for n in range(count)]
    )
    clip = video(path, 8)
    assert clip.duration == pytest.approx(4.0, abs=0.2)
    assert numbers(clip.frames.x) == pytest.approx([6, 18, 31, 43, 56, 68, 81, 93], abs=3)
    assert decode_whole(path).frames == 100


def test_of_frames_with_one_time_the_last_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuvj420p"
        packets = []
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(picture(number), "rgb24").reformat(format="yuvj420p")
            frame.pts = number
            packets += stream.encode(frame)
        for number, packet in enumerate(packets):
            packet.pts = packet.dts = number // 2 * 2  # 0, 0, 2, 2, ... tenths of a second
            container.mux(packet)
    shown = numbers(video(path, 4, end=1.6).frames.x)
    assert shown == [3, 7, 11, 15] or shown == [1, 5, 9, 13], shown


def test_a_file_that_begins_before_zero_is_read(tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "whole.mkv", seconds=4, gop=25, sound=clicks(4, 48_000, [2.5]))
    path = tmp_path / "a.mkv"
    with (
        av.open(str(whole)) as read,
        av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as write,
    ):
        copies = {s.index: write.add_stream_from_template(s) for s in read.streams}
        for packet in read.demux():
            back = round(1.4 / packet.time_base)
            first = packet.stream.type == "video" and (packet.pts or 0) * packet.time_base < 2
            if packet.size and not first:
                packet.pts -= back
                packet.dts -= back
                packet.stream = copies[packet.stream.index]
                write.mux(packet)
    clip = video(path, 4, rate=RATE)
    assert numbers(clip.frames.x)[-1] > 75
    loud = torch.nonzero(clip.sound.x.abs() > 0.2).flatten()
    assert clip.sound.start + float(loud[0]) / RATE == pytest.approx(1.1, abs=0.03)


@pytest.mark.parametrize(
    ("name", "codec", "sound_codec"),
    [
        ("a.flv", "libx264", "aac"),
        ("a.mp4", "libx264", "aac"),
        ("a.mov", "libx264", "pcm_s16le"),
        ("a.avi", "mpeg4", "libmp3lame"),
        ("a.wav", None, "pcm_s16le"),
        ("a.flac", None, "flac"),
    ],
)
def test_a_second_file_after_the_first_is_named(
    tmp_path: Path, name: str, codec: str | None, sound_codec: str
) -> None:
    parts = []
    for number in range(2):
        part = tmp_path / f"{number}{name}"
        sound = clicks(1.51, 44_100, [0.5])
        if codec is None:
            write_audio(part, sound, 44_100, sound_codec)
        else:
            options = {"sound": sound, "rate": 44_100, "sound_codec": sound_codec}
            write_clip(part, seconds=1.52, codec=codec, **options)
        parts.append(part)
    assert reasons(probe(parts[0])) == []
    info = probe(joined(tmp_path / name, *parts))
    (note,) = info.notes
    assert note.reason == "second_file"
    assert str(parts[0].stat().st_size) in note.detail


def test_sound_in_joined_ogg_files_is_played_one_after_the_other(tmp_path: Path) -> None:
    for codec in ("flac", "libopus"):
        parts = []
        for number, (seconds, click) in enumerate([(2, 0.5), (3, 1.5)]):
            part = tmp_path / f"{codec}{number}.ogg"
            parts.append(write_audio(part, clicks(seconds, 48_000, [click]), 48_000, codec))
        clip = load_audio(joined(tmp_path / f"{codec}.ogg", *parts), rate=RATE)
        assert clip.duration == pytest.approx(5.0, abs=0.02)
        assert click_times(clip) == pytest.approx([0.5, 3.5], abs=0.02)


@pytest.mark.parametrize(
    ("name", "sound_codec"), [("a.mkv", "pcm_s16le"), ("a.mp4", "aac"), ("a.mov", "pcm_s16le")]
)
def test_sound_that_begins_before_zero_moves_neither_sound_nor_picture(
    tmp_path: Path, name: str, sound_codec: str
) -> None:
    """The picture begins at 0 and is the clock; MP4 and MOV say it by an edit list."""
    sound = clicks(4, 48_000, [1.0, 2.5])
    whole = write_clip(tmp_path / f"whole{name}", seconds=4, sound=sound, sound_codec=sound_codec)
    path = tmp_path / name
    with (
        av.open(str(whole)) as read,
        av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as write,
    ):
        copies = {s.index: write.add_stream_from_template(s) for s in read.streams}
        for packet in read.demux():
            if not packet.size:
                continue
            if packet.stream.type == "audio":
                earlier = round(0.02 / packet.time_base)
                packet.pts -= earlier
                packet.dts -= earlier
            packet.stream = copies[packet.stream.index]
            write.mux(packet)
    before = load_video(whole, sampling=Sampling(num_frames=1), rate=RATE, start=0.4, end=0.42)
    after = load_video(path, sampling=Sampling(num_frames=1), rate=RATE, start=0.4, end=0.42)
    assert numbers(before.frames.x) == numbers(after.frames.x) == [10]
    heard = [click_times(load_video(file, sampling=None, rate=RATE)) for file in (whole, path)]
    assert heard[1] == pytest.approx([time - 0.02 for time in heard[0]], abs=0.002)
    assert heard[0] == pytest.approx([1.0, 2.5], abs=0.01)


# ---------------------------------------------------------------- pixels


def write_pictures(
    path: Path, pictures: list[np.ndarray], codec: str, pixels: str, **settings
) -> Path:
    """Write RGB or RGBA pictures at 10 a second; ``settings`` are those of the codec context."""
    options = settings.pop("options", {})
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        stream.codec_context.thread_count = 1
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        for number, x in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(x, "rgba" if x.shape[-1] == 4 else "rgb24")
            frame = frame.reformat(format=pixels)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def disc(width: int, height: int) -> np.ndarray:
    """A white disc that touches all sides of a black picture: a circle where pixels are square."""
    y, x = np.mgrid[:height, :width]
    inside = ((x + 0.5) / width - 0.5) ** 2 + ((y + 0.5) / height - 0.5) ** 2 < 0.24
    return np.repeat((255 * inside).astype(np.uint8)[..., None], 3, -1)


@pytest.mark.parametrize("backend", ["auto", "decord"])
@pytest.mark.parametrize("aspect", ["2:1", "1:2", "16:15"])
def test_pixels_become_square(tmp_path: Path, aspect: str, backend: str) -> None:
    ratio = Fraction(aspect.replace(":", "/"))
    width = round(128 / ratio)
    width += width % 2
    shape = disc(width, 128)
    path = write_pictures(
        tmp_path / "a.mp4", [shape] * 5, "libx264", "yuv420p", sample_aspect_ratio=ratio
    )
    clip = video(path, 2, backend=backend)
    assert clip.frames.x.shape == (2, 128, round(width * ratio), 3)
    assert (probe(path).width, probe(path).height) == (round(width * ratio), 128)
    white = clip.frames.x[0, ..., 0] > 127
    across = int(white[64].sum())
    down = int(white[:, round(width * ratio) // 2].sum())
    assert across == pytest.approx(down, abs=4)
    small = load_video(
        path, sampling=Sampling(num_frames=1, short_side=64), rate=None, backend=backend
    )
    assert small.frames.x.shape[1:3] == (64, round(width * ratio / 2))


def test_interlaced_frames_have_no_combs(tmp_path: Path) -> None:
    pictures = []
    for number in range(6):
        fields = np.zeros((64, 128, 3), np.uint8)
        for field in range(2):
            fields[field::2, 16 * number + 8 * field : 16 * number + 8 * field + 16] = 255
        pictures.append(fields)
    options = {"x264-params": "tff=1:bframes=0", "crf": "4"}
    path = write_pictures(tmp_path / "a.mp4", pictures, "libx264", "yuv420p", options=options)
    frames = video(path, 6).frames.x
    assert frames.shape == (6, 64, 128, 3)
    for number, frame in enumerate(frames):
        grey = frame[..., 1].float()
        assert (grey[1:] - grey[:-1]).abs().mean() < 3, "lines next to each other are alike"
        assert int(grey[32].argmax()) in range(16 * number - 1, 16 * number + 17)
    assert reasons(probe(path)) == ["interlaced"]
    progressive = write_clip(tmp_path / "b.mp4", seconds=0.2)
    assert reasons(probe(progressive)) == []


TRANSPARENT = np.zeros((64, 64, 4), np.uint8)
TRANSPARENT[:, :32] = (200, 0, 0, 255)
ALPHA_VIDEOS = {
    "vp9.webm": ("libvpx-vp9", "yuva420p"),
    "vp8.webm": ("libvpx", "yuva420p"),
    "prores.mov": ("prores_ks", "yuva444p10le"),
    "png.mov": ("png", "rgba"),
    "qtrle.mov": ("qtrle", "argb"),
    "ffv1.mkv": ("ffv1", "yuva420p"),
}


@pytest.mark.parametrize("name", ALPHA_VIDEOS)
def test_transparent_parts_of_a_video_are_white(tmp_path: Path, name: str) -> None:
    codec, pixels = ALPHA_VIDEOS[name]
    options = {"auto-alt-ref": "0"} if codec == "libvpx" else {}
    path = write_pictures(tmp_path / name, [TRANSPARENT] * 4, codec, pixels, options=options)
    for sampling in (Sampling(num_frames=2), Sampling(num_frames=2, short_side=32)):
        x = load_video(path, sampling=sampling, rate=None).frames.x.float()
        half = x.shape[2] // 2
        assert (x[:, :, half + 4 :] > 245).all()
        assert (x[:, :, : half - 4, 0] > 180).all()
        assert (x[:, :, : half - 4, 1:] < 40).all()


@pytest.mark.parametrize("backend", ["auto", "decord"])
@pytest.mark.parametrize(
    ("transfer", "nits_of_value"),
    [
        # BT.2100: PQ is absolute; HLG on a display of 1,000 nits, of which 75% are 203.
        (16, {0.0: 0, 0.25: 5.0, 0.5: 92, 0.58: 203, 0.75: 983}),
        (18, {0.0: 0, 0.25: 9.4, 0.5: 50.7, 0.75: 203, 1.0: 1000}),
    ],
)
def test_high_dynamic_range_is_named_and_mapped_to_the_standard_one(
    tmp_path: Path, transfer: int, nits_of_value: dict[float, float], backend: str
) -> None:
    params = f"log-level=none:lossless=1:transfer={transfer}:colorprim=9:colormatrix=9"
    greys = [np.full((64, 64, 3), round(255 * value), np.uint8) for value in nits_of_value]
    path = write_pictures(
        tmp_path / "a.mp4", greys, "libx265", "yuv420p10le", options={"x265-params": params}
    )
    assert reasons(probe(path)) == ["high_dynamic_range"]
    shown = video(path, len(greys), backend=backend).frames.x.float().mean((1, 2))  # (T, 3)
    assert (shown.max(1).values - shown.min(1).values).max() <= 3, "grey stays grey"
    for nits, value in zip(nits_of_value.values(), shown.mean(1).tolist(), strict=True):
        light = nits / 203
        if light > 0.5:
            light = 0.5 + 0.5 * (1 - np.exp(-(light - 0.5) / 0.5))
        srgb = 12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055
        assert value == pytest.approx(255 * srgb, abs=6)


def test_colours_of_high_dynamic_range_keep_their_hue() -> None:
    light = np.array([[[2.0, 0.1, 0.1]]], np.float32).transpose(2, 0, 1)  # bright BT.2020 red
    frame = av.VideoFrame(16, 2, "gbrp16le")
    values = np.interp(light[:, 0, 0], tone._light(tone.PQ), np.arange(tone.LEVELS))
    for plane, number in zip(frame.planes, (1, 2, 0), strict=True):
        plane.update(np.full(plane.buffer_size // 2, values[number], np.uint16))
    red, green, blue = (int(x[0, 0]) for x in tone.tone_mapped(frame, tone.PQ))
    assert red >= 250
    assert green == 0, "it is more saturated than any red of BT.709"
    # In BT.709 red is 3.25 and blue 0.065 of white: both are scaled by what rolls red off to 1.
    assert blue == pytest.approx(255 * (1.055 * (0.065 / 3.25) ** (1 / 2.4) - 0.055), abs=3)


# ---------------------------------------------------------------- animations


def write_animation(path: Path, milliseconds: list[int]) -> Path:
    """An animation whose frames show their number."""
    first, *others = (Image.fromarray(picture(n)) for n in range(len(milliseconds)))
    first.save(path, save_all=True, append_images=others, duration=milliseconds, lossless=True)
    return path


@pytest.mark.parametrize("suffix", ["webp", "png", "gif"])
def test_an_animation_is_a_video_and_as_an_image_its_first_frame(
    tmp_path: Path, suffix: str
) -> None:
    path = write_animation(tmp_path / f"a.{suffix}", [500, 100, 900, 500])
    clip = load_video(path, sampling=Sampling(num_frames=8), rate=RATE)
    assert clip.duration == pytest.approx(2.0, abs=0.05)
    assert numbers(clip.frames.x) == [0, 0, 2, 2, 2, 2, 3, 3]
    assert clip.sound is None
    assert numbers(video(path, 2, start=0.5, end=0.7).frames.x) == [1, 2]
    info = probe(path)
    assert (info.has_video, info.has_audio, info.width, info.height) == (True, False, 160, 96)
    still = load_image(path)
    assert number_of(still.frames.x[0].numpy()) == 0
    assert reasons(still) == ["animation"]
    assert decode_whole(path).frames == 4
    assert reason(lambda: load_audio(path, rate=RATE)) == "no_audio"
    assert reason(lambda: video(path, rate=RATE, sound="on")) == "no_audio"
    assert reason(lambda: video(path, start=3.0)) == "empty_interval"


def test_what_moves_and_what_does_not(tmp_path: Path) -> None:
    Image.fromarray(picture(3)).save(tmp_path / "still.webp")
    assert not is_animation(tmp_path / "still.webp")
    assert reason(lambda: video(tmp_path / "still.webp")) == "undecodable"
    assert reasons(load_image(tmp_path / "still.webp")) == []
    path = write_animation(tmp_path / "a.webp", [500] * 4)
    path.write_bytes(path.read_bytes()[:-200])
    assert reason(lambda: video(path)) in ("truncated", "undecodable")


def test_an_animation_of_a_few_bytes_that_lasts_for_hours_is_a_bad_file(tmp_path: Path) -> None:
    path = write_animation(tmp_path / "a.webp", [16_000_000, 16_000_000])
    assert reason(lambda: video(path)) == "absurd_header"


# ---------------------------------------------------------------- still pictures


def test_a_heic_picture_names_what_reads_it(tmp_path: Path) -> None:
    if importlib.util.find_spec("pillow_heif") is not None:
        pytest.skip("a reader is installed")
    path = tmp_path / "a.heic"
    path.write_bytes(
        struct.pack(">I4s4sI4s", 24, b"ftyp", b"heic", 0, b"mif1") + bytes(4) + bytes(500)
    )
    with pytest.raises(Exception, match="pip install pillow-heif") as caught:
        load_image(path)
    assert caught.value.reason == "undecodable"
    assert reason(lambda: video(path)) == "undecodable"


@pytest.mark.parametrize(
    ("bits", "suffix"), [(10, "png"), (12, "png"), (14, "png"), (12, "tiff"), (16, "png")]
)
def test_grey_values_are_read_by_the_bits_that_they_use(
    tmp_path: Path, bits: int, suffix: str
) -> None:
    ramp = np.linspace(0, 2**bits - 1, 64).astype(np.uint16)
    x = np.repeat(ramp[None], 64, 0)
    Image.fromarray(x).save(tmp_path / f"a.{suffix}")
    clip = load_image(tmp_path / f"a.{suffix}")
    assert (clip.frames.x[0, 0, :, 0].numpy() == x[0] >> (bits - 8)).all()
    assert reasons(clip) == ([] if bits == 16 else ["value_range"])


def test_a_hot_pixel_does_not_hide_the_range(tmp_path: Path) -> None:
    x = np.full((64, 64), 2048, np.uint16)
    x[0] = 4000
    x[5, 5] = 65_535
    Image.fromarray(x).save(tmp_path / "a.png")
    clip = load_image(tmp_path / "a.png")
    assert clip.frames.x[0, 9, 9].tolist() == [128] * 3
    assert clip.frames.x[0, 5, 5].tolist() == [255] * 3


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize(("bits", "alpha"), [(12, False), (10, True), (16, False)])
def test_colours_of_16_bits_are_read_by_the_bits_that_they_use(
    tmp_path: Path, suffix: str, bits: int, alpha: bool
) -> None:
    top = 2**bits - 1
    x = np.zeros((16, 16, 4 if alpha else 3), np.uint16)
    x[:, :8] = [top, top // 2, 0, 65_535][: x.shape[-1]]
    x[:, 8:] = [0, top // 4, top, 65_535][: x.shape[-1]]
    kind = "rgba64" if alpha else "rgb48"
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream(suffix, rate=1)
        stream.width = stream.height = 16
        stream.pix_fmt = kind + ("be" if suffix == "png" else "le")
        frame = av.VideoFrame.from_ndarray(x, kind + "le").reformat(format=stream.pix_fmt)
        container.mux([*stream.encode(frame), *stream.encode(None)])
    clip = load_image(path)
    expected = torch.from_numpy((x[..., :3] >> (bits - 8)).astype(np.uint8))
    assert (clip.frames.x[0].int() - expected.int()).abs().max() <= 1
    assert reasons(clip) == ([] if bits == 16 else ["value_range"])


def test_floats_are_read_by_their_range(tmp_path: Path) -> None:
    for top, bits in ((1.0, 0), (255.0, 8), (4095.0, 12)):
        x = np.full((8, 8), 0.5 * top, np.float32)
        x[:2] = top
        Image.fromarray(x).save(tmp_path / "a.tiff")
        clip = load_image(tmp_path / "a.tiff")
        assert int(clip.frames.x[0, 5, 5, 0]) in (127, 128), top
        assert reasons(clip) == (["value_range"] if bits == 12 else []), top


def test_decoded_frames_are_not_kept(tmp_path: Path) -> None:
    """PyAV's side data and their frame hold each other, until the garbage is collected."""
    path = write_clip(tmp_path / "a.mp4", seconds=1)
    gc.collect()
    gc.disable()
    try:
        before = sum(type(thing).__name__ == "SideDataContainer" for thing in gc.get_objects())
        video(path, 20)
        after = sum(type(thing).__name__ == "SideDataContainer" for thing in gc.get_objects())
    finally:
        gc.enable()
    assert after - before <= 1


@pytest.mark.parametrize(
    ("container", "content"),
    [
        ("wav", b"RIFF\4\0\0\0WAVE" + b"RIFF\4\0\0\0AVIX" * 20 + b"RIFF\4\0\0\0WAVE"),
        ("mov,mp4", b"\0\0\0\x08free" * 20 + b"\0\0\0\x10ftypisom\0\0\0\0"),
        ("flv", b"FLV" + bytes(10) + bytes(15) * 20 + b"FLV" + bytes(20)),
    ],
)
def test_a_file_of_many_small_pieces_is_not_followed_to_its_end(
    container: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "many").write_bytes(content)
    assert joined_files.second_file(tmp_path / "many", container) is not None
    monkeypatch.setattr(joined_files, "MOST_PIECES", 10)
    assert joined_files.second_file(tmp_path / "many", container) is None


def test_a_box_that_claims_to_be_endless_is_the_last(tmp_path: Path) -> None:
    box = b"\0\0\0\1free" + b"\xff" * 8
    (tmp_path / "endless").write_bytes(box + bytes(20))
    assert joined_files.second_file(tmp_path / "endless", "mov,mp4") is None
