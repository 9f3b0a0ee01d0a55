"""Added words train and are saved beside a frozen LLM, in its embedding and its logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import World, make_llm, make_world
from torch import Tensor

from avllm.config_model import ModelConfig
from avllm.config_peft import LoraConfig
from avllm.data.reading import MediaReader
from avllm.data.schema import Sample
from avllm.errors import UserError
from avllm.inference.generation import Generation
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.checkpoint import save_checkpoint, trained_state
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.objectives.next_token import NextToken

WORDS = [f"<t{n}>" for n in range(12)]  # more than ten: by name they sort otherwise than by id
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=1)


def composed(
    world: World, llm: Path, words: bool = True, **changes: object
) -> tuple[AVLLM, AVProcessor]:
    description = ModelConfig.model_validate(world.model | {"llm": {"name": str(llm), **changes}})
    tokenizer, ids = load_tokenizer(description)
    torch.manual_seed(0)
    model = AVLLM.from_backbones(description, ids).eval()
    processor = AVProcessor.from_model(model, tokenizer)
    if words:
        model.add_words(processor.add_words(WORDS))
        scatter(model)
    return model, processor


def scatter(model: AVLLM) -> None:
    """Rows unlike each other, so that a mixed-up order shows."""
    assert model.words is not None
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.words.parameters():
            parameter.normal_()


def asked(processor: AVProcessor, world: World, answer: str = "red <t3> <t11>") -> Sample:
    content = [{"type": "video", "video": "000.mp4"}, {"type": "text", "text": "what <t1> is it ?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return Sample.model_validate({"id": "s", "messages": messages})


def batch_of(processor: AVProcessor, world: World, answer: bool = True):
    return processor([asked(processor, world)], root=world.captions.parent, answer=answer)


def reference(model: AVLLM, inputs: Tensor) -> Tensor:
    """Logits of hidden states through the LLM's own head, with the added rows put in by hand."""
    assert model.words is not None
    hooks = model.words
    hooks.detach()
    own = model.llm.get_output_embeddings()(inputs)
    hooks.attach(model.llm)
    ids = list(model.config.words.values())
    wide = torch.full(
        (*own.shape[:-1], max(own.shape[-1], max(ids) + 1)), torch.finfo(own.dtype).min
    )
    wide[..., : own.shape[-1]] = own
    for row, token_id in enumerate(hooks.ids):
        wide[..., token_id] = inputs @ hooks.output.weight[row]
    return wide


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "spare", [0, 40], ids=["ids after the vocabulary", "ids within the padded vocabulary"]
)
@pytest.mark.parametrize(
    "lora", [None, "all-linear", ["q_proj", "lm_head"]], ids=["bare", "lora", "lora on the head"]
)
def test_rows_stand_beside_the_llms_own(
    world: World, tmp_path: Path, tied: bool, spare: int, lora: object
) -> None:
    llm = make_llm(tmp_path / "llm", tie_word_embeddings=tied)
    if spare:
        from transformers import AutoModelForCausalLM

        padded = AutoModelForCausalLM.from_pretrained(llm)
        padded.resize_token_embeddings(padded.config.vocab_size + spare)
        padded.save_pretrained(llm)
    model, processor = composed(world, llm)
    if lora is not None:
        model.add_lora(LoraConfig(r=2, targets=lora)).freeze()
    assert model.words is not None
    ids = torch.tensor([model.config.words["<t3>"], 5, model.config.words["<t11>"]])
    embedded = model.llm.get_input_embeddings()(ids)
    row = {token_id: n for n, token_id in enumerate(model.words.ids)}
    assert torch.equal(embedded[0], model.words.input.weight[row[int(ids[0])]])
    assert torch.equal(embedded[2], model.words.input.weight[row[int(ids[2])]])
    batch = batch_of(processor, world)
    hidden = model.run_decoder(model.embed(batch), batch)
    expected = reference(model, hidden)
    assert torch.allclose(model.llm.get_output_embeddings()(hidden), expected, atol=1e-5)
    assert torch.allclose(model(batch).logits, expected, atol=1e-5)
    assert trained_state(model).keys() >= {"words.input.weight", "words.output.weight"}
    assert not any(name.startswith("llm.") for name in trained_state(model))


def test_they_train_and_the_llm_does_not(world: World) -> None:
    model, processor = composed(world, world.llm)
    assert model.words is not None
    before = {name: tensor.clone() for name, tensor in model.llm.state_dict().items()}
    batch, objective = batch_of(processor, world), NextToken(model)
    assert objective.plain_head
    rows = model.words.rows_of(batch.labels[batch.labels >= 0])
    assert rows[rows >= 0].tolist() == [3, 11]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(5):
        loss, _ = objective(model, batch)
        optimizer.zero_grad()
        loss.backward()
        losses.append(float(loss))
        optimizer.step()
    assert losses[-1] < losses[0]
    assert model.words.input.weight.grad is not None
    used = model.words.input.weight.grad.abs().sum(1) > 0
    assert used.nonzero().flatten().tolist() == [1, 3, 11], "those that are embedded, and no other"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.llm.state_dict().items())


