"""Rows that share their media, or just a sequence: loss and gradients are those of one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from objectives.qformer_models import connector
from tiny import World, make_preferences, make_regions, make_world, settings
from torch import Tensor

from avllm.config import RunConfig
from avllm.data.collate import Batch
from avllm.data.dataset import SampleDataset
from avllm.data.packing import fill_sequences, first_fit, level_bins, share_media, shared_length
from avllm.data.row import IGNORE, Part, Row
from avllm.data.row_makers.whole import Whole
from avllm.models.attention import PackingError, block_mask
from avllm.registry import choices
from avllm.training.start import Parts, build_datasets, build_parts, check_rows, padding
from avllm.training.task import Task


def bare_row(ids: list[int], labels: list[int], media: int) -> Row:
    """A row whose first `media` tokens are placeholders."""
    places = torch.arange(len(ids)) < media
    trained = (torch.tensor(labels) != IGNORE).nonzero().flatten()
    part = Part("r", None, "answer", "?", "x", torch.zeros(1, dtype=torch.long), trained, ())
    return Row("r", torch.tensor(ids), torch.tensor(labels), [], places, parts=(part,))


def answer(row: Row) -> list[int]:
    """The tokens of the row's only answer."""
    (part,) = row.parts
    return row.input_ids[part.trained].tolist()


def test_the_shared_part_ends_before_the_token_that_predicts_a_target() -> None:
    one = bare_row([9, 9, 4, 5, 6], [-100, -100, -100, -100, 6], 2)
    two = bare_row([9, 9, 4, 5, 7, 8], [-100, -100, -100, -100, 7, 8], 2)
    assert shared_length([one, two]) == 3
    (packed,) = share_media([one, two], 20)
    assert packed.input_ids.tolist() == [9, 9, 4, 5, 6, 5, 7, 8]
    assert packed.labels.tolist() == [-100, -100, -100, -100, 6, -100, 7, 8]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert packed.segments[:, 1].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert packed.num_targets == one.num_targets + two.num_targets
    assert [packed.input_ids[p.trained].tolist() for p in packed.parts] == [
        answer(one),
        answer(two),
    ]


def test_packs_are_no_longer_than_asked_and_media_is_never_behind_the_shared_part() -> None:
    rows = [bare_row([9, 9, 4, n, 6], [-100] * 4 + [6], 2) for n in (1, 2, 3)]
    assert [len(r.input_ids) for r in share_media(rows, 7)] == [7, 5]
    apart = [bare_row([n, 9, 4, 6], [-100] * 3 + [6], 2) for n in (1, 2)]
    assert share_media(apart, 50) == apart


def test_rows_stand_one_behind_the_other_in_groups_of_their_own() -> None:
    one = bare_row([9, 4, 5], [9, -100, 5], 1)
    two = bare_row([9, 9, 6, 7], [-100, -100, 6, 7], 2)
    (filled,) = fill_sequences([one, two], 8)
    assert filled.input_ids.tolist() == [9, 4, 5, 9, 9, 6, 7]
    assert filled.labels.tolist() == [-100, -100, 5, -100, -100, 6, 7], (
        "nothing is predicted over a border"
    )
    assert filled.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert filled.segments.tolist() == [[0, 0]] * 3 + [[1, 0]] * 4
    assert filled.is_media.tolist() == [True, False, False, True, True, False, False]
    assert filled.num_targets == one.num_targets + two.num_targets
    assert [filled.input_ids[p.trained].tolist() for p in filled.parts] == [
        answer(one),
        answer(two),
    ]


def test_first_fit_takes_the_longest_first_and_keeps_the_order() -> None:
    assert first_fit([3, 6, 4, 2, 5], 10) == [[0, 3, 4], [1, 2]]
    assert level_bins([3, 6, 4, 2, 5], 1000) == [[0, 1, 2, 3, 4]]
    assert level_bins([9, 2], 4) == [[0], [1]]
    lengths = [7, 1, 5, 5, 6]
    assert [sum(lengths[i] for i in b) for b in level_bins(lengths, 23)] == [12, 12], (
        "levelled, and not 23 and 1"
    )


