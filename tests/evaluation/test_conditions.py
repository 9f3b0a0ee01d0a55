"""Partners, removal, exchange: honest by construction."""

from __future__ import annotations

import pytest
import torch

from avllm.data.schema import VideoPart
from avllm.evaluation.conditions import AS_IS, Condition, Unit, exchange, partners, remove
from avllm.tokens import EncoderInput


def unit(
    name: str,
    seconds: float = 1.0,
    kinds: tuple[str, ...] = (),
    start: float | None = None,
    answer: str = "yes",
) -> Unit:
    return Unit(
        VideoPart(video=name, start=start), name, seconds, tuple((kind, answer) for kind in kinds)
    )


def item(value: float) -> EncoderInput:
    return EncoderInput(
        {},
        torch.zeros(1, 2),
        torch.ones(1, 1, dtype=torch.bool),
        {"": torch.full((1, 1, 1), value)},
    )


@pytest.mark.parametrize("count", [2, 3, 7, 8, 9, 15, 16, 17, 40])
@pytest.mark.parametrize("seed", range(5))
def test_no_clip_meets_itself_and_each_gives_once(count: int, seed: int) -> None:
    units = [unit(f"{i}.mp4", seconds=i % 5, kinds=("heard",)) for i in range(count)]
    found = partners(units, seed)
    assert set(found) == {("heard", u.part) for u in units}
    assert set(found.values()) == {u.part for u in units}  # a permutation
    assert all(mine != theirs for (_, mine), theirs in found.items())


def test_intervals_of_one_file_never_meet() -> None:
    units = [unit("a.mp4", kinds=("k",), start=float(i)) for i in range(3)]
    units += [unit("b.mp4", kinds=("k",)), unit("c.mp4", kinds=("k",))]
    files = {u.part: u.file for u in units}
    for seed in range(10):
        assert all(
            files[mine] != files[theirs] for (_, mine), theirs in partners(units, seed).items()
        )


def test_the_seed_decides_and_one_file_has_no_partner() -> None:
    units = [unit(f"{i}.mp4", kinds=("k",)) for i in range(30)]
    assert partners(units, 1) == partners(reversed(units), 1)
    assert partners(units, 1) != partners(units, 2)
    assert partners([unit("a.mp4", kinds=("k",)), unit("a.mp4", kinds=("k",), start=2.0)], 0) == {}
    assert partners([unit("a.mp4", kinds=("k",)), unit("b.mp4", kinds=("l",))], 0) == {}


def test_partners_are_asked_the_kind_and_are_about_as_long() -> None:
    units = [
        unit(f"{i}.mp4", seconds=i / 10, kinds=("heard",) if i % 2 else ("seen",))
        for i in range(160)
    ]
    of = {u.part: u for u in units}
    met = sorted(abs(of[a].seconds - of[b].seconds) for (_, a), b in partners(units, 0).items())
    assert all(kind in of[b].kinds for (kind, _), b in partners(units, 0).items())
    assert met[-3] <= 16 / 10, (
        "but at the circle's seam, neighbours in a block of 8 of every second clip"
    )


def test_a_partner_tells_nothing_about_the_answer() -> None:
    """Clips with few bounces are not asked the second kind; other partners do not show it."""
    few = [unit(f"{i}.mp4", kinds=("bounces",)) for i in range(0, 400, 2)]
    many = [unit(f"{i}.mp4", kinds=("bounces", "silent")) for i in range(1, 400, 2)]
    found = partners(few + many, 0)
    other = {u.part for u in few}
    crossed = [
        (mine in other) != (theirs in other)
        for (kind, mine), theirs in found.items()
        if kind == "bounces"
    ]
    assert 0.4 < sum(crossed) / len(crossed) < 0.6
    shared = [found["bounces", u.part] == found["silent", u.part] for u in many]
    assert sum(shared) > len(shared) / 3, "kinds share a partner where they can"


@pytest.mark.parametrize("seed", range(5))
def test_partners_agree_as_often_as_strangers(seed: int) -> None:
    """Drawn once, partners of 60 clips would be off by 6 points in every second draw."""
    draw = torch.Generator().manual_seed(seed)
    sizes, colours = (torch.randperm(60, generator=draw) % n for n in (2, 5))
    units = [
        Unit(
            VideoPart(video=f"{i}.mp4"),
            f"{i}.mp4",
            1.0,
            (("size", f"{sizes[i]}"), ("colour", f"{colours[i]}")),
        )
        for i in range(60)
    ]
    of = {u.part: dict(u.asked) for u in units}
    found = partners(units, seed)
    for kind, chance in (("size", 1 / 2), ("colour", 1 / 5)):
        agree = [of[a][kind] == of[b][kind] for (k, a), b in found.items() if k == kind]
        assert abs(sum(agree) / len(agree) - chance) < 0.02


@pytest.mark.parametrize("seed", range(6))
def test_a_kind_whose_answers_all_differ_does_not_hide_the_others(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randperm(60, generator=draw) % 2
    units = [
        Unit(
            VideoPart(video=f"{i}.mp4"),
            f"{i}.mp4",
            1.0,
            (("size", f"{sizes[i]}"), ("free", f"words {i}")),
        )
        for i in range(60)
    ]
    of = {u.part: dict(u.asked)["size"] for u in units}
    agree = [of[a] == of[b] for (kind, a), b in partners(units, seed).items() if kind == "size"]
    assert abs(sum(agree) / len(agree) - 29 / 59) < 0.01  # strangers: 29 of the 59 other files


def test_remove_and_exchange_touch_one_stream_only() -> None:
    clip = {"video": item(1.0), "audio": item(2.0)}
    other = {"audio": item(3.0)}
    assert list(remove(clip, ("audio",))) == ["video"]
    assert remove(clip, ("audio", "video")) == {}
    swapped = exchange(clip, other, ["audio"])
    assert list(swapped) == ["video", "audio"]
    assert swapped["video"] is clip["video"]
    assert swapped["audio"].features is other["audio"].features


def test_names_and_mistakes() -> None:
    names = [Condition(without="audio"), Condition(without="both"), Condition(swap="video"), AS_IS]
    assert [c.name for c in names] == ["without_audio", "without_both", "swapped_video", "as_is"]
    with pytest.raises(ValueError, match="'sound'.*'audio'"):
        Condition(without="sound")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one change at a time"):
        Condition(without="audio", swap="video")
