"""A file that several parts of a row show is opened and decoded once, and each gets what it would get alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from data.media_files import RATE, clicks, reason, write_clip
from PIL import Image
from tiny import World, make_world, settings, text, write_rows
from tiny import row as chat

from avllm.config import RunConfig
from avllm.data import media
from avllm.data.dataset import SampleDataset
from avllm.data.media import Clip, Sampling
from avllm.data.media_part import load_part, load_parts
from avllm.data.schema import AudioPart, ImagePart, MediaPart, VideoPart
from avllm.training.start import build_datasets, build_parts

SAMPLING = Sampling(num_frames=5, short_side=48)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to files from now on: ``open NAME``, ``frames NAME``, ``sound NAME``, in order."""
    done: list[str] = []

    def watch(owner: Any, function: str, word: str, name: Callable[[Any], object] = lambda given: given) -> None:
        real = getattr(owner, function)

        def call(given: Any, *args: Any, **options: Any) -> Any:
            done.append(f"{word} {Path(str(name(given))).name}")
            return real(given, *args, **options)

        monkeypatch.setattr(owner, function, call)

    watch(av, "open", "open")
    watch(media, "open_bytes", "open")  # still pictures
    watch(media, "read_frames", "frames", lambda opened: opened.path)
    watch(media, "read_sound", "sound", lambda opened: opened.path)
    return done


def same(a: Clip, b: Clip) -> bool:
    """Whether two clips are equal bit by bit."""
    if a.duration != b.duration or (a.frames is None, a.sound is None) != (b.frames is None, b.sound is None):
        return False
    pairs = [(a.frames.x, b.frames.x), (a.frames.span, b.frames.span)] if a.frames and b.frames else []
    if a.sound and b.sound:
        pairs.append((a.sound.x, b.sound.x))
        assert (a.sound.rate, a.sound.start) == (b.sound.rate, b.sound.start)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi", "a.flv"])
@pytest.mark.parametrize("interval", [{}, {"start": 0.7, "end": 2.3}], ids=["whole", "interval"])
@pytest.mark.parametrize("sound", ["auto", "on", "off"])
def test_parts_of_one_file_share_one_decode_bit_by_bit(
    folder: Path, name: str, interval: dict[str, float], sound: str, counted: list[str]
) -> None:
    codecs = {"codec": "mpeg4", "sound_codec": "libmp3lame"} if name == "a.avi" else {}
    if not (folder / name).exists():
        noise = clicks(3, 44_100, [0.5, 1.5]) + 0.1 * np.random.default_rng(0).standard_normal((1, 132_300))
        write_clip(folder / name, seconds=3, sound=noise.astype(np.float32), rate=44_100, **codecs)
    seen = VideoPart(video=name, sound=sound, **interval)
    heard = AudioPart(audio=name, **interval)
    how = {"sampling": SAMPLING, "rate": RATE}
    for parts in ([seen, heard], [heard, seen], [seen, seen, heard]):
        alone = [load_part(part, folder, **how) for part in parts]
        counted.clear()
        together = load_parts(parts, folder, **how)
        assert counted == [f"open {name}", f"frames {name}", f"sound {name}"]
        assert all(same(a, b) for a, b in zip(together, alone, strict=True))
        assert [(c.frames is None, c.sound is None) for c in together] == [
            (isinstance(part, AudioPart), part == seen and sound == "off") for part in parts
        ]


def test_other_intervals_and_files_are_decoded_for_themselves(folder: Path, counted: list[str]) -> None:
    for name in ("one.mp4", "two.mp4"):
        write_clip(folder / name, seconds=2, sound=clicks(2, 48_000, [0.5]))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "still.png")
    parts: list[MediaPart] = [
        VideoPart(video="one.mp4"),
        AudioPart(audio="one.mp4", end=1.0),
        ImagePart(image="still.png"),
        AudioPart(audio="two.mp4"),
        ImagePart(image="still.png"),
        AudioPart(audio=str(folder / "one.mp4")),
    ]
    alone = [load_part(part, folder, sampling=SAMPLING, rate=RATE) for part in parts]
    counted.clear()
    together = load_parts(parts, folder, sampling=SAMPLING, rate=RATE)
    assert [each for each in counted if each.startswith("open")] == [
        "open one.mp4",
        "open one.mp4",
        "open still.png",
        "open two.mp4",
    ]
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))


def test_what_a_part_lacks_is_told_as_if_it_stood_alone(folder: Path) -> None:
    write_clip(folder / "mute.mp4", seconds=1)
    seen, heard = VideoPart(video="mute.mp4"), AudioPart(audio="mute.mp4")
    how = {"sampling": SAMPLING, "rate": RATE}
    assert load_parts([seen, seen], folder, **how)[1].sound is None
    assert reason(lambda: load_parts([seen, heard], folder, **how)) == "no_audio"
    assert reason(lambda: load_part(heard, folder, **how)) == "no_audio"
    with pytest.raises(ValueError, match="is to be heard, but rate is None"):
        load_parts([seen, heard], folder, sampling=SAMPLING, rate=None)


# ---- where training reads -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=2)


def dataset(world: World, rows: list[dict[str, Any]], folder: Path, **changes: Any) -> SampleDataset:
    """Rows as a stage reads them."""
    manifest = write_rows(world.captions.parent / f"{folder.name}.jsonl", rows)
    config = RunConfig.model_validate(settings(world, folder, data__train=str(manifest), **changes))
    return build_datasets(config, build_parts(config))[0]


def test_a_row_and_the_questions_about_it_open_each_file_once(world: World, tmp_path: Path, counted: list[str]) -> None:
    parts = [{"type": "video", "video": "000.mp4", "sound": "off"}, {"type": "audio", "audio": "000.mp4"}]
    asked = ("what colour is it ?", "do you hear a low sound ?")
    rows = [chat(str(n), [*parts, text(question)], "red") for n, question in enumerate(asked)]
    whole = ["open 000.mp4", "frames 000.mp4", "sound 000.mp4"]
    plain, packed = (dataset(world, rows, tmp_path, data__pack=pack) for pack in (False, True))
    counted.clear()
    (row,) = plain[0].rows
    assert counted == whole
    assert [sorted(clip) for clip in row.clips] == [["video"], ["audio"]]
    counted.clear()
    (together,) = packed[0].rows
    assert (len(packed), counted) == (1, whole), "two questions, one copy of the media"
    for a, b in zip(row.clips, together.clips, strict=True):
        for stream in a:
            assert all(torch.equal(x, b[stream].inputs[k]) for k, x in a[stream].inputs.items())


def test_what_is_kept_in_memory_is_not_opened_again(world: World, tmp_path: Path, counted: list[str]) -> None:
    parts = [{"type": "video", "video": "001.mp4"}, {"type": "audio", "audio": "001.mp4"}]
    rows = [chat("both", [*parts, text("what ?")], "red"), chat("heard", [parts[1], text("what ?")], "red")]
    kept = dataset(world, rows, tmp_path, data__keep_decoded=100)
    counted.clear()
    for item in (0, 1, 0):
        assert not kept[item].bad
    assert [each for each in counted if each.startswith("open")] == ["open 001.mp4"]
