"""Augmented sound: a function of (seed, place), off outside of training, with its pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny import make_world, row, settings, text, write_rows

from avllm.config import RunConfig, load_config
from avllm.config_data import AugmentConfig
from avllm.config_errors import ConfigError
from avllm.data.augment import Augment, change_speed
from avllm.data.dataset import SampleDataset
from avllm.data.loader import Cut, MicroBatches, Order
from avllm.data.media.load import Clip, Frames, Sound
from avllm.training.start import build_datasets, build_parts

RATE = 16_000
EVERYTHING = AugmentConfig(
    roll=True, speed=0.5, gain=6.0, bands=2, silences=2, silence_seconds=0.2, background=0.9
)


def sound(seconds: float = 1.0, pictures: bool = False) -> Clip:
    """Noise, with two frames or without."""
    x = torch.randn(int(seconds * RATE), generator=torch.Generator().manual_seed(0))
    frames = Frames(
        torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.tensor([[0, 0.5], [0.5, 1]]) * seconds
    )
    return Clip(frames if pictures else None, Sound(x, RATE, 0.0), seconds)


def heard(settings: AugmentConfig, clip: Clip, seed: int = 0, place: int = 0) -> torch.Tensor:
    """The samples that come out."""
    changed = Augment(settings, seed)(clip, place)
    assert changed.sound is not None
    return changed.sound.x


def test_the_same_seed_and_place_give_the_same_sound() -> None:
    first = heard(EVERYTHING, sound(), seed=1, place=7)
    assert torch.equal(first, heard(EVERYTHING, sound(), seed=1, place=7))
    for seed, place in [(1, 8), (2, 7)]:
        other = heard(EVERYTHING, sound(), seed, place)
        assert other.shape != first.shape or not torch.equal(other, first)


def test_nothing_asked_for_changes_nothing() -> None:
    assert torch.equal(heard(AugmentConfig(), sound()), sound().sound.x)  # type: ignore[union-attr]


def test_roll_moves_and_loses_nothing() -> None:
    clip = sound()
    rolled = heard(AugmentConfig(roll=True), clip, place=3)
    assert not torch.equal(rolled, clip.sound.x)  # type: ignore[union-attr]
    assert torch.equal(rolled.sort().values, clip.sound.x.sort().values)  # type: ignore[union-attr]


def test_gain_stays_within_its_decibels() -> None:
    clip = sound()
    assert clip.sound is not None
    louder = AugmentConfig(gain=6.0)
    gains = [(heard(louder, clip, place=place) / clip.sound.x).mean() for place in range(50)]
    decibels = 20 * torch.stack(gains).log10()
    assert decibels.abs().max() <= 6.001
    assert decibels.max() > 4
    assert decibels.min() < -4


def test_speed_doubles_a_tone() -> None:
    tone = torch.sin(2 * torch.pi * 500 * torch.arange(RATE) / RATE)
    fast = change_speed(tone, 2.0)
    assert fast.shape == (RATE // 2,)
    assert int(torch.fft.rfft(fast).abs().argmax()) * RATE / fast.shape[0] == pytest.approx(
        1000, abs=4
    )


def test_speed_tells_the_clip_its_new_length() -> None:
    durations = []
    for place in range(20):
        changed = Augment(AugmentConfig(speed=1.0), 0)(sound(), place)
        assert changed.sound is not None
        assert changed.duration == pytest.approx(changed.sound.x.shape[0] / RATE, abs=1e-6)
        durations.append(changed.duration)
    assert 0.5 <= min(durations) < 0.7
    assert max(durations) == 1.0, "a slow one is cut at its old length"


def test_silences_are_silent_and_leave_the_rest() -> None:
    clip = sound()
    x = heard(AugmentConfig(silences=2, silence_seconds=0.2), clip, place=1)
    assert 0 < int((x == 0).sum()) <= 2 * 0.2 * RATE
    assert torch.equal(x[x != 0], clip.sound.x[x != 0])  # type: ignore[union-attr]


def test_another_sound_stands_behind_at_its_distance() -> None:
    clip, asked = sound(), []

    def other(which: float) -> Sound:
        asked.append(which)
        return Sound(torch.randn(RATE // 2), RATE, 0.0)

    augment = Augment(AugmentConfig(background=0.5, background_db=(12.0, 12.0)), 0)
    changed = [augment(clip, place, 0, other).sound.x - clip.sound.x for place in range(60)]  # type: ignore[union-attr]
    behind = [x for x in changed if x.abs().max() > 0]
    assert 15 < len(behind) == len(asked) < 45
    assert all(0 <= which < 1 for which in asked)
    level = clip.sound.x.square().mean().sqrt()  # type: ignore[union-attr]
    for x in behind:
        assert 20 * (level / x.square().mean().sqrt()).log10() == pytest.approx(12.0, abs=0.01)


def test_bands_are_softened_by_30_decibels_and_nothing_else() -> None:
    clip = sound()
    x = heard(AugmentConfig(bands=1, band_share=0.3), clip, place=2)
    ratio = torch.fft.rfft(x).abs() / torch.fft.rfft(clip.sound.x).abs()  # type: ignore[union-attr]
    soft = (ratio - 10**-1.5).abs() < 1e-3
    assert 0 < int(soft.sum()) < len(soft)
    assert torch.allclose(ratio[~soft], torch.ones(()), atol=1e-3)
    places = soft.nonzero().flatten()
    assert int(places[-1] - places[0]) + 1 == len(places), "one band has no holes"


def test_beside_pictures_only_the_loudness_changes() -> None:
    clip = sound(pictures=True)
    changed = Augment(AugmentConfig(roll=True, speed=1.0, gain=6.0), 0)(clip, 3)
    assert changed.sound is not None
    assert changed.duration == clip.duration
    ratio = changed.sound.x / clip.sound.x  # type: ignore[union-attr]
    assert torch.allclose(ratio, ratio[0], rtol=1e-4)


def test_a_clip_without_sound_stays_as_it_is() -> None:
    clip = dataclasses.replace(sound(pictures=True), sound=None)
    assert Augment(EVERYTHING, 0)(clip, 0) is clip


def test_each_item_comes_with_its_place_in_the_run() -> None:
    order, cut = Order([5], [1.0], 0), Cut(2, 2)
    drawn = [pair for batch in MicroBatches(order, cut, 0, 3) for pair in batch]
    assert [place for _, place in drawn] == list(range(12))
    assert [item for item, _ in drawn] == order.items(0, 12)
    resumed = [pair for batch in MicroBatches(order, cut, 2, 3) for pair in batch]
    assert resumed == drawn[8:]


def dataset_of(tmp_path: Path, part: str = "video") -> SampleDataset:
    """Questions on the tiny world's clips, or (``part="audio"``) on sound, all switched on."""
    world = make_world(tmp_path / "world", clips=4)
    asked = [{"type": part, part: "000.mp4"}, text("do you hear a low sound ?")]
    heard = write_rows(
        world.questions.with_name("heard.jsonl"),
        [row("heard", asked, "a low sound", "heard.pitch")],
    )
    config = settings(
        world, tmp_path / "run", data__train=str(world.questions if part == "video" else heard)
    )
    config["data"] |= {"augment": EVERYTHING.model_dump(), "keep_decoded": 100.0}
    run = RunConfig.model_validate(config)
    return build_datasets(run, build_parts(run))[0]