@pytest.mark.parametrize("seed", range(5))
def test_little_padding_on_short_and_long_rows(seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    lengths = torch.randint(20, 601, (32,), generator=drawn).tolist()
    bins = level_bins(lengths, 2048)
    filled = [sum(lengths[i] for i in b) for b in bins]
    assert sorted(i for b in bins for i in b) == list(range(32))
    assert max(filled) <= 2048
    assert len(bins) == -(-sum(lengths) // 2048), "no packing needs fewer"
    assert 1 - sum(filled) / (max(filled) * len(bins)) <= 0.03


def test_a_mask_of_yes_and_no_gives_the_bits_of_the_one_that_is_added() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 8, 4, dtype=torch.float32).unbind()
    segments = torch.tensor([[[0, 0]] * 3 + [[0, 1]] * 2 + [[0, 2]] * 2 + [[-1, -1]]])
    attend = torch.nn.functional.scaled_dot_product_attention
    added, chosen = (
        attend(q, k, v, attn_mask=block_mask(segments, kind))
        for kind in (torch.float32, torch.bool)
    )
    assert torch.equal(added, chosen)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Three clips with two questions each."""
    return make_world(tmp_path_factory.mktemp("world"), clips=3)


OBJECTIVES: dict[str, dict[str, Any]] = {
    "next_token": {"type": "next_token"},
    "contrastive": {"type": "contrastive", "text": "llm_embeddings", "dim": 8},
    "contrastive_llm": {"type": "contrastive", "text": "llm", "dim": 8, "same": "kind"},
    "answer_match": {"type": "answer_match", "dim": 8, "hidden": 16, "words": 0.5},
    "pooled_matching": {"type": "pooled_matching", "dim": 8},
    "qformer_contrastive": {"type": "qformer_contrastive"},
    "qformer_matching": {"type": "qformer_matching"},
    "qformer_captioning": {"type": "qformer_captioning"},
    "dpo": {"type": "dpo"},
    "assignment": {"type": "assignment", "words": 20},
    "consistency": {"type": "consistency", "irrelevant": {"heard": ["video"], "seen": ["audio"]}},
    "query_diversity": {"type": "query_diversity", "stream": "video", "adapter": 0},
    "region_guide": {"type": "region_guide", "stream": "video", "adapter": 0, "n": 3},
}


def configure(world: World, **changes: Any) -> RunConfig:
    """Return settings of a model whose Q-Former reads text too: every objective runs on it."""
    section = settings(
        world, world.root / "run", **{"data__train": str(world.questions), **changes}
    )
    # As a grid of 2 x 2, the queries serve objectives that read regions.
    section["model"] = world.model | {"connector": connector(world, num_queries=4)}
    section["data"]["max_length"] = 250
    return RunConfig.model_validate(section)


@pytest.fixture(scope="module")
def config(world: World) -> RunConfig:
    return configure(world)


@pytest.fixture(scope="module")
def parts(config: RunConfig) -> Parts:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts = build_parts(config)
    parts.model.double()  # differences of rounding are then far below 1e-6
    return parts


def batch_of(dataset: SampleDataset, order: list[int], config: RunConfig, parts: Parts) -> Batch:
    """Collate items of a dataset in this order."""
    collate = padding(parts, blanks=False, filled=config.data.filled_length)
    (micro,) = collate([dataset[i] for i in order])
    streams = {}
    for name, stream in micro.batch.streams.items():
        inputs = {key: value.double() for key, value in stream.inputs.items()}
        streams[name] = replace(stream, inputs=inputs)
    return replace(micro.batch, streams=streams)


def loss_and_gradients(task: Task, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of the task's objective and the gradients of what learns from it."""
    task.zero_grad()
    torch.manual_seed(1)  # negatives are drawn
    losses, _ = task(batch)
    (loss,) = losses.values()
    loss.backward()
    trained = [*task.model.connector.named_parameters(), *task.objectives.named_parameters()]
    return loss.item(), {name: p.grad.clone() for name, p in trained if p.grad is not None}


@pytest.mark.parametrize("objective", choices("objectives"))
def test_every_objective_is_compared(objective: str) -> None:
    assert objective in {spec["type"] for spec in OBJECTIVES.values()}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "pack, sequences",
    [(True, 3), ("media", 3), ("sequences", 2), ("both", 1)],
    ids=["true", "media", "sequences", "both"],
)
def test_packed_and_unpacked_have_the_same_loss_and_gradients(
    objective: str, pack: bool | str, sequences: int, parts: Parts, world: World
) -> None:
    rows: dict[str, Any] = {}
    if objective == "dpo":
        rows = {"data__train": str(make_preferences(world)), "data__rows": {"type": "preference"}}
    if objective == "region_guide":
        rows = {"data__train": str(make_regions(world))}
    config, packed_config = configure(world, **rows), configure(world, data__pack=pack, **rows)
    torch.manual_seed(0)
    task = Task(parts.model, [OBJECTIVES[objective]]).double()
    packed_dataset = build_datasets(packed_config, parts)[0]
    check_rows(packed_config, task, packed_dataset.maker)
    packed = batch_of(packed_dataset, list(range(len(packed_dataset))), packed_config, parts)
    dataset = build_datasets(config, parts)[0]
    # Negatives are drawn by place, so both batches have their parts in one order.
    places = {dataset.items.sample(place).id: place for place in range(len(dataset))}
    ids = dict.fromkeys(part.id for part in packed.parts.items)
    single = batch_of(dataset, [places[id] for id in ids], config, parts)
    assert [part.id for part in single.parts.items] == [part.id for part in packed.parts.items]
    if objective != "dpo":  # a preference row holds several answers, so that other numbers follow
        assert (len(single.input_ids), len(packed.input_ids)) == (6, sequences)

    assert task.weights(single) == task.weights(packed)
    assert task.weights(single)[0] > 0
    loss, grads = loss_and_gradients(task, single)
    packed_loss, packed_grads = loss_and_gradients(task, packed)
    assert packed_loss == pytest.approx(loss, rel=1e-6)
    assert grads.keys() == packed_grads.keys()
    for name, grad in grads.items():
        apart = float((packed_grads[name] - grad).norm())
        assert apart <= 1e-6 * max(1.0, float(grad.norm())), name


def test_a_limit_on_tokens_goes_with_objectives_that_compare_nothing(
    config: RunConfig, parts: Parts
) -> None:
    limited = config.model_copy(deep=True)
    limited.train.max_tokens = 4096
    check_rows(limited, Task(parts.model, [OBJECTIVES["next_token"]]), Whole())
    with pytest.raises(PackingError, match="contrastive"):
        check_rows(limited, Task(parts.model, [OBJECTIVES["contrastive"]]), Whole())


def test_settings_that_contradict_are_refused(world: World, tmp_path: Path) -> None:
    for changes, message in (
        ({"data__pack_length": 4096}, "belongs to pack: sequences or both"),
        ({"data__pack": "both", "data__pack_length": 512}, "below max_length 2048"),
    ):
        with pytest.raises(ValueError, match=message):
            RunConfig.model_validate(settings(world, tmp_path, **changes))
