"""Stages with BLIP-2's three terms: several processes, cut batches, the stage after."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from objectives.qformer_models import OWN, QFORMER, TERMS, batch_of, connector, make_parts, term
from tiny import World, make_world, settings
from tiny_runs import difference, losses, rows, run, together, weights

from avllm.data.collate import Batch
from avllm.objectives._qformer import Words, find_qformer, gather_words
from avllm.objectives.base import Objective
from avllm.registry import build
from avllm.training.start import Parts

RULES = [["^connector", 1e-3], [".*", None]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Twelve clips: several share a caption, and every third one is silent."""
    return make_world(tmp_path_factory.mktemp("world"))


def stage(
    world: World, output: Path, terms: tuple[str, ...], size: int, **changes: Any
) -> dict[str, Any]:
    model = world.model | {"connector": connector(world)}
    asked = settings(
        world, output, "align", model=model, trainable=RULES, train__warmup=0, **changes
    )
    asked["objectives"] = [{"type": name} for name in terms]
    asked["train"] |= {"batch_size": size, "max_steps": 3}
    return asked


def apart(a: Path, b: Path) -> float:
    """Return the largest difference of two runs' weights, without the biases of keys.

    Those move all scores of a query alike, so their gradient is rounding alone, which AdamW
    amplifies.
    """
    first, second = (
        {n: w for n, w in weights(run).items() if not n.endswith("key.bias")} for run in (a, b)
    )
    return difference(first, second)


def test_eight_captions_at_once_are_eight_one_by_one(world: World, tmp_path: Path) -> None:
    one = run(stage(world, tmp_path / "one", TERMS[2:], 8))
    eight = run(stage(world, tmp_path / "eight", TERMS[2:], 1, train__accumulate=8))
    assert losses(one) == pytest.approx(losses(eight), abs=1e-5)
    assert apart(one, eight) < 1e-5


def test_all_three_terms_on_two_processes_and_the_stage_behind_them(
    world: World, tmp_path: Path
) -> None:
    """In the stage after, no text is read by the Q-Former: no process waits for gradients."""
    first = run(stage(world, tmp_path / "align", TERMS, 2), ranks=2)
    assert {f"{name}/hits" for name in TERMS} <= set(rows(first)[0])
    second = settings(
        world, tmp_path / "caption", init=str(first), init_from_scratch=False, train__warmup=0
    )
    del second["model"]
    two = run(second, ranks=2)
    assert weights(two).keys() == weights(first).keys()
    one = run(
        {**second, "output": str(tmp_path / "one"), "train": {**second["train"], "batch_size": 4}}
    )
    assert apart(one, two) < 1e-5


def _wrong_texts_of_the_other_process(world: World) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    parts = make_parts(world)
    parts.model.eval()
    objective = term(world, parts, "qformer_matching")
    both, places = batch_of(parts, world, [0, 2]), [0, 2]  # captions of different length
    loss, _ = objective(parts.model, batch_of(parts, world, [places[rank]]))
    words = objective.words(both, objective.chosen(both))
    units = objective.units(parts.model, both)
    mine = torch.tensor([rank, rank])
    own, other = objective.judge(
        parts.model, units, mine, words.pick(torch.tensor([rank, 1 - rank]))
    ).diff(dim=1)[:, 0]
    # no other clip is here, so of the two mismatches there is one
    torch.testing.assert_close(
        loss, (F.softplus(-own) + F.softplus(other)) / 2, rtol=1e-5, atol=1e-6
    )
    empty = batch_of(parts, world, [places[0]] if rank else [], blanks=True)
    for name in TERMS:  # one process without a row: nobody waits
        loss, _ = term(world, parts, name)(parts.model, empty)
        loss.backward()
    found, first = gather_words(
        Words(torch.full((1, 2 + rank), 5), torch.ones(1, 2 + rank, dtype=torch.bool))
    )
    assert found.mask.long().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert first == rank


def test_wrong_texts_come_from_all_processes(world: World) -> None:
    together(_wrong_texts_of_the_other_process, world)


