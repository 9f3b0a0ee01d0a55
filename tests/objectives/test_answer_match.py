"""Answer matching: numbers by hand, packed = unpacked, captions left out, gradients."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny import World, make_world

from avllm.config_model import ModelConfig
from avllm.data.collate import Places
from avllm.data.manifest import read_manifest
from avllm.data.packing import fill_sequences, share_media
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.objectives._pairs import tokens_by_clip_set
from avllm.objectives.answer_match import AnswerMatch, Questions, find_questions, match_loss
from avllm.tokens import Tokens


def test_loss_by_hand() -> None:
    asked = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    answers = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    loss, hits = match_loss(asked, answers, torch.tensor([0, 0]), 2.0)
    first = -2.0 + math.log(math.exp(2.0) + math.exp(1.2))
    second = -0.0 + math.log(1.0 + math.exp(1.6))
    assert math.isclose(float(loss), first + second, rel_tol=1e-6)
    assert int(hits) == 1


def test_no_question_is_a_zero_on_the_graph() -> None:
    asked = torch.zeros(0, 2, requires_grad=True)
    loss, hits = match_loss(asked, torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), 1.0)
    loss.backward()
    assert float(loss) == 0.0
    assert float(hits) == 0.0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("match"), clips=4)


@pytest.fixture(scope="module")
def parts(world: World) -> tuple[AVLLM, AVProcessor]:
    torch.manual_seed(0)
    settings = ModelConfig.model_validate(world.model)
    tokenizer, ids = load_tokenizer(settings)
    model = AVLLM.from_backbones(settings, ids).eval()
    return model, AVProcessor.from_model(model, tokenizer)


def rows_of(processor: AVProcessor, manifest: Path, count: int) -> list:
    samples = read_manifest(manifest)[:count]
    return [
        processor.row(
            s, [processor.prepare(c) for c in processor.load_clips(s.media, manifest.parent)]
        )
        for s in samples
    ]


def test_packed_questions_have_the_loss_and_gradients_of_single_ones(
    parts: tuple[AVLLM, AVProcessor], world: World
) -> None:
    model, processor = parts
    rows = rows_of(processor, world.questions, 4)  # two clips, two questions each
    packed = [row for first in (0, 2) for row in share_media(rows[first : first + 2], 512)]
    assert len(packed) == 2
    torch.manual_seed(1)
    objective = AnswerMatch(model, dim=8, hidden=16, words=0.5)
    questions = find_questions(processor.collate(packed).parts)
    assert questions.clip_set.tolist() == [0, 0, 1, 1]
    assert questions.place.tolist() == [0, 1, 0, 1]
    losses, gradients = [], []
    for given in (rows, packed, fill_sequences(packed, 512)):
        batch = processor.collate(given)
        assert objective.weight(batch) == 4
        objective.zero_grad()
        model.zero_grad()
        loss, _ = objective(model, batch)
        loss.backward()
        losses.append(float(loss.detach()))
        trained = [*objective.parameters(), *model.connector.parameters()]
        gradients.append(torch.cat([p.grad.flatten() for p in trained]))
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-6)
        assert float((gradient - gradients[0]).norm()) <= 1e-5 * max(
            1.0, float(gradients[0].norm())
        )


def test_captions_are_left_out(parts: tuple[AVLLM, AVProcessor], world: World) -> None:
    model, processor = parts
    batch = processor.collate(rows_of(processor, world.captions, 2))
    objective = AnswerMatch(model, dim=8, hidden=16)
    assert [part.kind for part in batch.parts.items] == [None, None]
    assert objective.weight(batch) == 0
    loss, _ = objective(model, batch)
    assert float(loss) == 0.0


def test_the_gradient_reaches_the_connector(parts: tuple[AVLLM, AVProcessor], world: World) -> None:
    model, processor = parts
    model.zero_grad()
    objective = AnswerMatch(model, dim=8, hidden=16)
    loss, _ = objective(model, processor.collate(rows_of(processor, world.questions, 4)))
    loss.backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in model.connector.parameters())
    assert all(p.grad is not None for p in objective.parameters())


def test_tokens_of_several_clips_lie_in_their_set() -> None:
    span = torch.zeros(3, 1, 2)
    video = Tokens(
        torch.arange(6.0).view(3, 1, 2, 1),
        torch.tensor([[[True, True]], [[True, False]], [[True, True]]]),
        span,
    )
    audio = Tokens(
        10 + torch.arange(3.0).view(3, 1, 1, 1), torch.ones(3, 1, 1, dtype=torch.bool), span
    )
    x, there = tokens_by_clip_set({"video": video, "audio": audio}, Places.of([[1], [0, 2], []]))
    assert x[0][there[0]].flatten().tolist() == [2.0, 11.0]
    assert x[1][there[1]].flatten().tolist() == [0.0, 1.0, 10.0, 4.0, 5.0, 12.0]
    assert not there[2].any(), "a part without media has none"


def test_a_token_that_is_the_sum_of_words_is_read(parts: tuple[AVLLM, AVProcessor]) -> None:
    model, _ = parts
    torch.manual_seed(2)
    objective = AnswerMatch(model, dim=8, hidden=16, words=1.0)
    width = objective.gate.in_features
    question, answer, other = torch.randn(3, width)
    tokens = torch.stack([question + answer, torch.randn(width), -question + other])[None].repeat(
        2, 1, 1
    )
    there = torch.tensor(
        [[True, True, True], [False, True, True]]
    )  # the second row lacks the token that is asked about
    asked = about_sets([0, 1], [0, 0], sets=2)
    with torch.no_grad():
        objective.gate.weight.zero_()
        objective.gate.bias.zero_()
        objective.log_sharpness.fill_(6.0)
        objective.nothing[0].copy_(
            question + 2 * torch.randn(width)
        )  # a little like it: where nothing else is
        found = objective._look_up(question.expand(2, -1), asked, tokens, there)
    nothing = torch.nn.functional.normalize(objective.nothing[1].detach(), dim=-1)
    torch.testing.assert_close(found[1], nothing)
    assert float(found[0] @ torch.nn.functional.normalize(answer, dim=-1)) > 0.3


def test_the_second_reading_trains_the_connector(
    parts: tuple[AVLLM, AVProcessor], world: World
) -> None:
    model, processor = parts
    batch = processor.collate(rows_of(processor, world.questions, 4))
    objective = AnswerMatch(model, dim=8, hidden=16, words=1.0)
    plain = AnswerMatch(model, dim=8, hidden=16)
    assert not plain.load_state_dict(objective.state_dict(), strict=False).missing_keys
    (loss, figures), (less, _) = objective(model, batch), plain(model, batch)
    assert set(figures) == {"hits", "hits_by_words"}
    assert float(loss.detach()) > float(less.detach())
    (loss - less).backward()
    assert any(
        p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.connector.parameters()
    )


def about_sets(clip_set: list[int], place: list[int], sets: int) -> Questions:
    nothing = Places.of([[]] * len(clip_set))
    zeros = torch.zeros(len(clip_set), dtype=torch.long)
    return Questions(
        torch.tensor(clip_set), torch.tensor(place), sets, nothing, nothing, zeros, zeros[:1]
    )


def test_questions_lie_side_by_side_in_their_set() -> None:
    questions = about_sets([0, 0, 2], [0, 1, 0], sets=3)
    x = torch.arange(1.0, 4.0)[:, None]
    side = questions.by_set(x)
    assert side.squeeze(-1).tolist() == [[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]]
    torch.testing.assert_close(side[questions.clip_set, questions.place], x)
