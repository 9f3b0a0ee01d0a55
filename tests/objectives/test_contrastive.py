"""InfoNCE against numbers worked out by hand, and over two processes against one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import make_world
from tiny_runs import together

from avllm.config_model import ModelConfig
from avllm.data.collate import Places
from avllm.distributed import gather_with_grad, world_size
from avllm.errors import UserError
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.modeling_avllm import AVLLM
from avllm.objectives._pairs import matching_loss, pool_clip_sets, sample_negatives, text_id
from avllm.objectives.contrastive import info_nce, symmetric_info_nce
from avllm.registry import build
from avllm.tokens import Tokens


def test_info_nce_by_hand() -> None:
    anchors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    keys = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    same = torch.eye(3, dtype=torch.bool)[[0, 2]]
    losses = info_nce(anchors, keys, torch.tensor([0, 2]), same, 2.0)
    expected = [
        -2.0 + math.log(math.exp(2.0) + math.exp(1.2) + math.exp(0.0)),
        -2.0 + math.log(math.exp(0.0) + math.exp(1.6) + math.exp(2.0)),
    ]
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)


def test_equal_texts_are_no_negatives() -> None:
    media = torch.eye(2)
    text = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    loss, hits = symmetric_info_nce(media, text, torch.tensor([7, 7]), 3.0)
    assert float(loss) == pytest.approx(0.0, abs=1e-7)
    assert float(hits) == 2
    apart, _ = symmetric_info_nce(media, text, torch.tensor([7, 8]), 3.0)
    # rows: media 0 -> log 2, media 1 -> log 2; text 0 -> 3, 0; text 1 -> 0, 3 for the wrong one
    back = math.log(1 + math.exp(-3.0)) + math.log(1 + math.exp(3.0))
    assert float(apart) == pytest.approx(0.5 * (2 * math.log(2.0) + back), abs=1e-6)


def test_no_rows_give_a_zero_on_the_graph() -> None:
    media = torch.zeros(0, 4, requires_grad=True)
    loss, _ = symmetric_info_nce(media, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), 3.0)
    loss.backward()
    assert loss.item() == 0.0


def test_pooling_takes_real_tokens_of_every_clip_of_a_row() -> None:
    x = torch.arange(8.0).view(2, 2, 2, 1)
    mask = torch.tensor([[[1, 0], [1, 0]], [[1, 1], [0, 0]]]).bool()
    streams = {"video": Tokens(x, mask, torch.zeros(2, 2, 2))}
    pooled, there = pool_clip_sets(streams, ("video",), Places.of([[], [0, 1], []]))
    assert pooled.flatten().tolist() == pytest.approx([0.0, (0 + 2 + 4 + 5) / 4, 0.0])
    assert there.tolist() == [False, True, False]


def test_text_ids_are_stable() -> None:
    assert text_id("a red circle") == text_id(" a red circle ") != text_id("a blue circle")
    assert 0 <= text_id("x") < 2**63


def test_matching_by_hand_and_hard_negatives() -> None:
    there = torch.tensor([True, False])
    loss = matching_loss(torch.tensor([0.0, 2.0]), [(torch.tensor([1.0, 5.0]), there)])
    first = (math.log(2.0) + math.log(1 + math.e)) / 2
    assert float(loss) == pytest.approx(first + math.log(1 + math.exp(-2.0)), abs=1e-6)
    same = torch.tensor([[True, False, True], [True, True, True]])
    drawn, possible = sample_negatives(torch.zeros(2, 3), same)
    assert int(drawn[0]) == 1
    assert possible.tolist() == [True, False]


def _loss(media: torch.Tensor, text: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return symmetric_info_nce(media.tanh(), text.tanh(), ids, 5.0)[0]


def _two_processes() -> None:
    dist.init_process_group("gloo")
    assert world_size() == 2
    torch.manual_seed(0)
    media, text = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    ids = torch.tensor([1, 2, 3, 2, 5])
    alone = [t.clone().requires_grad_() for t in (media, text)]
    all_rows = _alone(alone[0], alone[1], ids)
    mine = slice(0, 3) if dist.get_rank() == 0 else slice(3, 5)  # not the same number of rows
    own = [t[mine].clone().requires_grad_() for t in (media, text)]
    loss = _loss(own[0], own[1], ids[mine])
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, all_rows, rtol=0, atol=1e-12)
    for part, whole in zip(own, alone, strict=True):
        torch.testing.assert_close(part.grad, whole.grad[mine], rtol=0, atol=1e-12)
    empty = torch.zeros(0 if dist.get_rank() else 2, 4, requires_grad=True)
    _loss(empty, empty, torch.zeros(len(empty), dtype=torch.long)).backward()  # must not hang
    assert gather_with_grad(empty)[0].shape == (2, 4)


def _alone(media: torch.Tensor, text: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    m, t, own = media.tanh(), text.tanh(), torch.arange(len(ids))
    same = ids[:, None] == ids[None]
    loss = (0.5 * (info_nce(m, t, own, same, 5.0) + info_nce(t, m, own, same, 5.0))).sum()
    loss.backward()
    return loss.detach()


def test_two_processes_have_the_gradients_of_one() -> None:
    together(_two_processes, timeout=60)


@pytest.mark.parametrize("objective", ["contrastive", "pooled_matching", "assignment"])
def test_streams_that_the_connector_consumes_are_not_compared(
    tmp_path: Path, objective: str
) -> None:
    """They would have targets and no loss."""
    world = make_world(tmp_path / "world", clips=1)

    def composed(connector: list[dict[str, Any]]) -> AVLLM:
        description = ModelConfig.model_validate(world.model | {"connector": connector})
        return AVLLM.from_backbones(description, load_tokenizer(description)[1])

    joined = [
        {"type": "sync_concat", "streams": ["video", "audio"], "to": "av", "consume": True},
        {"type": "linear", "stream": "av"},
    ]
    with pytest.raises(UserError, match="nothing to compare"):
        build("objectives", {"type": objective}, composed(joined))
    one = [
        {"type": "branch", "stream": "audio", "to": "copy"},
        *joined,
        {"type": "linear", "stream": "copy"},
    ]
    named = {"pairs": ["audio-text"]} if objective == "contrastive" else {"pair": "audio-text"}
    with pytest.raises(UserError, match="'audio', which the connector consumes"):
        build("objectives", {"type": objective, **named}, composed(one))
