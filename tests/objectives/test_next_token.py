"""Next-token loss against numbers worked out by hand, and logits at targets against all logits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny import make_llm
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from avllm.data.collate import BatchParts, Places
from avllm.models.llm import head_is_plain
from avllm.objectives.next_token import IGNORE, next_token_loss, right_answers, targets


def test_targets_stand_behind_their_places() -> None:
    labels = torch.tensor([[5, -100, 7, 8], [-100, -100, -100, 9]])
    at, wanted = targets(labels)
    assert at.tolist() == [[False, True, True, False], [False, False, True, False]]
    assert wanted.tolist() == [7, 8, 9]


def test_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [1.0, 1.0]])
    loss, hits = next_token_loss(logits, torch.tensor([1, 0]))
    assert float(loss) == pytest.approx(math.log(4 / 3) + math.log(2), abs=1e-6)
    assert int(hits.sum()) == 2


def test_no_targets_give_a_zero_with_a_graph() -> None:
    logits = torch.zeros(0, 3, requires_grad=True)
    loss, _ = next_token_loss(logits, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0


def test_an_llm_that_caps_its_logits_is_noticed(tmp_path: Path) -> None:
    llama = AutoModelForCausalLM.from_pretrained(make_llm(tmp_path))
    assert head_is_plain(llama)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = Gemma2Config(
        **sizes,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=20,
        final_logit_softcapping=30.0,
        pad_token_id=0,
    )
    assert not head_is_plain(Gemma2ForCausalLM(config))


def test_an_answer_is_right_when_all_its_tokens_are_the_likeliest() -> None:
    """Four answers: right, wrong in one token, without a label, right in a packed row's end."""
    labels = torch.tensor([[IGNORE, 4, 5, IGNORE, 6, 7], [8, IGNORE, IGNORE, IGNORE, 9, IGNORE]])
    trained = Places.of([[1, 2], [4, 5], [8], [10]])
    parts = BatchParts(torch.tensor([0, 0, 1, 1]), [], trained, trained, torch.zeros(4), trained)
    is_hit = torch.tensor([True, True, True, False, True])  # 4, 5, 6, 7, 9; 8 has no predecessor
    assert right_answers(is_hit, labels, parts).tolist() == [2, 3]