def _sums(world: World, name: str, places: list[list[int]]) -> None:
    dist.init_process_group("gloo")
    parts = make_parts(world)
    parts.model.eval()
    loss, _ = term(world, parts, name)(parts.model, batch_of(parts, world, places[dist.get_rank()]))
    loss.backward()
    gradients = {
        n: p.grad for n, p in parts.model.connector[0].named_parameters() if p.grad is not None
    }
    total = loss.detach().clone()
    for summed in (total, *gradients.values()):
        dist.all_reduce(summed)
    dist.destroy_process_group()
    parts = make_parts(world)
    parts.model.eval()
    whole, _ = term(world, parts, name)(parts.model, batch_of(parts, world, sum(places, [])))
    whole.backward()
    torch.testing.assert_close(total, whole.detach(), rtol=1e-5, atol=1e-6)
    alone = {
        n: p.grad for n, p in parts.model.connector[0].named_parameters() if p.grad is not None
    }
    assert alone.keys() == gradients.keys()
    for n, gradient in gradients.items():
        torch.testing.assert_close(gradient, alone[n], rtol=1e-4, atol=2e-5, msg=n)


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("qformer_contrastive", [[0, 1, 4], [2, 3]]),  # 0 and 4 have one caption
        ("qformer_captioning", [[0, 1, 4], [2, 3]]),
        # of two different pairs, each twice, whatever is drawn as a mismatch is the other pair's
        ("qformer_matching", [[0, 1], [0, 1]]),
    ],
)
def test_two_processes_are_one_with_the_rows_of_both(
    world: World, name: str, places: list[list[int]]
) -> None:
    together(_sums, world, name, places)


def kinds(batch: Batch, *names: str | None) -> Batch:
    items = [replace(part, kind=name) for part, name in zip(batch.parts.items, names, strict=True)]
    return replace(batch, parts=replace(batch.parts, items=items))


def test_rows_that_take_part(world: World) -> None:
    parts = make_parts(world)
    batch = batch_of(parts, world, [0, 1, 2])
    for name in TERMS:
        asked = kinds(batch, None, "caption", "seen.colour")
        objective = term(world, parts, name, captions_only=True)
        assert objective.chosen(asked).tolist() == [True, True, False]
        assert term(world, parts, name).chosen(asked).all()
        assert torch.isfinite(objective(parts.model, asked)[0])
        dropped = replace(batch, streams={"audio": batch.streams["audio"]})
        assert objective.weight(dropped) == 0
        assert float(objective(parts.model, dropped)[0].detach()) == 0


def test_long_texts_are_cut_and_those_of_a_vocabulary_of_its_own_keep_their_end(
    world: World,
) -> None:
    by_llm, own = make_parts(world), make_parts(world, text=OWN)
    batch = batch_of(
        by_llm, world, [0, 2]
    )  # "red and a low sound", "blue and nothing", each with its end
    whole = term(world, by_llm, "qformer_captioning")
    assert whole.weight(batch) == int((batch.labels >= 0).sum()) == 10
    assert term(world, by_llm, "qformer_captioning", max_length=4).weight(batch) == 8
    cut = term(world, own, "qformer_captioning", max_length=3)
    words = cut.words(batch, cut.chosen(batch))
    tokenizer = cut.tokenizer
    assert tokenizer.convert_ids_to_tokens(words.ids[0].tolist()) == ["red", "and", "</s>"]


def test_what_does_not_fit_is_named(world: World) -> None:
    plain, reading, own = (
        make_parts(world, text=None, std=None),
        make_parts(world),
        make_parts(world, text=OWN),
    )
    with pytest.raises(
        ValueError, match=r"0 Q-Formers with a text side on stream any \(there are: none\)"
    ):
        matching_on(plain)
    with pytest.raises(
        ValueError, match=r"on stream audio \(there are: connector\[0\] on 'video'\)"
    ):
        find_qformer(reading.model, "audio")
    with pytest.raises(ValueError, match=r"tokenizer is None and the Q-Former's text is 40"):
        matching_on(own)
    with pytest.raises(ValueError, match="tokenizer is 'bert' and the Q-Former's text is llm"):
        matching_on(reading, tokenizer="bert")
    with pytest.raises(ValueError, match=r"has \d+ tokens, the Q-Former's text 5"):
        matching_on(make_parts(world, text=5), tokenizer=str(world.llm))
    with pytest.raises(ValueError, match="max_length is 512; expected 1 to 511"):
        matching_on(reading, max_length=512)
    made = [
        {"type": "branch", "stream": "video", "to": "copy"},
        QFORMER | {"stream": "copy", "text": "llm"},
    ]
    adapters = [*made, {"type": "linear", "stream": "copy"}, *world.model["connector"]]
    with pytest.raises(ValueError, match="stream 'copy', which adapters make"):
        matching_on(make_parts(world, adapters=adapters))


def matching_on(parts: Parts, **options: Any) -> Objective:
    return build("objectives", {"type": "qformer_matching", **options}, parts.model)
