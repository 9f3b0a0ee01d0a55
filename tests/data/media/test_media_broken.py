"""Check broken files: each gives a ``MediaError`` with its reason; none crashes or hangs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from data.media.media_files import (
    RATE,
    click_times,
    clicks,
    numbers,
    reason,
    video,
    write_audio,
    write_clip,
    write_format,
)
from PIL import Image

from avllm.data.media import errors as media_errors
from avllm.data.media.load import (
    MediaError,
    Sampling,
    is_picture,
    load_audio,
    load_image,
    load_video,
    probe,
)
from avllm.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def clip(folder: Path) -> Path:
    """4 s, 25 frames a second, key frames every 2 s, clicks at 1 s and 3 s."""
    return write_clip(folder / "clip.mp4", sound=clicks(4, 48_000, [1, 3]))


# ---------------------------------------------------------------- still images


def test_images_of_every_mode(folder: Path) -> None:
    red = Image.new("RGB", (6, 4), (255, 0, 0))
    red.save(folder / "a.png")
    red.quantize().save(folder / "palette.png")
    for name in ("a.png", "palette.png"):
        found = load_image(folder / name)
        assert found.frames is not None
        assert found.frames.x.shape == (1, 4, 6, 3)
        assert found.duration == 0.0
        assert found.frames.span.tolist() == [[0.0, 0.0]]
        assert (found.frames.x == torch.tensor([255, 0, 0])).all()
    Image.new("RGBA", (6, 4), (255, 0, 0, 0)).save(folder / "clear.png")
    assert (load_image(folder / "clear.png").frames.x == 255).all()  # type: ignore[union-attr]
    Image.fromarray(np.full((4, 6), 128 * 256, np.uint16)).save(folder / "deep.png")
    assert (load_image(folder / "deep.png").frames.x == 128).all()  # type: ignore[union-attr]


def test_exif_rotation_is_applied(folder: Path) -> None:
    x = np.zeros((40, 60, 3), np.uint8)
    x[:, :30] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise
    Image.fromarray(x).save(folder / "exif.jpg", exif=exif, quality=95)
    found = load_image(folder / "exif.jpg").frames
    assert found is not None
    assert found.x.shape == (1, 60, 40, 3)
    assert found.x[0, :25].float().mean() > 250
    assert found.x[0, 35:].float().mean() < 5


def test_broken_images(folder: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        folder / "full.jpg",
    )
    whole = (folder / "full.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("no picture")
    (folder / "empty.jpg").write_bytes(b"")
    names = {
        "cut.jpg": "truncated",
        "text.jpg": "undecodable",
        "empty.jpg": "zero_byte",
        "none.jpg": "missing",
    }
    for name, expected in names.items():
        assert reason(lambda name=name: load_image(folder / name)) == expected
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "full.png")
    header = (folder / "full.png").read_bytes()
    (folder / "header.png").write_bytes(
        header[:11] + bytes([12]) + header[12:],
    )  # Pillow raises a bare ValueError
    assert reason(lambda: load_image(folder / "header.png")) == "truncated"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        folder / "full.avif",
    )
    for seed in range(60):  # Pillow raises RuntimeError for some
        flip(folder / "full.avif", folder / "flipped.avif", seed)
        survives(lambda: load_image(folder / "flipped.avif"))
        survives(lambda: is_picture(folder / "flipped.avif"))
    for name in ("full.jpg", "full.png"):
        with pytest.raises(MediaError, match=r"undecodable.*image"):
            load_video(folder / name, sampling=None, rate=RATE)
    for seed in range(10):
        flip(folder / "full.jpg", folder / "flipped.jpg", seed)
        survives(lambda: load_image(folder / "flipped.jpg"))


# ---------------------------------------------------------------- broken files


def flip(source: Path, target: Path, seed: int, share: float = 0.01) -> None:
    """Copy with some bytes replaced by random ones."""
    draw = np.random.default_rng(seed)
    data = np.frombuffer(source.read_bytes(), np.uint8).copy()
    at = draw.integers(0, len(data), max(1, int(len(data) * share)))
    data[at] = draw.integers(0, 256, len(at))
    target.write_bytes(data.tobytes())


def survives(call) -> str:
    """Either a result or a ``MediaError``, never anything else; the reason, or "read"."""
    try:
        call()
    except MediaError as error:
        return error.reason
    return "read"


def test_files_that_are_not_media(folder: Path) -> None:
    (folder / "text.mp4").write_text("this is not a video\n" * 100)
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "list.mp4").write_text("#EXTM3U\n#EXTINF:4,\nclip.mp4\n#EXT-X-ENDLIST\n")
    for name, expected in {
        "text.mp4": "undecodable",
        "zero.mp4": "zero_byte",
        "no.mp4": "missing",
        "list.mp4": "undecodable",
    }.items():
        for call in (lambda p: video(p), lambda p: load_audio(p, rate=RATE), probe):
            assert reason(lambda call=call, name=name: call(folder / name)) == expected
    assert reason(lambda: video(folder)) == "missing"


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.8])
@pytest.mark.parametrize("name", ["front.mp4", "clip.mp4", "t.mkv", "t.avi", "t.wav"])
def test_truncated_files(folder: Path, clip: Path, name: str, share: float) -> None:
    sound = 0.3 * np.random.default_rng(0).standard_normal((1, 4 * 48_000)).astype(np.float32)
    if name == "t.wav":
        whole = write_audio(folder / name, sound, 48_000)
    elif name != "clip.mp4":
        front = {"movflags": "faststart"} if name == "front.mp4" else None
        avi = {"codec": "mpeg4", "sound_codec": "libmp3lame"} if name == "t.avi" else {}
        whole = write_clip(folder / name, sound=sound, container_options=front, **avi)
    else:
        whole = clip
    data = whole.read_bytes()
    path = folder / f"truncated-{name}"
    path.write_bytes(data[: int(len(data) * share)])
    call = (
        (lambda: load_audio(path, rate=RATE))
        if name == "t.wav"
        else (lambda: video(path, rate=RATE))
    )
    assert (
        reason(call) in ("truncated", "undecodable") if share < 0.1 else reason(call) == "truncated"
    )


def test_the_intact_part_of_a_truncated_file_can_be_read(folder: Path) -> None:
    whole = write_clip(
        folder / "w.mp4",
        sound=clicks(4, 48_000, [0.5]),
        container_options={"movflags": "faststart"},
    )
    data = whole.read_bytes()
    (folder / "half.mp4").write_bytes(data[: int(len(data) * 0.7)])
    found = load_video(folder / "half.mp4", sampling=Sampling(num_frames=2), rate=RATE, end=0.8)
    assert numbers(found.frames.x) == [5, 15]  # type: ignore[union-attr]
    assert click_times(found) == pytest.approx([0.5], abs=0.01)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "vp9.webm", "mpeg4.avi", "a.ts", "av1.mp4"])
def test_flipped_bytes_never_crash(folder: Path, name: str) -> None:
    path = write_format(folder, name)
    for seed in range(6):
        flip(path, folder / f"flipped-{name}", seed)
        for call in (lambda p: video(p, rate=RATE, timeout=10), probe):
            survives(lambda call=call: call(folder / f"flipped-{name}"))


def test_huge_dimensions_in_the_header_are_refused(folder: Path) -> None:
    image = b",\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;"
    (folder / "huge.gif").write_bytes(
        b"GIF89a\xff\xff\xff\xff\x80\x00\x00\x00\x00\x00\xff\xff\xff" + image,
    )
    assert reason(lambda: load_image(folder / "huge.gif")) == "absurd_header"
    for call in (video, probe):  # libav has thrown the dimensions away by then
        assert reason(lambda call=call: call(folder / "huge.gif")) == "undecodable"


def test_more_frames_than_memory_are_refused(folder: Path) -> None:
    for options in ({"num_frames": 10**9}, {"fps": 1e6}, {"fps": 1, "max_frames": 10**9}):
        with pytest.raises(UserError) as error:
            Sampling(**options)
        assert error.value.reason == "too_large"
    long = write_clip(folder / "long.mkv", seconds=20, fps=1)
    black, white = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), "white")
    black.save(folder / "long.png", save_all=True, append_images=[white], duration=10_000)
    often = Sampling(fps=1_000)  # of 20 s
    for path in (long, folder / "long.png"):
        refused = reason(lambda path=path: load_video(path, sampling=often, rate=None))
        assert refused == "undecodable"
        assert len(load_video(path, sampling=Sampling(fps=2), rate=None).frames.x) == 40


def test_a_timeout_ends_the_decoding(clip: Path) -> None:
    assert reason(lambda: video(clip, timeout=1e-9)) == "timeout"
    assert reason(lambda: load_audio(clip, rate=RATE, timeout=1e-9)) == "timeout"


@pytest.mark.parametrize("backend", ["pyav", "decord", "torchcodec"])
def test_a_timeout_ends_every_backend_between_frames(
    clip: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
) -> None:
    """On a clock that goes on by a second at each look, so that a time-out is a number of looks."""
    if backend != "pyav":
        pytest.importorskip(backend)
    looks = [0]

    def read(frames: int, timeout: float) -> int:
        """Looks at the clock after the one that begins; a clip that is read is read whole."""
        looks[0] = -1
        assert len(video(clip, frames, backend=backend, timeout=timeout).frames.x) == frames  # type: ignore[union-attr]
        return looks[0]

    def clock() -> float:
        looks[0] += 1
        return float(looks[0])

    try:
        video(clip, 8, backend=backend)
    except ImportError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(media_errors.time, "monotonic", clock)
    whole = read(8, 1e9)
    assert whole - read(2, 1e9) >= 6, "a look a frame at least"
    assert read(8, whole) == whole
    for fewer in (1, 4):
        assert reason(lambda fewer=fewer: read(8, whole - fewer)) == "timeout"
        assert looks[0] == whole - fewer + 1, "and at once"


def test_errors_cross_processes_and_name_file_and_reason() -> None:
    error = pickle.loads(pickle.dumps(MediaError("a.mp4", "truncated", "ends at 1 s")))
    assert (error.path, error.reason, error.detail) == ("a.mp4", "truncated", "ends at 1 s")
    for content in (error.path, error.reason, error.detail):
        assert content in str(error)
    assert isinstance(error, UserError)


def test_wrong_arguments_are_refused(clip: Path) -> None:
    with pytest.raises(UserError) as raised:
        Sampling()
    assert raised.value.reason == "not_one"
    with pytest.raises(UserError, match="num_frames=0") as raised:
        Sampling(num_frames=0)
    assert raised.value.reason == "not_positive"
    with pytest.raises(ValueError, match="backend='opencv'.*auto"):
        video(clip, backend="opencv")
    with pytest.raises(ValueError, match="sound='yes'.*auto"):
        video(clip, sound="yes")


def test_the_cover_of_a_sound_file_is_no_video(folder: Path) -> None:
    path = folder / "cover.m4a"
    sound = clicks(1, 16_000, [0.5])
    with av.open(str(path), "w", format="mp4") as file:
        audio = file.add_stream("aac", rate=16_000, layout="mono")
        cover = file.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 200, np.uint8), format="rgb24")
        file.mux(cover.encode(picture.reformat(format="yuvj420p")))
        frame = av.AudioFrame.from_ndarray(
            sound[:1].astype(np.float32),
            format="fltp",
            layout="mono",
        )
        frame.sample_rate = 16_000
        file.mux(audio.encode(frame))
        file.mux(audio.encode(None))
    info = probe(path)
    assert (info.has_video, info.has_audio) == (False, True)
    assert reason(lambda: video(path)) == "no_video"


def test_sampling_rates_that_nothing_has_are_refused_before_memory_is_taken(folder: Path) -> None:
    whole = bytearray(
        write_audio(folder / "rate.wav", clicks(1, 16_000, [0.5]), 16_000).read_bytes(),
    )
    at = whole.find(b"fmt ") + 12
    for rate in (1, 2**31 - 1):
        whole[at : at + 4] = rate.to_bytes(4, "little")
        (folder / "rate.wav").write_bytes(whole)
        assert reason(lambda: load_audio(folder / "rate.wav", rate=RATE)) == "absurd_header"


def test_eight_channels_are_read(folder: Path) -> None:
    sound = np.repeat(clicks(1, 48_000, [0.25, 0.75]), 8, 0)
    path = write_audio(folder / "surround.m4a", sound, 48_000, "aac", "7.1")
    assert click_times(load_audio(path, rate=RATE)) == pytest.approx([0.25, 0.75], abs=0.01)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_read_permission_are_missing(folder: Path) -> None:
    path = write_audio(folder / "locked.wav", clicks(1, 16_000, [0.5]), 16_000)
    path.chmod(0)
    assert reason(lambda: load_audio(path, rate=RATE)) == "missing"
