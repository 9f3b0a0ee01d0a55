"""Gated cross-attention: closed gates, the clips a place sees, other LLMs, options, resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from fusions.fused import cases, compose, make_rows, open_gates, questions, sample
from tiny import World, row, settings, text, write_rows
from torch import nn

from avllm.config_model import ModelConfig
from avllm.errors import UserError
from avllm.fusions.base import decoder_layers
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.registry import UnknownPartError

(SPEC,) = (spec for spec in cases() if spec["type"] == "gated_cross_attention")


@pytest.fixture(scope="module")
def built(world: World) -> tuple[AVLLM, AVProcessor]:
    return compose(world, SPEC)


def test_closed_gates_leave_the_llm_to_the_bit(world: World, clips: list[Path]) -> None:
    description = ModelConfig.model_validate(world.model | {"fusion": SPEC})
    tokenizer, ids = load_tokenizer(description)
    model = AVLLM.from_backbones(description, ids).eval()
    processor = AVProcessor.from_model(model, tokenizer)
    batch = processor.collate(make_rows(processor, questions(clips), answer=True))
    fused = model(batch).logits
    embeds = model.embed(batch)
    mask = batch.attention_mask.long()
    bare = model.llm(
        inputs_embeds=embeds, attention_mask=mask, position_ids=batch.position_ids
    ).logits
    assert torch.equal(fused, bare)
    open_gates(model)
    assert not torch.allclose(model(batch).logits, bare, atol=1e-2)


def seen_by(processor: AVProcessor, model: AVLLM, one: Any) -> torch.Tensor:
    """Return the clips each place of a row sees, ``(L, clips)`` bool, by its first block."""
    batch = processor.collate([one])
    tokens = model.media_tokens(batch)
    x = torch.ones(1, batch.input_ids.shape[1], model.llm.config.hidden_size)

    def block(changed: dict[str, Any]) -> torch.Tensor:
        return model.fusion.attend(0, x, model.fusion.prepare(changed, batch))[0]

    plain = block(tokens)
    columns = []
    for clip in range(len(one.clips)):
        audio = tokens["audio"].x.clone()
        audio[clip] = torch.randn_like(audio[clip])
        columns.append((block({"audio": tokens["audio"].with_x(audio)}) != plain).any(-1))
    return torch.stack(columns, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("only_before", [True, False])
def test_a_place_sees_the_latest_clip_before_it(
    world: World, clips: list[Path], only_before: bool
) -> None:
    model, processor = compose(world, SPEC | {"only_before": only_before})
    one = make_rows(
        processor, [sample("s", "describe", clips[0], "and", clips[1], "it ?")], answer=True
    )[0]
    first, second = one.clip_places
    place = torch.arange(len(one.input_ids))
    expected = torch.stack([(place >= first) & (place < second), place >= second], dim=1)
    seen = seen_by(processor, model, one)
    assert torch.equal(seen, expected if only_before else torch.ones_like(expected))


@torch.no_grad()
def test_clips_without_text_between_them_are_seen_together(world: World, clips: list[Path]) -> None:
    model, processor = compose(world, {**SPEC, "streams": ["video", "audio"]})
    assert model.config.media_token_ids == {}
    one = make_rows(
        processor, [sample("s", clips[0], clips[1], "what colour is it ?")], answer=True
    )[0]
    assert one.clip_places[0] == one.clip_places[1]
    assert not one.is_media.any()
    seen = seen_by(processor, model, one)
    assert seen[one.clip_places[0] :].all()
    assert not seen[: one.clip_places[0]].any()


def test_left_padding_moves_the_clips_places(
    built: tuple[AVLLM, AVProcessor], clips: list[Path]
) -> None:
    _, processor = built
    rows = make_rows(processor, questions(clips), answer=False)
    right, left = processor.collate(rows, "right"), processor.collate(rows, "left")
    padding = left.input_ids.shape[1] - right.attention_mask.sum(1)
    assert right.clip_at.tolist() == [place for each in rows for place in each.clip_places]
    assert torch.equal(left.clip_at, right.clip_at + padding[right.clip_row])


def test_a_reused_context_of_another_model_does_nothing(
    built: tuple[AVLLM, AVProcessor], world: World, clips: list[Path]
) -> None:
    model, processor = built
    other, _ = compose(world, SPEC)
    batch = processor.collate(make_rows(processor, questions(clips), answer=True))
    alone = model(batch).logits
    with other.beside_llm(batch):
        assert torch.equal(model(batch).logits, alone)


@pytest.mark.parametrize(
    ("spec", "error", "named"),
    [
        ({"streams": ["smell"]}, UserError, "smell"),
        ({"streams": []}, UserError, "no stream"),
        ({"streams": ["audio"], "every": 3}, UserError, "every"),
        ({"streams": ["audio"], "evry": 1}, UnknownPartError, "evry"),
        ({}, UnknownPartError, "streams"),
    ],
)
def test_wrong_options_are_named(
    world: World, spec: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        compose(world, {"type": "gated_cross_attention", **spec})


def test_an_llm_without_layers_is_refused() -> None:
    class Flat(nn.Module):
        def get_decoder(self) -> nn.Module:
            return nn.Linear(2, 2)

    with pytest.raises(UserError, match="list of layers"):
        decoder_layers(Flat())


def fused_run(world: World, output: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a short run that trains the fusion with the connector."""
    found = settings(world, output, model=world.model | {"fusion": SPEC}, **changes)
    found["trainable"] = [["^(connector|fusion)", 2e-2], [".*", None]]
    return found