def test_generation_says_words_and_goes_on_from_them(world: World) -> None:
    model, processor = composed(world, world.llm)
    assert model.words is not None
    with torch.no_grad():
        model.words.output.weight.mul_(30)
    prompt = batch_of(processor, world, answer=False).to(model.device)
    arguments = Generation(max_new_tokens=6).arguments(model, processor)
    said = model.generate(prompt, **arguments)
    assert set(said[0].tolist()) & set(model.config.words.values())
    assert any(word in processor.decode(said)[0] for word in WORDS)
    ids, text = prompt.input_ids, []  # the same, one whole forward pass a token
    for _ in range(said.shape[1]):
        embeds = model.merge_media(ids, model.media_tokens(prompt))
        text.append(int(model.llm(inputs_embeds=embeds).logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[text[-1]]])], 1)
    assert said[0].tolist() == text


def test_a_loop_that_calls_the_llm_itself_knows_them(world: World) -> None:
    from avllm.evaluation.answering import answer_rows

    model, processor = composed(world, world.llm)
    assert model.words is not None
    with torch.no_grad():
        model.words.output.weight.mul_(30)
    sample = asked(processor, world)
    clips = MediaReader(processor).inputs(sample.media, world.captions.parent)
    rows = [processor.row(sample, clips, answer=False) for _ in range(2)]
    for row in rows:
        row.clips[0] = rows[0].clips[0]  # the same clip: its beginning is shared
    alone = processor.decode(model.generate(processor.collate(rows[:1], "left"), max_new_tokens=6))
    assert any(word in alone[0] for word in WORDS)
    assert answer_rows(model, processor, rows, batch_size=2, max_new_tokens=6) == alone * 2


@pytest.mark.parametrize("lora", [False, True], ids=["bare", "lora"])
def test_a_checkpoint_holds_them_and_no_llm(world: World, tmp_path: Path, lora: bool) -> None:
    model, processor = composed(world, world.llm)
    if lora:
        model.add_lora(LoraConfig(r=2)).freeze()
    said = model(batch_of(processor, world)).logits
    save_checkpoint(model, processor, tmp_path, [])
    loaded, reader = AVLLM.from_pretrained(tmp_path), AVProcessor.from_pretrained(tmp_path)
    assert loaded.config.words == model.config.words
    assert torch.equal(loaded(batch_of(reader, world)).logits, said)
    trains = {
        name
        for name, p in loaded.named_parameters()
        if p.requires_grad and not name.startswith("connector")
    }
    assert {"words.input.weight", "words.output.weight"} <= trains
    more = loaded.add_words(reader.add_words(["<more>"]))
    assert more.words is not None
    assert torch.equal(more.words.input.weight[:-1], model.words.input.weight)
    save_checkpoint(more, reader, tmp_path / "more", [])
    again = AVLLM.from_pretrained(tmp_path / "more")
    assert torch.equal(again(batch_of(reader, world)).logits, more(batch_of(reader, world)).logits)


def test_a_quantised_llm_has_them_too(world: World) -> None:
    pytest.importorskip("bitsandbytes")
    model, processor = composed(world, world.llm, quantize="4bit")
    batch = batch_of(processor, world)
    loss, _ = NextToken(model)(model, batch)
    loss.backward()
    assert model.words is not None
    assert model.words.input.weight.grad.abs().sum() > 0  # type: ignore[union-attr]
    assert model.words.output.weight.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_without_words_nothing_is_hooked(world: World) -> None:
    model, _ = composed(world, world.llm, words=False)
    table, head = model.llm.get_input_embeddings(), model.llm.get_output_embeddings()
    assert model.words is None
    assert not [*table._forward_hooks, *table._forward_pre_hooks, *head._forward_hooks]
    assert not any(name.startswith("words") for name in model.state_dict())


def test_collisions_are_refused(world: World) -> None:
    model, processor = composed(world, world.llm)
    with pytest.raises(UserError, match="'red' already"):
        processor.add_words(["red"])
    with pytest.raises(UserError, match="'<t1>' was added before"):
        model.add_words({"<t1>": 4000})
    with pytest.raises(UserError, match=r"<\|video\|>"):
        model.add_words({"<new>": model.config.media_token_ids["video"]})
    with pytest.raises(UserError, match="'<a>'"):
        model.add_words({"<a>": 4000, "<b>": 4000})


def test_a_processor_with_another_tokenizer_is_refused(world: World) -> None:
    model, processor = composed(world, world.llm)
    other = composed(world, world.llm, words=False)[1].tokenizer
    with pytest.raises(UserError, match="'<t0>'"):
        AVProcessor.from_model(model, other)
