"""Partners, removal, exchange: honest by construction."""

from __future__ import annotations

import pytest
import torch

from avllm.data.schema import VideoPart
from avllm.evaluation.conditions import AS_IS, Condition, Unit, exchange, partners, remove
from avllm.tokens import EncoderInput


def unit(name: str, seconds: float = 1.0, kinds: tuple[str, ...] = (), start: float | None = None) -> Unit:
    return Unit(VideoPart(video=name, start=start), name, seconds, kinds)


def item(value: float) -> EncoderInput:
    return EncoderInput({}, torch.zeros(1, 2), torch.ones(1, 1, dtype=torch.bool), {"": torch.full((1, 1, 1), value)})


@pytest.mark.parametrize("count", [2, 3, 7, 8, 9, 15, 16, 17, 40])
@pytest.mark.parametrize("seed", range(5))
def test_no_clip_meets_itself_and_each_gives_once(count: int, seed: int) -> None:
    units = [unit(f"{i}.mp4", seconds=i % 5) for i in range(count)]
    found = partners(units, seed)
    assert set(found) == {u.part for u in units}
    assert set(found.values()) == set(found)  # a permutation
    assert all(mine != theirs for mine, theirs in found.items())


def test_intervals_of_one_file_never_meet() -> None:
    units = [unit("a.mp4", start=float(i)) for i in range(3)] + [unit("b.mp4"), unit("c.mp4")]
    files = {u.part: u.file for u in units}
    for seed in range(10):
        assert all(files[mine] != files[theirs] for mine, theirs in partners(units, seed).items())


def test_the_seed_decides_and_one_file_has_no_partner() -> None:
    units = [unit(f"{i}.mp4") for i in range(30)]
    assert partners(units, 1) == partners(reversed(units), 1)
    assert partners(units, 1) != partners(units, 2)
    assert partners([unit("a.mp4"), unit("a.mp4", start=2.0)], 0) == {}


def test_partners_are_asked_the_same_kinds_and_are_about_as_long() -> None:
    units = [unit(f"{i}.mp4", seconds=i / 10, kinds=("heard",) if i % 2 else ("seen",)) for i in range(160)]
    of = {u.part: u for u in units}
    pairs = [(of[mine], of[theirs]) for mine, theirs in partners(units, 0).items()]
    assert all(a.kinds == b.kinds for a, b in pairs)
    assert max(abs(a.seconds - b.seconds) for a, b in pairs) <= 16 / 10  # a block of 8 of every second clip


def test_remove_and_exchange_touch_one_stream_only() -> None:
    clip = {"video": item(1.0), "audio": item(2.0)}
    other = {"audio": item(3.0)}
    assert list(remove(clip, ("audio",))) == ["video"]
    assert remove(clip, ("audio", "video")) == {}
    swapped = exchange(clip, other, "audio")
    assert list(swapped) == ["video", "audio"]
    assert swapped["video"] is clip["video"]
    assert swapped["audio"] is other["audio"]


def test_names_and_mistakes() -> None:
    names = [Condition(without="audio"), Condition(without="both"), Condition(swap="video"), AS_IS]
    assert [c.name for c in names] == ["without_audio", "without_both", "swapped_video", "as_is"]
    with pytest.raises(ValueError, match="'sound'.*'audio'"):
        Condition(without="sound")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one change at a time"):
        Condition(without="audio", swap="video")
