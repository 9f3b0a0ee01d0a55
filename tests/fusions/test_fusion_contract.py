"""Check what every fusion keeps, over the registry."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fusions.fused import cases, compose, make_rows, questions
from tiny import World

from avllm.config_peft import LoraConfig
from avllm.data.packing import fill_sequences, share_media
from avllm.data.schema import Sample
from avllm.evaluation.answering import answer_rows
from avllm.inference.chat import Chat
from avllm.inference.generation import Generation
from avllm.inference.generation import answer_rows as answer_batch
from avllm.models.checkpoint import save_checkpoint
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.objectives.next_token import NextToken

SETTINGS = Generation(max_new_tokens=6)
EVERY = pytest.mark.parametrize("spec", cases(), ids=lambda spec: spec["type"])


@pytest.fixture(scope="module")
def built(world: World) -> dict[str, tuple[AVLLM, AVProcessor]]:
    return {spec["type"]: compose(world, spec) for spec in cases()}


@EVERY
def test_consumed_streams_take_no_place(
    spec: dict[str, Any], built: dict[str, Any], clips: list[Path]
) -> None:
    model, processor = built[spec["type"]]
    assert set(model.config.media_token_ids) == {"video"}
    for row in make_rows(processor, questions(clips), answer=True):
        streams = {name for clip in row.clips for name in clip}
        seen = processor.describe(row)
        assert set(seen) - {"text"} == ({"video"} if streams else set())
        assert len(row.clip_places) == len(row.clips)


@EVERY
def test_the_sound_reaches_the_logits(
    spec: dict[str, Any], built: dict[str, Any], clips: list[Path]
) -> None:
    model, processor = built[spec["type"]]
    row = make_rows(processor, questions(clips)[1:2], answer=True)[0]
    batch = processor.collate([row])
    other = make_rows(processor, questions([clips[1], *clips[1:]])[1:2], answer=True)[0]
    swapped = {**row.clips[0], "audio": other.clips[0]["audio"]}
    changed = processor.collate([type(row)(**{**vars(row), "clips": [swapped]})])
    assert not torch.allclose(model(batch).logits, model(changed).logits, atol=1e-3)


@EVERY
def test_a_row_without_media_is_the_bare_llm(
    spec: dict[str, Any], built: dict[str, Any], clips: list[Path]
) -> None:
    model, processor = built[spec["type"]]
    rows = make_rows(processor, questions(clips), answer=True)
    alone = model(processor.collate(rows[:1])).logits
    bare = model.llm(input_ids=rows[0].input_ids[None]).logits
    assert torch.equal(alone, bare)
    among = model(processor.collate(rows)).logits[0, : alone.shape[1]]
    torch.testing.assert_close(among, alone[0], atol=1e-5, rtol=0)


@EVERY
def test_text_alone_does_not_see_the_media(
    spec: dict[str, Any], built: dict[str, Any], clips: list[Path]
) -> None:
    model, processor = built[spec["type"]]
    batch = processor.collate(make_rows(processor, questions(clips)[1:3], answer=True))
    ids = torch.arange(3, 9)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    before = model.hidden_states(ids, mask)
    with model.beside_llm(batch):
        inside = model.hidden_states(ids, mask)
    assert torch.equal(inside, before)


@EVERY
def test_batch_chat_evaluation_and_single_say_the_same(
    spec: dict[str, Any], built: dict[str, Any], clips: list[Path]
) -> None:
    model, processor = built[spec["type"]]
    samples = questions(clips)
    rows = make_rows(processor, samples, answer=False)
    single = [answer_batch(model, processor, [row], SETTINGS)[0] for row in rows]
    assert len(set(single)) > 2
    assert answer_batch(model, processor, rows, SETTINGS) == single
    assert answer_rows(model, processor, [*rows, *rows], batch_size=4, max_new_tokens=6) == [
        *single,
        *single,
    ]
    for one, expected in zip(samples, single, strict=True):
        messages = [message for message in one.messages if message.role == "user"]
        assert "".join(Chat(model, processor).ask(messages, max_new_tokens=6)).strip() == expected


@EVERY
def test_a_cache_changes_nothing(
    spec: dict[str, Any], built: dict[str, Any], clips: list[Path]
) -> None:
    model, processor = built[spec["type"]]
    batch = processor.collate(make_rows(processor, questions(clips)[1:], answer=False), "left")
    arguments = SETTINGS.arguments(model, processor)
    assert torch.equal(
        model.generate(batch, **arguments), model.generate(batch, use_cache=False, **arguments)
    )


@EVERY
def test_beams_see_their_own_row(
    spec: dict[str, Any], built: dict[str, Any], clips: list[Path]
) -> None:
    model, processor = built[spec["type"]]
    rows = make_rows(processor, questions(clips)[1:4], answer=False)
    arguments = SETTINGS.arguments(model, processor) | {"num_beams": 3}
    together = processor.decode(model.generate(processor.collate(rows, "left"), **arguments))
    alone = [
        processor.decode(model.generate(processor.collate([row], "left"), **arguments))[0]
        for row in rows
    ]
    assert together == alone


@EVERY
def test_prompt_is_the_beginning_of_the_training_row(
    spec: dict[str, Any], built: dict[str, Any], clips: list[Path]
) -> None:
    model, processor = built[spec["type"]]
    for one in questions(clips):
        prompt, row = make_rows(processor, [one], False)[0], make_rows(processor, [one], True)[0]
        length = len(prompt.input_ids)
        assert prompt.clip_places == row.clip_places
        logits = model(processor.collate([row])).logits[:, :length]
        torch.testing.assert_close(
            model(processor.collate([prompt])).logits, logits, atol=1e-5, rtol=0
        )


@EVERY
def test_packed_rows_see_their_own_clips(
    spec: dict[str, Any], built: dict[str, Any], clips: list[Path]
) -> None:
    model, processor = built[spec["type"]]
    rows = make_rows(processor, questions(clips), answer=True)
    objective = NextToken(model)
    losses, gradients = [], []
    for given in (rows, fill_sequences(rows, 64)):
        model.zero_grad()
        loss, _ = objective(model, processor.collate(given))
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.fusion.parameters()]))
    assert len(fill_sequences(rows, 64)) < len(rows)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


@EVERY
def test_questions_after_one_clip_without_tokens_all_see_it(
    spec: dict[str, Any], world: World, clips: list[Path]
) -> None:
    """With every stream consumed, a clip's run is empty and its place begins the first question."""
    model, processor = compose(world, spec | {"streams": ["audio", "video"]})
    with torch.no_grad():
        for name, parameter in model.fusion.named_parameters():
            if "gate" in name:
                parameter.fill_(1.0)
    media = {"type": "video", "video": str(clips[0])}
    texts = ("what colour is it ?", "is the sound low or high ?", "red or green ?")
    samples = []
    for text in texts:
        messages = [
            {"role": "user", "content": [media, {"type": "text", "text": text}]},
            {"role": "assistant", "content": "red"},
        ]
        samples.append(Sample.model_validate({"id": text, "messages": messages}))
    rows = make_rows(processor, samples, answer=True)
    (packed,) = share_media([replace(row, clips=rows[0].clips) for row in rows], 256)
    assert not packed.is_media.any()
    objective = NextToken(model)
    with torch.no_grad():
        single, _ = objective(model, processor.collate(rows))
        together, _ = objective(model, processor.collate([packed]))
    torch.testing.assert_close(together, single, rtol=1e-5, atol=1e-4)


