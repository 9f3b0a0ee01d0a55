"""Test the toy world's ear: its labels of heights between pitches, and the effects of disguises."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
WORLD = ROOT / "scripts" / "toy_world"
sys.path[:0] = [str(WORLD), str(WORLD / "backbones")]
toy_audio = importlib.import_module("audio")

FRAMES = 2 * toy_audio.STEPS


def sound(frequency: float, pitch: str | None) -> dict[str, object]:
    return {"frequency": frequency, "pitch": pitch}


def test_named_pitches_are_whole_and_others_between() -> None:
    assert toy_audio.height_of(sound(520.0, "low")) == 2
    assert toy_audio.height_of(sound(4100.0, "shrill")) == 5
    assert toy_audio.height_of(sound((540.0 * 1040.0) ** 0.5, None)) == pytest.approx(2.5)


def test_height_loss_is_a_cross_entropy_shared_by_two_neighbours() -> None:
    logits = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))
    whole, ignored = (
        torch.tensor([[0.0, 2.0, 5.0, 5.0]]),
        torch.tensor([[0.0, 2.0, 5.0, toy_audio.IGNORE]]),
    )
    assert toy_audio.height_loss(logits, whole) == pytest.approx(
        float(F.cross_entropy(logits[0], whole[0].long()))
    )
    assert toy_audio.height_loss(logits, ignored) == pytest.approx(
        float(F.cross_entropy(logits[0, :3], whole[0, :3].long()))
    )
    soft = torch.zeros(4, 6).index_put((torch.arange(4), torch.full((4,), 2)), torch.tensor(0.75))
    soft[:, 3] = 0.25
    between = toy_audio.height_loss(logits, torch.full((1, 4), 2.25))
    assert between == pytest.approx(float(F.cross_entropy(logits[0], soft)))


def test_labels_of_a_clip() -> None:
    """Steps of 40 ms: a low tone from 1 to 2 s, of a clip of 3 s."""
    tone = {**sound(540.0, "low"), "kind": "tone", "start": 1.0, "end": 2.0, "pulses": []}
    classes, height, events, real = toy_audio.label_steps(
        {"duration": 3.0, "sounds": [tone], "clicks": [2.5]}
    )
    assert real.tolist() == [True] * 75 + [False] * 75
    assert height.tolist() == [0.0] * 25 + [2.0] * 25 + [0.0] * 25 + [toy_audio.IGNORE] * 75
    assert classes[:, 0].tolist() == [0] * 25 + [1] * 25 + [0] * 25 + [toy_audio.IGNORE] * 75
    assert events[:, toy_audio.CLICK].nonzero().flatten().tolist() == [61, 62, 63]


def test_pitches_are_those_of_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "data_recipes")
    scripting = importlib.import_module("scripting")
    assert tuple(scripting.PITCHES.values()) == toy_audio.PITCHES
    assert all(
        toy_audio.height_of(sound(hertz, name)) == n
        for n, (name, hertz) in enumerate(scripting.PITCHES.items(), 1)
    )


@pytest.mark.parametrize("moved, cut", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_a_disguise_hides_what_it_changes_and_nothing_else(moved: float, cut: float) -> None:
    torch.manual_seed(0)
    mel = torch.randn(3, 64, FRAMES)
    labels, height = (
        torch.ones(3, toy_audio.STEPS, 2, dtype=torch.long),
        torch.full((3, toy_audio.STEPS), 4.0),
    )
    x, classes, heights = toy_audio.disguise(
        mel, labels.clone(), height.clone(), moved=moved, cut=cut
    )
    silent = (x == mel.amin((1, 2), keepdim=True)).all(1)[:, ::2]  # (3, STEPS)
    assert x.equal(mel) == (moved + cut == 0)
    assert (classes == toy_audio.IGNORE).all() if cut else classes.equal(labels)
    hidden = silent if cut else torch.full_like(silent, bool(moved))
    assert silent.any() == bool(cut)
    assert heights.equal(height.masked_fill(hidden, toy_audio.IGNORE))


def test_moved_sounds_change_their_bands_and_their_colour_and_nothing_in_time() -> None:
    """Each is the same sound at other bands, by at most 6 for half, and louder or softer."""
    torch.manual_seed(0)
    mel = torch.zeros(64, 64, FRAMES)
    mel[:, 20] = 5 + torch.arange(FRAMES) / FRAMES  # one band, ever louder
    x, *_ = toy_audio.disguise(
        mel, torch.ones(64, toy_audio.STEPS, 2).long(), torch.ones(64, toy_audio.STEPS), 1.0, 0.0
    )
    bands = x.mean(2).argmax(1) - 20
    assert len(bands.unique()) > 20
    assert 0.5 < (bands.abs() <= 6).float().mean() < 0.8
    over_time = x - x[..., :1]  # colour is the same at all times
    assert torch.allclose(over_time.amax(1), (mel - mel[..., :1]).amax(1), atol=1e-5)
    assert (x[..., 0].sort(1).values[:, :-1].std(1) > 0.01).all()  # beside the sound itself


def test_cut_sounds_lose_their_edges_over_the_bands() -> None:
    torch.manual_seed(0)
    mel = torch.zeros(64, 64, FRAMES)
    mel[:, 20] = 5.0
    x, *_ = toy_audio.disguise(
        mel, torch.ones(64, toy_audio.STEPS, 2).long(), torch.ones(64, toy_audio.STEPS), 0.0, 1.0
    )
    heard = x[:, 19:22].amax(2)  # (64, 3) of the pieces that are left
    assert (x.mean(2).argmax(1) - 20).abs().max() <= 1  # where it was
    assert (
        heard[:, 0] > 0.8
    ).float().mean() > 0.8  # blurred onto the neighbours: all but one of sixteen
    assert x[:, 50].std(1).max() > 0.05  # speckled
