"""Parts with one file share one decode, and each gets the clip that it would get alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from data.media.media_files import RATE, clicks, reason, write_clip
from PIL import Image
from tiny import World, make_world, settings, text, write_rows
from tiny import row as chat

from avllm.config import RunConfig
from avllm.data.cache.fill import FeatureCache, encode, recipe
from avllm.data.dataset import SampleDataset
from avllm.data.media import load as media
from avllm.data.media.load import Clip, Sampling
from avllm.data.media.part import load_parts
from avllm.data.media.pictures import still
from avllm.data.reading import MediaReader
from avllm.data.schema import AudioPart, ImagePart, MediaPart, VideoPart
from avllm.evaluation.clips import EncodedClip, Failure, encode_clips
from avllm.inference.chat import Chat
from avllm.training.start import Parts, build_datasets, build_parts

SAMPLING = Sampling(num_frames=5, short_side=48)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Uses of files from now on: ``open NAME``, ``frames NAME``, ``sound NAME``, in order."""
    done: list[str] = []

    def watch(
        owner: Any,
        function: str,
        word: str,
        name: Callable[[Any], object] = lambda given: given,
    ) -> None:
        real = getattr(owner, function)

        def call(given: Any, *args: Any, **options: Any) -> Any:
            done.append(f"{word} {Path(str(name(given))).name}")
            return real(given, *args, **options)

        monkeypatch.setattr(owner, function, call)

    watch(av, "open", "open")
    watch(still, "open_bytes", "open")  # still pictures
    watch(media, "read_frames", "frames", lambda opened: opened.path)
    watch(media, "read_sound", "sound", lambda opened: opened.path)
    return done


def load_part(part: MediaPart, root: Path, **how: Any) -> Clip:
    """Return the clip of a part alone."""
    return load_parts([part], root, **how)[0]


def same(a: Clip, b: Clip) -> bool:
    """Return whether two clips are equal bit by bit."""
    if a.duration != b.duration or (a.frames is None, a.sound is None) != (
        b.frames is None,
        b.sound is None,
    ):
        return False
    pairs = (
        [(a.frames.x, b.frames.x), (a.frames.span, b.frames.span)] if a.frames and b.frames else []
    )
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
    folder: Path,
    name: str,
    interval: dict[str, float],
    sound: str,
    counted: list[str],
) -> None:
    codecs = {"codec": "mpeg4", "sound_codec": "libmp3lame"} if name == "a.avi" else {}
    if not (folder / name).exists():
        noise = clicks(3, 44_100, [0.5, 1.5]) + 0.1 * np.random.default_rng(0).standard_normal(
            (1, 132_300),
        )
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


def test_other_intervals_and_files_are_decoded_for_themselves(
    folder: Path,
    counted: list[str],
) -> None:
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


def test_a_part_without_its_track_fails_as_it_does_alone(folder: Path) -> None:
    write_clip(folder / "mute.mp4", seconds=1)
    seen, heard = VideoPart(video="mute.mp4"), AudioPart(audio="mute.mp4")
    how = {"sampling": SAMPLING, "rate": RATE}
    assert load_parts([seen, seen], folder, **how)[1].sound is None
    assert reason(lambda: load_parts([seen, heard], folder, **how)) == "no_audio"
    assert reason(lambda: load_part(heard, folder, **how)) == "no_audio"
    with pytest.raises(ValueError, match=r"mute\.mp4.*rate"):
        load_parts([seen, heard], folder, sampling=SAMPLING, rate=None)


# ---- where training reads -------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=2)


def dataset(
    world: World,
    rows: list[dict[str, Any]],
    folder: Path,
    **changes: Any,
) -> SampleDataset:
    """Rows as a stage reads them."""
    manifest = write_rows(world.captions.parent / f"{folder.name}.jsonl", rows)
    config = RunConfig.model_validate(settings(world, folder, data__train=str(manifest), **changes))
    return build_datasets(config, build_parts(config))[0]


def test_a_row_and_the_questions_about_it_open_each_file_once(
    world: World,
    tmp_path: Path,
    counted: list[str],
) -> None:
    parts = [
        {"type": "video", "video": "000.mp4", "sound": "off"},
        {"type": "audio", "audio": "000.mp4"},
    ]
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