def test_training_lowers_the_loss_opens_the_gates_and_resumes(world: World, tmp_path: Path) -> None:
    changes = {"train__max_steps": 12, "train__save_every": 3}
    straight = tiny_runs.run(fused_run(world, tmp_path / "straight", **changes))
    losses = tiny_runs.losses(straight)
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    weights = tiny_runs.weights(straight)
    gates = [name for name in weights if name.endswith("_gate")]
    assert len(gates) == 4
    assert all(weights[name].abs() > 1e-3 for name in gates)
    killed = fused_run(world, tmp_path / "killed", **changes)
    tiny_runs.kill_after(killed, 5)
    assert tiny_runs.difference(tiny_runs.weights(tiny_runs.run(killed)), weights) == 0.0


def test_two_processes_train_as_one(world: World, tmp_path: Path) -> None:
    """Each step has a row of text alone, so that a process has blanks in place of media."""
    captions = [json.loads(line) for line in world.captions.read_text().splitlines()]
    rows = [
        row(f"text-{number}", [text("what colour is it ?")], "red")
        for number in range(len(captions))
    ]
    mixed = [one for pair in zip(captions, rows, strict=True) for one in pair]
    manifest = write_rows(world.captions.parent / "mixed.jsonl", mixed)
    changes = {"train__max_steps": 4, "train__batch_size": 1, "data__train": str(manifest)}
    one = tiny_runs.run(fused_run(world, tmp_path / "one", train__accumulate=2, **changes))
    two = tiny_runs.run(fused_run(world, tmp_path / "two", **changes), ranks=2)
    assert tiny_runs.difference(tiny_runs.weights(one), tiny_runs.weights(two)) < 1e-5


def test_rows_of_features_train_too(built: tuple[AVLLM, AVProcessor], clips: list[Path]) -> None:
    """A clip that has its features in place of its media gives the same logits."""
    model, processor = built
    one = make_rows(processor, questions(clips)[1:2], answer=True)[0]
    batch = processor.collate([one])
    features = model.encode_media(batch.streams)
    clip = {
        n: replace(i, inputs={}, features={"": features[n].x[0]}) for n, i in one.clips[0].items()
    }
    cached = processor.collate([replace(one, clips=[clip])])
    torch.testing.assert_close(model(cached).logits, model(batch).logits)
