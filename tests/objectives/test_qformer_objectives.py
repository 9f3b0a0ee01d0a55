"""BLIP-2's three terms: numbers by hand, a clip of several frames, and that they teach."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from objectives.qformer_models import OWN, TERMS, batch_of, make_parts, term
from tiny import World, make_world
from torch import Tensor

from avllm.adapters._qformer_text import READ, WRITE
from avllm.data.collate import Batch, Places
from avllm.models.modeling_avllm import AVLLM
from avllm.objectives._pairs import text_ids
from avllm.objectives._qformer import QFormerTerm, Units, mean_by_pair, readings_of
from avllm.objectives.contrastive import symmetric_info_nce
from avllm.objectives.qformer_contrastive import similarity_loss
from avllm.training.start import Parts
from avllm.training.task import Task

KINDS = [
    {"per": "frame"},
    {"per": "window", "seconds": 0.5},
    {"per": "clip"},
    {"per": "frame", "text": OWN},
]
KIND = pytest.mark.parametrize("kind", KINDS, ids=["frame", "window", "clip", "own"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Four clips of four colours, each with a caption of its own."""
    return make_world(tmp_path_factory.mktemp("qformer"), clips=4)


def test_similarity_loss_by_hand() -> None:
    similarity = torch.tensor([[0.5, 0.1], [0.3, 0.2]])
    loss, hits = similarity_loss(similarity, 0, torch.tensor([1, 2]), 10.0)

    def cost(own: float, other: float) -> float:
        return math.log(1 + math.exp(10 * (other - own)))

    expected = [cost(0.5, 0.1) + cost(0.5, 0.3), cost(0.2, 0.3) + cost(0.2, 0.1)]
    assert float(loss) == pytest.approx(sum(expected) / 2, abs=1e-6)
    assert float(hits) == 1
    media, text = (F.normalize(torch.randn(4, 5), dim=-1) for _ in range(2))
    ids = torch.tensor([1, 2, 1, 3])  # equal texts are no negatives
    torch.testing.assert_close(
        similarity_loss(media @ text.T, 0, ids, 5.0), symmetric_info_nce(media, text, ids, 5.0)
    )


def test_pairs_and_their_means_by_hand() -> None:
    sets = Places.of([[0], [1], [2]])
    units = Units(
        torch.zeros(3, 1, 1), torch.ones(3, 1, dtype=torch.bool), torch.tensor([0, 2, 2]), sets
    )
    pair, unit = readings_of(torch.tensor([2, 0, 1]), units)
    assert pair.tolist() == [0, 0, 1]
    assert unit.tolist() == [1, 2, 0]
    assert mean_by_pair(torch.tensor([[1.0], [3.0], [5.0]]), pair, 3).flatten().tolist() == [
        2.0,
        5.0,
        0.0,
    ]


def frames_of(
    parts: Parts, objective: QFormerTerm, batch: Batch
) -> Iterator[tuple[Tensor, Tensor]]:
    """What the Q-Former reads of each row, one row at a time."""
    units = objective.units(parts.model, batch)
    for row in range(len(batch.ids)):
        mine = units.clip == row
        assert int(mine.sum()) == (1 if parts.model.connector[0].cut.per == "clip" else 2)
        yield units.x[mine], units.keep[mine]


@KIND
def test_matching_by_hand_and_a_clip_is_the_mean_of_its_units(
    world: World, kind: dict[str, Any]
) -> None:
    parts = make_parts(world, **kind)
    parts.model.eval()
    objective = term(world, parts, "qformer_matching")
    batch = batch_of(parts, world, [0, 1])  # of two rows each has but one mismatch of either kind
    words = objective.words(batch, objective.chosen(batch))
    qformer = parts.model.connector[0]
    texts = [objective.embed(parts.model, words.pick(torch.tensor([t])), READ) for t in range(2)]
    margin = torch.zeros(2, 2)  # clip by text
    for clip, (x, keep) in enumerate(frames_of(parts, objective, batch)):
        for t in range(2):
            read = [
                qformer.read(x[u : u + 1], keep[u : u + 1], texts[t])[0, :3] for u in range(len(x))
            ]
            no, yes = torch.stack([qformer.text.match(r).mean(0) for r in read]).mean(0)
            margin[clip, t] = yes - no
    cost, wrong = F.softplus(-margin.diag()), F.softplus(margin)
    expected = (cost + wrong[[0, 1], [1, 0]] + wrong[[1, 0], [0, 1]]).sum() / 3
    loss, figures = objective(parts.model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    right = (margin.diag() > 0).sum() + 2 * (margin[0, 1] <= 0) + 2 * (margin[1, 0] <= 0)
    assert float(figures["hits"]) == pytest.approx(float(right) / 3)
    assert objective.weight(batch) == 2


@KIND
def test_captioning_by_hand_and_a_clip_is_the_mean_of_its_units(
    world: World, kind: dict[str, Any]
) -> None:
    parts = make_parts(world, **kind)
    parts.model.eval()
    objective = term(world, parts, "qformer_captioning")
    batch = batch_of(parts, world, [0, 2, 3])
    words = objective.words(batch, objective.chosen(batch))
    assert not words.mask.all(), "captions of different length"
    qformer, head = parts.model.connector[0], parts.model.llm.get_output_embeddings()
    total = torch.zeros(())
    for row, (x, keep) in enumerate(frames_of(parts, objective, batch)):
        ids = words.ids[row][words.mask[row]]
        for at in range(len(ids)):  # token after token, each from its beginning
            begun = words.pick(torch.tensor([row] * len(x)))
            text = objective.embed(
                parts.model, type(words)(begun.ids[:, :at], begun.mask[:, :at]), WRITE
            )
            states = qformer.text.transform(qformer.read(x, keep, text, causal=True)[:, -1])
            logits = qformer.text.to_words(states, head).mean(0)
            total = total - logits.log_softmax(-1)[ids[at]]
    loss, _ = objective(parts.model, batch)
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-5)
    assert objective.weight(batch) == int(words.mask.sum())