def test_what_is_kept_in_memory_is_not_opened_again(
    world: World,
    tmp_path: Path,
    counted: list[str],
) -> None:
    parts = [{"type": "video", "video": "001.mp4"}, {"type": "audio", "audio": "001.mp4"}]
    rows = [
        chat("both", [*parts, text("what ?")], "red"),
        chat("heard", [parts[1], text("what ?")], "red"),
    ]
    kept = dataset(world, rows, tmp_path, data__keep_decoded=100)
    counted.clear()
    for item in (0, 1, 0):
        assert not kept[item].bad
    assert [each for each in counted if each.startswith("open")] == ["open 001.mp4"]


# ---- where everything else reads ------------------------------------------------------------


def stage(world: World, folder: Path) -> Parts:
    """A model and its processor."""
    return build_parts(RunConfig.model_validate(settings(world, folder)))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("cached", [False, True])
def test_clips_for_an_evaluation_or_a_cache_open_each_file_once(
    world: World,
    tmp_path: Path,
    cached: bool,
    num_workers: int,
) -> None:
    made = stage(world, tmp_path)
    seen, heard = VideoPart(video="000.mp4", sound="off"), AudioPart(audio="000.mp4")
    log = tmp_path / "opened"
    processor = Watched(made.processor, log)
    cache = (
        FeatureCache(tmp_path / "cache", recipe(made.processor, made.model.encoders, "fp32"))
        if cached
        else None
    )
    root = world.captions.parent
    found = encode_clips(
        made.model,
        processor,
        [seen, heard],
        root,
        num_workers=num_workers,
        cache=cache,
    )
    assert log.read_text().splitlines() == ["000.mp4 000.mp4"], "both parts in one call"
    for part, stream in ((seen, "video"), (heard, "audio")):
        clip = found[part]
        assert isinstance(clip, EncodedClip)
        assert list(clip.streams) == [stream]
        (alone,) = encode(
            [MediaReader(made.processor).inputs([part], root)[0]],
            made.model.encoders,
            torch.device("cpu"),
        )
        assert alone[stream].features is not None
        for name, x in alone[stream].features.items():
            torch.testing.assert_close(clip.streams[stream].features[name], x)


class Watched:
    """A processor that writes down which files it is asked for together."""

    def __init__(self, processor: Any, log: Path) -> None:
        self.processor, self.log = processor, log
        self.reads_question = processor.reads_question

    def load_clips(self, parts: Sequence[MediaPart], root: Path | None) -> Any:
        with self.log.open("a") as out:
            out.write(" ".join(part.path for part in parts) + "\n")
        return self.processor.load_clips(parts, root)

    def prepare(self, clip: Clip, question: str = "") -> Any:
        return self.processor.prepare(clip, question)


def test_one_part_that_cannot_be_had_leaves_the_others(world: World, tmp_path: Path) -> None:
    made = stage(world, tmp_path)
    write_clip(tmp_path / "mute.mp4", seconds=1)
    seen, heard = VideoPart(video="mute.mp4"), AudioPart(audio="mute.mp4")
    found = encode_clips(made.model, made.processor, [seen, heard], tmp_path)
    assert isinstance(found[seen], EncodedClip)
    assert isinstance(found[heard], Failure)
    assert found[heard].reason == "no_audio"


def test_a_chat_opens_each_file_once(world: World, tmp_path: Path, counted: list[str]) -> None:
    made = stage(world, tmp_path)
    chat_ = Chat(made.model.eval(), made.processor)
    clip = world.captions.parent / "000.mp4"
    chat_.look(video=clip, audio=clip, sound="off")
    assert [each for each in counted if each.startswith("open")] == ["open 000.mp4"]
    "".join(chat_.ask("what ?", video=clip, audio=clip, sound="off", max_new_tokens=1))
    assert [each for each in counted if each.startswith("open")] == ["open 000.mp4"], "it is kept"
    assert [p.frames is not None for p in chat_.perceived] == [True, False]