def test_only_items_with_a_place_are_changed_and_files_are_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, decoded = dataset_of(tmp_path), []
    load = dataset.processor.load_clips
    monkeypatch.setattr(
        dataset.processor,
        "load_clips",
        lambda parts, root: decoded.extend(parts) or load(parts, root),
    )

    def features(item: int | tuple[int, int]) -> torch.Tensor:
        (row,) = dataset[item].rows
        return row.clips[0]["audio"].inputs["input_features"]

    item = next(i for i in range(len(dataset)) if "audio" in dataset[i].rows[0].clips[0])
    decoded.clear()
    plain = features(item)
    assert torch.equal(plain, features(item))
    assert not torch.equal(plain, features((item, 4)))
    assert torch.equal(features((item, 4)), features((item, 4)))
    assert torch.equal(plain, features(item)), "the kept clip was changed"
    assert len(decoded) == 0, "it was decoded above, and kept"


def test_kept_token_rows_fit_the_clip_whatever_its_length(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, "audio")
    runs = set()
    for place in [*range(12), *range(12)]:
        (made,) = dataset[0, place].rows
        runs.add(int(made.is_media.sum()))
        assert int(made.is_media.sum()) == len(dataset.processor.order(made.clips[0]))
    assert len(runs) > 1, "no clip became shorter: nothing was tried"


def test_augmented_features_cannot_be_cached(tmp_path: Path) -> None:
    preset = (
        Path(__file__).resolve().parents[2] / "train" / "presets" / "esc10" / "stage1_align.yaml"
    )
    with pytest.raises(ConfigError, match="both augment and cache are given"):
        load_config(preset, [f"data.cache={tmp_path}"])