@EVERY
@pytest.mark.parametrize("inside", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(
    spec: dict[str, Any],
    world: World,
    clips: list[Path],
    inside: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor = compose(world, spec)
    model.train()
    batch = processor.collate(make_rows(processor, questions(clips), answer=True))
    objective = NextToken(model)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            if inside:  # some versions of transformers recompute a layer's hooks with the layer
                checkpoint_hooks(model, monkeypatch)
        model.zero_grad()
        objective(model, batch)[0].backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert any(name.startswith("fusion.") for name in found[0])
    assert any(name.startswith("connector.1") for name in found[0])  # the sound's projection
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def checkpoint_hooks(model: AVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recompute a layer with its hooks in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    from avllm.models.llm_calls import recompute_contexts

    for layer in model.llm.get_decoder().layers:
        layer.gradient_checkpointing = False
    layer_type = type(model.llm.get_decoder().layers[0])
    plain = layer_type.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        whole = lambda *inputs: plain(self, *inputs, **kwargs)  # noqa: E731
        return checkpoint(
            whole, *args, use_reentrant=False, context_fn=partial(recompute_contexts, model.llm)
        )

    monkeypatch.setattr(layer_type, "__call__", call)


@EVERY
def test_blank_streams_keep_every_parameter_on_the_graph(
    spec: dict[str, Any], built: dict[str, Any], clips: list[Path]
) -> None:
    model, processor = built[spec["type"]]
    model.zero_grad()
    batch = processor.collate(make_rows(processor, questions(clips)[:1], answer=True), blanks=True)
    loss, _ = NextToken(model)(model, batch)
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.fusion.parameters())
    bare = processor.collate(make_rows(processor, questions(clips)[:1], answer=True))
    assert torch.equal(loss.detach(), NextToken(model)(model, bare)[0].detach())


@EVERY
def test_a_checkpoint_holds_the_fusion(
    spec: dict[str, Any], built: dict[str, Any], clips: list[Path], tmp_path: Path
) -> None:
    model, processor = built[spec["type"]]
    save_checkpoint(model, processor, tmp_path / "saved", [])
    again, reader = (
        AVLLM.from_pretrained(str(tmp_path / "saved")),
        AVProcessor.from_pretrained(tmp_path / "saved"),
    )
    assert all(parameter.requires_grad for parameter in again.fusion.parameters())
    names = [name for name, _ in again.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) == len(list(again.parameters()))
    rows = make_rows(reader, questions(clips), answer=True)
    batch = processor.collate(rows)
    assert torch.equal(again(batch).logits, model(batch).logits)


@EVERY
def test_lora_and_fusion_go_together(
    spec: dict[str, Any], world: World, clips: list[Path], tmp_path: Path
) -> None:
    model, processor = compose(world, spec)
    batch = processor.collate(make_rows(processor, questions(clips), answer=True))
    before = model(batch).logits
    model.add_lora(LoraConfig(r=2))
    assert torch.equal(model(batch).logits, before)
    save_checkpoint(model, processor, tmp_path / "saved", [])
    assert torch.equal(AVLLM.from_pretrained(str(tmp_path / "saved"))(batch).logits, before)
    torch.testing.assert_close(model.merge_lora()(batch).logits, before)
