"""Rows that share their media behind one copy of it, or just a sequence: the same loss and gradients as one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import World, make_world, settings

from avllm.config import RunConfig
from avllm.data.packing import fill_sequences, first_fit, level_bins, share_media, shared_length
from avllm.data.row import Row
from avllm.models.attention import PackingError, block_mask
from avllm.training.start import build_datasets, build_parts, check_rows, padding
from avllm.training.task import Task


def bare_row(ids: list[int], labels: list[int], media: int) -> Row:
    """A row whose first `media` tokens are placeholders."""
    places = torch.arange(len(ids)) < media
    return Row("r", torch.tensor(ids), torch.tensor(labels), [], places, targets=["x"])


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
    assert packed.targets == ["x", "x"]


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
    assert filled.labels.tolist() == [-100, -100, 5, -100, -100, 6, 7], "nothing is predicted over a border"
    assert filled.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert filled.segments.tolist() == [[0, 0]] * 3 + [[1, 0]] * 4
    assert filled.is_media.tolist() == [True, False, False, True, True, False, False]
    assert filled.num_targets == one.num_targets + two.num_targets
    assert filled.targets == ["x", "x"]


def test_first_fit_takes_the_longest_first_and_keeps_the_order() -> None:
    assert first_fit([3, 6, 4, 2, 5], 10) == [[0, 3, 4], [1, 2]]
    assert level_bins([3, 6, 4, 2, 5], 1000) == [[0, 1, 2, 3, 4]]
    assert level_bins([9, 2], 4) == [[0], [1]]
    lengths = [7, 1, 5, 5, 6]
    assert [sum(lengths[i] for i in b) for b in level_bins(lengths, 23)] == [12, 12], "levelled, and not 23 and 1"


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
    added, chosen = (attend(q, k, v, attn_mask=block_mask(segments, kind)) for kind in (torch.float32, torch.bool))
    assert torch.equal(added, chosen)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Three clips with two questions each."""
    return make_world(tmp_path_factory.mktemp("world"), clips=3)


@pytest.mark.parametrize(
    "pack, sequences",
    [(True, 3), ("media", 3), ("sequences", 2), ("both", 1)],
    ids=["true", "media", "sequences", "both"],
)
def test_packed_and_unpacked_have_the_same_loss_and_gradients(
    pack: bool | str, sequences: int, world: World, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    config = RunConfig.model_validate(settings(world, tmp_path, data__train=str(world.questions)))
    config.data.max_length = 400
    torch.manual_seed(0)
    parts = build_parts(config)
    task = Task(parts.model, config.objectives)
    found = []
    for packed in (False, pack):
        config.data.pack = packed
        check_rows(config, task)
        dataset = build_datasets(config, parts)[0]
        collate = padding(parts, blanks=False, filled=config.data.filled_length)
        batch = collate([dataset[i] for i in range(len(dataset))])[0].batch
        assert len(batch.input_ids) == (sequences if packed else 6)
        task.zero_grad()
        losses, _ = task(batch)
        losses["next_token"].backward()
        grads = {n: p.grad.clone() for n, p in parts.model.connector.named_parameters()}
        found.append((losses["next_token"].item(), batch.num_targets, grads))
    (loss, count, grads), (packed_loss, packed_count, packed_grads) = found
    assert count == packed_count
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(packed_grads[name], grad, rtol=1e-5, atol=1e-5)


def test_objectives_that_take_a_row_for_a_sample_are_refused(world: World, tmp_path: Path) -> None:
    config = RunConfig.model_validate(settings(world, tmp_path, "align", data__pack="sequences"))
    task = Task(build_parts(config).model, config.objectives)
    with pytest.raises(PackingError, match="objective contrastive takes each row for one sample"):
        check_rows(config, task)
    config.data.pack = "media"
    check_rows(config, task)
    config.train.max_tokens = 4096
    with pytest.raises(PackingError, match=r"train.max_tokens .* objective contrastive may compare the rows"):
        check_rows(config, task)


def test_settings_that_contradict_are_refused(world: World, tmp_path: Path) -> None:
    for changes, message in (
        ({"data__pack_length": 4096}, "belongs to pack: sequences or both"),
        ({"data__pack": "both", "data__pack_length": 512}, "below max_length 2048"),
    ):
        with pytest.raises(ValueError, match=message):
            RunConfig.model_validate(settings(world, tmp_path, **changes))