def test_the_similarity_is_that_of_the_best_query_of_any_frame(world: World) -> None:
    parts = make_parts(world)
    parts.model.eval()
    objective = term(world, parts, "qformer_contrastive")
    batch = batch_of(parts, world, [0, 1, 2])
    rows = objective.chosen(batch)
    similarity, first = objective.similarity(parts.model, batch, rows)
    qformer = parts.model.connector[0]
    read = qformer.read_text(objective.embed(parts.model, objective.words(batch, rows), READ))[:, 0]
    texts = F.normalize(qformer.text.text_projection(read), dim=-1)
    for row, (x, keep) in enumerate(frames_of(parts, objective, batch)):
        queries = F.normalize(
            qformer.text.query_projection(qformer.read(x, keep)).flatten(0, 1), dim=-1
        )
        torch.testing.assert_close(similarity[row], (queries @ texts.T).amax(0))
    loss, _ = objective(parts.model, batch)
    expected, _ = similarity_loss(similarity, first, text_ids(batch.parts), qformer.text.scale)
    torch.testing.assert_close(loss, expected)
    assert float(qformer.text.scale.detach()) == pytest.approx(1 / 0.07)


@pytest.mark.parametrize("text", ["llm", OWN])
def test_the_gradient_reaches_queries_text_and_cross_attention(
    world: World, text: str | int
) -> None:
    reached: dict[str, set[str]] = {}
    for name in TERMS:
        parts = make_parts(world, text=text)
        loss, _ = term(world, parts, name)(
            parts.model.train(), batch_of(parts, world, [0, 1, 2, 3])
        )
        loss.backward()
        named = parts.model.connector[0].named_parameters()
        reached[name] = {n for n, p in named if p.grad is not None and bool(p.grad.any())}
        assert {"query_tokens", "text.begin", "text.positions.weight"} <= reached[name]
        assert any(n.startswith("text.words") for n in reached[name])
        assert "qformer.encoder.layer.0.crossattention.attention.value.weight" in reached[name]
        assert "qformer.encoder.layer.0.intermediate.dense.weight" in reached[name]
        assert all(p.grad is None for p in parts.model.llm.parameters())
    everything = {n for n, _ in parts.model.connector[0].named_parameters()}
    # a bias of the keys moves all scores of a query alike; some last outputs have no use
    assert {
        n for n in everything - set.union(*reached.values()) if not n.endswith("key.bias")
    } == set()


@pytest.mark.parametrize("text", ["llm", OWN])
def test_on_a_handful_of_clips_all_three_are_learned(world: World, text: str | int) -> None:
    parts = make_parts(world, std=None, text=text)
    more = {} if text == "llm" else {"tokenizer": str(world.llm)}
    task = Task(parts.model, [{"type": name, **more} for name in TERMS]).train()
    batch = batch_of(parts, world, [0, 1, 2, 3])
    with torch.no_grad():
        batch.streams["video"] = known(parts.model, batch)
    optimizer = torch.optim.AdamW(parts.model.connector.parameters(), lr=4e-3)
    totals = dict(zip(TERMS, task.weights(batch), strict=True))
    seen = []
    for step in range(130):
        torch.manual_seed(step)
        found, figures = task(batch)
        sum(loss / totals[name] for name, loss in found.items()).backward()
        torch.nn.utils.clip_grad_norm_(parts.model.connector.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        means = {**found, **figures}
        seen.append({k: float(v.detach()) / totals[k.partition("/")[0]] for k, v in means.items()})
    first, last = seen[0], {k: sum(s[k] for s in seen[-10:]) / 10 for k in seen[0]}
    assert last["qformer_contrastive/hits"] == 1.0
    assert last["qformer_matching/hits"] > 0.95 > first["qformer_matching/hits"]  # always no: 0.67
    assert last["qformer_matching"] < 0.2
    assert last["qformer_captioning"] < 0.3 * first["qformer_captioning"]
    # a blind guess gets the colour of one caption in four; all other words follow from it
    assert (
        last["qformer_captioning/hits"]
        > (totals["qformer_captioning"] - 3 + 0.5) / totals["qformer_captioning"]
    )


def known(model: AVLLM, batch: Batch) -> Any:
    """The video stream of a batch with its features, so that the frozen encoder runs once."""
    features = model.encode_media({"video": batch.streams["video"]})["video"].x
    return replace(batch.streams["video"], inputs={}, features={"": features})
