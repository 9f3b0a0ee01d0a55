"""Media files to tensors: every quirk is a file that the test writes."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from data.media.media_files import (
    FORMATS,
    HEIGHT,
    RATE,
    WIDTH,
    click_times,
    clicks,
    cut_copy,
    drop_sound_packets,
    numbers,
    reason,
    set_display_matrix,
    spoil_sound,
    video,
    write_audio,
    write_clip,
    write_format,
    write_plain_mp3,
)

from avllm.data.media.load import Sampling, load_audio, load_image, load_video, probe

REAL = Path(__file__).resolve().parents[3] / "../shared/data/media"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def clip(folder: Path) -> Path:
    """4 s, 25 frames a second, key frames every 2 s, clicks at 1 s and 3 s."""
    return write_clip(folder / "clip.mp4", sound=clicks(4, 48_000, [1, 3]))


# ---------------------------------------------------------------- which frames


def test_uniform_frames_are_those_at_the_centres(clip: Path) -> None:
    found = video(clip, 8)
    assert found.frames is not None
    assert found.duration == 4.0
    assert numbers(found.frames.x) == [
        6,
        18,
        31,
        43,
        56,
        68,
        81,
        93,
    ]  # 0.25 s, 0.75 s, ... at 25 frames a second
    assert torch.equal(found.frames.span[:, 0], torch.arange(8) * 0.5)
    assert torch.equal(found.frames.span[1:, 0], found.frames.span[:-1, 1])
    assert found.frames.span[-1, 1] == 4.0
    assert found.frames.x.dtype == torch.uint8
    assert found.frames.x.shape == (8, HEIGHT, WIDTH, 3)


def test_frames_per_second_and_their_cap(clip: Path) -> None:
    every = load_video(clip, sampling=Sampling(fps=2), rate=None, end=3.9).frames
    assert every is not None
    assert numbers(every.x) == [6, 18, 31, 43, 56, 68, 81, 92]
    assert every.span[-1].tolist() == pytest.approx([3.5, 3.9])
    capped = load_video(clip, sampling=Sampling(fps=25, max_frames=4), rate=None).frames
    assert capped is not None
    assert numbers(capped.x) == [12, 37, 62, 87]
    assert capped.span[-1].tolist() == [3.0, 4.0]


def test_more_frames_than_there_are_shows_some_twice(clip: Path) -> None:
    found = video(clip, 16, start=1.0, end=1.16)
    assert found.frames is not None
    assert numbers(found.frames.x) == [25 + i // 4 for i in range(16)]


def test_interval_frames_and_sound_share_one_clock(clip: Path) -> None:
    found = load_video(clip, sampling=Sampling(num_frames=4), rate=RATE, start=0.8, end=2.8)
    assert found.frames is not None
    assert found.sound is not None
    assert found.duration == pytest.approx(2.0)
    assert numbers(found.frames.x) == [26, 38, 51, 63]
    assert click_times(found) == pytest.approx([0.2], abs=0.005)
    assert len(found.sound.x) == 2 * RATE


@pytest.mark.parametrize(("start", "end"), [(2.0, 2.0), (5.0, None), (-1.0, 2.0), (3.0, 1.0)])
def test_an_empty_interval_is_an_error(clip: Path, start: float, end: float | None) -> None:
    assert reason(lambda: video(clip, start=start, end=end)) == "empty_interval"


def test_variable_frame_rate_is_read_by_timestamps(folder: Path) -> None:
    times = [0, 0.04, 0.08, 0.12, 1.0, 2.0, 2.04, 2.08, 3.0, 3.5]
    path = write_clip(
        folder / "vfr.mp4",
        times=times,
        options={"bf": "0"},
    )  # else the muxer cuts the duration
    expected = [
        max(i for i, t in enumerate(times) if t <= moment)
        for moment in (0.25, 0.75, 1.25, 1.75, 2.25, 2.75)
    ]
    for backend in ("auto", "decord"):
        found = video(path, 6, end=3.0, backend=backend)
        assert found.frames is not None
        assert numbers(found.frames.x) == expected


def test_one_frame_clip(folder: Path) -> None:
    path = write_clip(folder / "one.mp4", seconds=0.04)
    found = load_video(path, sampling=Sampling(fps=1), rate=RATE)
    assert found.frames is not None
    assert found.frames.x.shape[0] == 1
    assert found.sound is None
    assert found.frames.span.tolist() == [[0.0, pytest.approx(0.04)]]
    assert numbers(video(path, 4).frames.x) == [0] * 4  # type: ignore[union-attr]


def test_few_frames_of_a_long_file_are_sought(folder: Path) -> None:
    path = write_clip(
        folder / "long.mp4",
        seconds=200,
        fps=5,
        gop=25,
        size=(80, 48),
        sound=clicks(200, 8000, [150]),
        rate=8000,
    )
    found = load_video(path, sampling=Sampling(num_frames=4), rate=RATE)
    assert found.frames is not None
    assert numbers(found.frames.x) == [125, 375, 625, 875]
    late = load_video(path, sampling=Sampling(fps=1), rate=RATE, start=140, end=160)
    assert late.frames is not None
    assert numbers(late.frames.x) == [(700 + 2 + 5 * i) for i in range(20)]
    assert click_times(late) == pytest.approx([10.0], abs=0.005)


@pytest.mark.parametrize("suffix", ["ts", "mkv", "mp4", "flv", "mpg"])
def test_sound_is_found_behind_the_frames_far_into_a_file(folder: Path, suffix: str) -> None:
    """Reading frames leaves the sound track switched off; a seek has to switch it on first."""
    sound, rate = clicks(40, 44_100, [0.5, 33.0]), 44_100
    codecs = {"codec": "mpeg2video", "sound_codec": "ac3"} if suffix == "mpg" else {}
    small = {"seconds": 40, "fps": 25, "gop": 25, "size": (80, 48)}
    path = write_clip(folder / f"far.{suffix}", **small, **codecs, sound=sound, rate=rate)
    for start, end, at in ((0.0, 2.0, 0.5), (32.0, 34.0, 1.0)):
        found = load_video(path, sampling=Sampling(num_frames=2), rate=RATE, start=start, end=end)
        alone = load_audio(path, rate=RATE, start=start, end=end)
        assert torch.equal(found.sound.x, alone.sound.x)  # type: ignore[union-attr]
        assert click_times(found) == pytest.approx(
            [at],
            abs=0.06,
        )  # these containers do not tell the codec's delay
    few = load_video(path, sampling=Sampling(num_frames=4), rate=None, end=32.0)
    assert numbers(few.frames.x) == pytest.approx([100, 300, 500, 700], abs=2)  # type: ignore[union-attr]


# ---------------------------------------------------------------- codecs, containers, back ends


@pytest.mark.parametrize("name", FORMATS)
def test_selected_packets_give_the_frames_of_a_full_decode(folder: Path, name: str) -> None:
    path = write_format(folder, name)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        origin = (container.start_time or 0) / 1e6
        full = [
            (float(f.pts * stream.time_base) - origin, f.to_ndarray(format="rgb24"))
            for f in container.decode(stream)
        ]
    if name == "h264.avi":  # says in which order frames are decoded, not when they are displayed
        full = [(number / 25, picture) for number, (_, picture) in enumerate(full)]
    for options in ({"start": 0.3, "end": 1.1}, {"start": 1.3, "end": 2.7}, {}):
        found = video(path, 5, **options)
        first = options.get("start", 0.0)
        assert found.frames is not None
        for (low, high), x in zip(found.frames.span.double().tolist(), found.frames.x, strict=True):
            expected = [
                picture for time, picture in full if time <= first + (low + high) / 2 + 1e-5
            ] or [full[0][1]]
            assert np.array_equal(x.numpy(), expected[-1])


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "hevc.mp4", "vp9.webm", "av1.mp4", "h264.avi"])
def test_decord_gives_the_same_frames(folder: Path, name: str) -> None:
    path = write_format(folder, name)
    ours, decord = (video(path, 7, backend=b).frames for b in ("pyav", "decord"))
    assert ours is not None
    assert decord is not None
    assert torch.equal(ours.x, decord.x)


def test_decoding_is_deterministic(clip: Path) -> None:
    sampling = Sampling(num_frames=8, short_side=48)
    runs = [load_video(clip, sampling=sampling, rate=RATE, threads=n) for n in (1, 1, 2)]
    for run in runs[1:]:
        assert torch.equal(run.frames.x, runs[0].frames.x)
        assert torch.equal(run.sound.x, runs[0].sound.x)


def test_short_side_shrinks_and_never_enlarges(clip: Path) -> None:
    for short, shape in [(48, (48, 80)), (96, (96, 160)), (200, (96, 160))]:
        for backend in ("pyav", "decord"):
            found = video(
                clip,
                1,
                sampling=Sampling(num_frames=1, short_side=short),
                backend=backend,
            )
            assert found.frames is not None
            assert found.frames.x.shape[1:3] == shape


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_rotation_metadata_is_applied(folder: Path, angle: int) -> None:
    path = write_clip(folder / f"rotated{angle}.mp4", seconds=0.4, rotate=angle)
    straight = video(write_clip(folder / "straight.mp4", seconds=0.4), 2).frames
    assert straight is not None
    expected = torch.rot90(straight.x, angle // 90, (1, 2))  # both count counter-clockwise
    for backend in ("pyav", "decord"):
        found = video(path, 2, backend=backend).frames
        assert found is not None
        assert torch.equal(found.x, expected)
    info = probe(path)
    assert info.rotation == (360 - angle) % 360
    assert (info.height, info.width) == tuple(expected.shape[1:3])


@pytest.mark.parametrize("matrix", [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)])
def test_mirrored_pictures_are_mirrored_by_every_backend(
    folder: Path,
    matrix: tuple[int, int, int, int],
) -> None:
    straight = write_clip(folder / "straight.mp4", seconds=0.4)
    path = set_display_matrix(straight, folder / "mirrored.mp4", matrix)
    expected = video(straight, 2).frames.x
    a, b, c, d = matrix
    expected = expected.transpose(1, 2) if b else expected
    expected = expected.flip([dim for dim, sign in ((2, a + c), (1, b + d)) if sign < 0])
    for backend in ("pyav", "decord"):
        assert torch.equal(video(path, 2, backend=backend).frames.x, expected)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_before_a_picture_that_starts_late_its_first_frame_stands(
    folder: Path,
    suffix: str,
) -> None:
    late = [2 + i / 25 for i in range(25)]
    path = write_clip(
        folder / f"late-picture.{suffix}",
        times=late,
        sound=clicks(3, RATE, [0.5, 1.0]),
        rate=RATE,
    )
    found = video(path, 2, start=0.25, end=1.25, rate=RATE)
    assert numbers(found.frames.x) == [0, 0]
    assert click_times(found) == pytest.approx([0.25, 0.75], abs=0.01)
    assert (probe(path).width, probe(path).height) == (160, 96)


def test_stream_copied_cut_with_an_edit_list(folder: Path, clip: Path) -> None:
    path = cut_copy(clip, folder / "cut.mp4", start=1.4)
    assert probe(path).edit_list
    assert not probe(clip).edit_list
    for backend in ("auto", "decord"):
        found = video(path, 6, end=2.4, backend=backend)
        assert found.frames is not None
        assert numbers(found.frames.x) == [40, 50, 60, 70, 80, 90]


# ---------------------------------------------------------------- sound


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("s.mp4", "aac"),
        ("s.mkv", "aac"),
        ("s.webm", "libopus"),
        ("s.mkv", "flac"),
        ("s.mp4", "libmp3lame"),
    ],
)
def test_a_click_is_found_where_it_was_written(folder: Path, name: str, codec: str) -> None:
    video_codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    sound = clicks(4, 48_000, [1.0, 2.5], channels=2)
    path = write_clip(
        folder / f"{codec}-{name}",
        codec=video_codec,
        sound=sound,
        sound_codec=codec,
        layout="stereo",
    )
    found = load_video(path, sampling=Sampling(num_frames=1), rate=RATE)
    assert click_times(found) == pytest.approx([1.0, 2.5], abs=0.01)
    later = load_video(path, sampling=None, rate=RATE, start=2.25, end=3)
    assert later.frames is None
    assert click_times(later) == pytest.approx([0.25], abs=0.01)


@pytest.mark.parametrize("codec", ["pcm_s16le", "pcm_u8", "pcm_f32le", "pcm_s32le", "flac"])
@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_sound_files_of_every_sample_format(folder: Path, codec: str, rate: int) -> None:
    path = folder / f"{codec}-{rate}.{'flac' if codec == 'flac' else 'wav'}"
    sound = clicks(2, rate, [0.5])
    found = load_audio(write_audio(path, sound, rate, codec), rate=rate).sound
    assert found is not None
    assert found.start == 0.0
    assert torch.allclose(
        found.x,
        torch.from_numpy(sound[0]),
        atol=1 / 100 if codec == "pcm_u8" else 1e-4,
    )


@pytest.mark.parametrize("rate", [192_000, 44_101, 11_025])
def test_odd_rates_are_resampled(folder: Path, rate: int) -> None:
    found = load_audio(write_audio(folder / f"{rate}.wav", clicks(2, rate, [1.5]), rate), rate=RATE)
    assert click_times(found) == pytest.approx([1.5], abs=0.002)
    assert len(found.sound.x) == 2 * RATE


@pytest.mark.parametrize("name", ["adts.aac", "plain.mp3", "xing.mp3", "a.ac3"])
def test_a_duration_that_is_only_estimated_is_not_believed(folder: Path, name: str) -> None:
    """Five loud seconds and 25 quiet ones: the first bit rate says little about the length."""
    sound = clicks(30, 44_100, [25.5])
    sound[:, : 5 * 44_100] += 0.1 * np.random.default_rng(0).standard_normal(5 * 44_100).astype(
        np.float32,
    )
    codec = {"aac": "aac", "mp3": "libmp3lame", "ac3": "ac3"}[name.split(".")[1]]
    plain = name == "plain.mp3"
    path = (
        write_plain_mp3(folder / name, sound, 44_100)
        if plain
        else write_audio(folder / name, sound, 44_100, codec)
    )
    found = load_audio(path, rate=RATE)
    assert found.duration == pytest.approx(30, abs=0.1)
    assert found.sound.start + len(found.sound.x) / RATE == pytest.approx(30, abs=0.1)
    assert click_times(found)[-1] == pytest.approx(
        25.5,
        abs=0.06,
    )  # these containers do not tell the codec's delay


def test_an_interval_is_a_slice_of_the_whole(folder: Path) -> None:
    noise = 0.3 * np.random.default_rng(0).standard_normal((1, 44_100 * 30)).astype(np.float32)
    path = write_audio(folder / "noise.wav", noise, 44_100)
    whole = load_audio(path, rate=RATE).sound
    assert whole is not None
    for start, end in [(0.0, 1.0), (3.3, 4.7), (25.0, 28.21), (29.0, 30.0)]:
        part = load_audio(path, rate=RATE, start=start, end=end).sound
        assert part is not None
        assert part.start < 1 / RATE
        low = round((start + part.start) * RATE)
        assert torch.allclose(part.x, whole.x[low : low + len(part.x)], atol=1e-5)
        assert abs(len(part.x) - (end - start) * RATE) <= 1


def test_mono_is_the_mean_of_all_channels(folder: Path) -> None:
    for layout, count in [("stereo", 2), ("7.1", 8)]:
        sound = np.zeros((count, 8_000), np.float32)
        sound[0] = 0.5
        found = load_audio(
            write_audio(folder / f"{count}.wav", sound, 8_000, layout=layout),
            rate=8_000,
        ).sound
        assert found is not None
        assert torch.allclose(found.x, torch.full((8_000,), 0.5 / count), atol=1e-4)


def test_a_track_that_starts_late_or_ends_early_is_not_padded(folder: Path) -> None:
    path = write_clip(folder / "late.mp4", sound=clicks(1.5, 48_000, [0.5]), sound_start=1.0)
    found = load_video(path, sampling=Sampling(num_frames=2), rate=RATE)
    assert found.sound is not None
    assert found.duration == pytest.approx(4.0, abs=0.05)
    assert found.sound.start == pytest.approx(1.0, abs=0.03)  # less the encoder's own first packet
    assert found.sound.start + len(found.sound.x) / RATE == pytest.approx(2.5, abs=0.03)
    assert click_times(found) == pytest.approx([1.5], abs=0.01)
    assert load_video(path, sampling=Sampling(num_frames=2), rate=RATE, start=3).sound is None
    assert (
        reason(lambda: load_video(path, sampling=None, rate=RATE, start=3, sound="on"))
        == "no_audio"
    )


def test_a_hole_in_the_track_keeps_what_follows_in_place(folder: Path) -> None:
    whole = write_clip(folder / "whole.mkv", sound=clicks(4, 48_000, [0.5, 3.0]))
    path = drop_sound_packets(whole, folder / "hole.mkv", 1.0, 2.0)
    assert click_times(load_video(path, sampling=None, rate=RATE)) == pytest.approx(
        [0.5, 3.0],
        abs=0.01,
    )


def test_sound_auto_on_off(folder: Path, clip: Path) -> None:
    silent = write_clip(folder / "silent.mp4", seconds=1)
    assert load_video(silent, sampling=Sampling(num_frames=1), rate=RATE).sound is None
    assert reason(lambda: load_video(silent, sampling=None, rate=RATE, sound="on")) == "no_audio"
    assert reason(lambda: load_audio(silent, rate=RATE)) == "no_audio"
    spoilt = spoil_sound(clip, folder / "spoilt.mp4")
    assert (
        video(spoilt, rate=RATE, sound="off").sound is None
    )  # not decoded, so what is wrong with it does not matter
    assert reason(lambda: video(spoilt, rate=RATE)) == "undecodable"


def test_sound_only_in_a_video_container(folder: Path) -> None:
    path = write_audio(folder / "sound_only.mp4", clicks(2, 48_000, [1]), 48_000, "aac")
    assert click_times(load_audio(path, rate=RATE)) == pytest.approx([1.0], abs=0.01)
    assert reason(lambda: video(path)) == "no_video"
    assert not probe(path).has_video


# ---------------------------------------------------------------- headers and real files


def test_probe_says_what_is_there(clip: Path) -> None:
    info = probe(clip)
    assert (info.width, info.height, info.fps, info.num_frames, info.rotation) == (
        WIDTH,
        HEIGHT,
        25.0,
        100,
        0,
    )
    assert (info.video_codec, info.audio_codec, info.audio_rate, info.audio_channels) == (
        "h264",
        "aac",
        48_000,
        1,
    )
    assert info.duration == pytest.approx(4.0, abs=0.05)
    assert info.audio_duration == pytest.approx(4.0, abs=0.05)
    assert info.audio_start == 0.0
    assert info.has_video
    assert info.has_audio


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared real media are not on this machine")
def test_real_media() -> None:
    for path in sorted(REAL.iterdir()):
        if path.suffix == ".mp4":
            found = load_video(
                path,
                sampling=Sampling(num_frames=4, short_side=112),
                rate=RATE,
                end=5.0,
            )
            other = video(path, 3, end=5.0, backend="decord").frames
            assert found.frames is not None
            assert min(found.frames.x.shape[1:3]) == 112
            assert torch.equal(other.x, video(path, 3, end=5.0).frames.x)  # type: ignore[union-attr]
            assert (found.sound is not None) == probe(path).has_audio
        elif path.suffix == ".wav":
            found = load_audio(path, rate=RATE)
            assert found.sound is not None
            assert len(found.sound.x) == pytest.approx(found.duration * RATE, abs=2)
        elif path.suffix == ".jpg":
            assert load_image(path).frames is not None


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared real media are not on this machine")
def test_torchcodec_gives_the_same_frames() -> None:
    try:
        theirs = video(REAL / "boat.mp4", 5, backend="torchcodec").frames
    except ImportError as error:
        pytest.skip(str(error))
    ours = video(REAL / "boat.mp4", 5).frames
    assert ours is not None
    assert theirs is not None
    assert (ours.x.float() - theirs.x.float()).abs().mean() < 2
