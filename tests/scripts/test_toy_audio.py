"""The toy world's ear: what it is told about heights between pitches, and what its disguises hide."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import toy_audio

FRAMES = 2 * toy_audio.STEPS


def sound(frequency: float, pitch: str | None) -> dict[str, object]:
    return {"frequency": frequency, "pitch": pitch}


def test_named_pitches_are_whole_and_others_between() -> None:
    assert toy_audio.height_of(sound(520.0, "low")) == 2
    assert toy_audio.height_of(sound(4100.0, "shrill")) == 5
    assert toy_audio.height_of(sound((540.0 * 1040.0) ** 0.5, None)) == pytest.approx(2.5)


def test_height_loss_is_a_cross_entropy_shared_by_two_neighbours() -> None:
    logits = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))
    whole, ignored = torch.tensor([[0.0, 2.0, 5.0, 5.0]]), torch.tensor([[0.0, 2.0, 5.0, toy_audio.IGNORE]])
    assert toy_audio.height_loss(logits, whole) == pytest.approx(float(F.cross_entropy(logits[0], whole[0].long())))
    assert toy_audio.height_loss(logits, ignored) == pytest.approx(
        float(F.cross_entropy(logits[0, :3], whole[0, :3].long()))
    )
    soft = torch.zeros(4, 6).index_put((torch.arange(4), torch.full((4,), 2)), torch.tensor(0.75))
    soft[:, 3] = 0.25
    between = toy_audio.height_loss(logits, torch.full((1, 4), 2.25))
    assert between == pytest.approx(float(F.cross_entropy(logits[0], soft)))


@pytest.mark.parametrize("moved, cut", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_a_disguise_hides_what_it_changes_and_nothing_else(moved: float, cut: float) -> None:
    torch.manual_seed(0)
    mel = torch.randn(3, 64, FRAMES)
    labels, height = torch.ones(3, toy_audio.STEPS, 2, dtype=torch.long), torch.full((3, toy_audio.STEPS), 4.0)
    x, classes, heights = toy_audio.disguise(mel, labels.clone(), height.clone(), moved=moved, cut=cut)
    silent = (x == mel.amin((1, 2), keepdim=True)).all(1)[:, ::2]  # (3, STEPS)
    assert x.equal(mel) == (moved + cut == 0)
    assert (classes == toy_audio.IGNORE).all() if cut else classes.equal(labels)
    hidden = silent if cut else torch.full_like(silent, bool(moved))
    assert silent.any() == bool(cut)
    assert ((heights == toy_audio.IGNORE) == hidden).all()
