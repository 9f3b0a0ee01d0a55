"""Every decoder keeps its promise: batch = single = chat = evaluation, also for rows of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from answering import make_checkpoint
from tiny import COLOURS, write_clip

from avllm.data.reading import MediaReader
from avllm.data.schema import Sample
from avllm.decoders.contrastive import contrast
from avllm.errors import UserError
from avllm.evaluation.answering import answer_rows as answer_all
from avllm.inference.chat import Chat
from avllm.inference.generation import Generation, answer_rows, read_decoding
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.registry import UnknownPartError, choices

torch.set_num_threads(1)
CASES: dict[str, list[dict[str, Any]]] = {
    "contrastive": [
        {"reference": "corrupted_media", "noise": 0.9, "alpha": 2.0},
        {"reference": "no_media", "alpha": 2.0},
        {"reference": "no_examples", "alpha": 2.0},
    ],
}
"""Options by decoder in tests; a new one is tested with its defaults, or with a line here."""
SPECS = [
    {"type": name, **options} for name in choices("decoders") for options in CASES.get(name, [{}])
]
EVERY = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: "-".join(map(str, spec.values())))
LENGTH = 6


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[AVLLM, AVProcessor]:
    folder = make_checkpoint(tmp_path_factory.mktemp("decoded"))
    return AVLLM.from_pretrained(str(folder)), AVProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Prompts of text, of one clip and of two, with and without earlier turns."""
    folder = tmp_path_factory.mktemp("clips")
    red = write_clip(folder / "red.mp4", COLOURS["red"], 300.0)
    blue = write_clip(folder / "blue.mp4", COLOURS["blue"], None, 2.0)
    question = "what colour is it ?"
    return [
        prompt("text", [question]),
        prompt("one", [red, question]),
        prompt("two", [red, "and", blue, "do you hear a high or low sound ?"]),
        prompt("turns", [red, question], ["blue", question]),
        prompt("example", [red, question], [blue, question]),
    ]


def prompt(id: str, *turns: Sequence[str | Path]) -> Sample:
    """A chat of user turns, each but the last answered."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        kinds = ["video" if isinstance(piece, Path) else "text" for piece in turn]
        parts = [{"type": kind, kind: str(piece)} for kind, piece in zip(kinds, turn, strict=True)]
        answer = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
        messages += [{"role": "user", "content": parts}, answer]
    return Sample.model_validate({"id": id, "messages": messages[:-1]})


def rows_of(processor: AVProcessor, samples: list[Sample]) -> list[Any]:
    return [
        processor.row(s, MediaReader(processor).inputs(s.media, None), answer=False)
        for s in samples
    ]


@EVERY
def test_batch_single_and_evaluation_say_the_same(
    spec: dict[str, Any], parts: tuple[AVLLM, AVProcessor], samples: list[Sample]
) -> None:
    model, processor = parts
    rows, settings = rows_of(processor, samples), Generation(LENGTH, decoding=spec)
    single = [answer_rows(model, processor, [row], settings)[0] for row in rows]
    assert answer_rows(model, processor, rows, settings) == single
    evaluated = answer_all(
        model, processor, rows, batch_size=3, max_new_tokens=LENGTH, decoding=spec
    )
    assert evaluated == single
    plain = answer_rows(model, processor, rows, Generation(LENGTH))
    assert single != plain
    assert single[0] == plain[0]  # text alone


@EVERY
def test_chat_says_the_same(
    spec: dict[str, Any], parts: tuple[AVLLM, AVProcessor], samples: list[Sample]
) -> None:
    model, processor = parts
    for sample in samples:
        renamed = sample.model_copy(
            update={"id": "chat"}
        )  # as a chat's rows are named: noise follows from the id
        expected = answer_rows(
            model, processor, rows_of(processor, [renamed]), Generation(LENGTH, decoding=spec)
        )[0]
        said = "".join(
            Chat(model, processor).ask(sample.messages, max_new_tokens=LENGTH, decoding=spec)
        )
        assert said.strip() == expected


@EVERY
def test_settings_are_json(spec: dict[str, Any]) -> None:
    import json

    assert json.loads(json.dumps(Generation(decoding=spec).settings()))["decoding"] == spec


@pytest.mark.parametrize("reference", ["corrupted_media", "no_media", "no_examples"])
def test_alpha_zero_is_greedy_to_the_bit(
    reference: str, parts: tuple[AVLLM, AVProcessor], samples: list[Sample]
) -> None:
    model, processor = parts
    batch = processor.collate(rows_of(processor, samples), padding_side="left")
    found = []
    for decoding in (None, {"type": "contrastive", "reference": reference, "alpha": 0, "beta": 0}):
        arguments = Generation(LENGTH, decoding=decoding).arguments(model, processor)
        out: Any = model.generate(
            batch, **arguments, output_scores=True, return_dict_in_generate=True
        )
        found.append((out.sequences, torch.stack(out.scores)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("reference", ["corrupted_media", "no_media", "no_examples"])
def test_the_cached_reference_is_the_one_read_whole(
    reference: str, parts: tuple[AVLLM, AVProcessor], samples: list[Sample]
) -> None:
    model, processor = parts
    decoding = {"type": "contrastive", "reference": reference, "noise": 0.9}
    batch = processor.collate(rows_of(processor, samples), padding_side="left")
    decoder = Generation(decoding=decoding).arguments(model, processor)["decoder"]
    step = decoder.processors(model, batch)[0]
    answer = torch.randint(3, 20, (len(samples), 4), generator=torch.Generator().manual_seed(0))
    scores = torch.zeros(len(samples), model.llm.config.vocab_size)
    for length in range(5):
        step(answer[:, :length], scores)
    reference_batch = step.reference.batch
    embeds = model.merge_media(reference_batch.input_ids, step.reference.tokens, reference_batch)
    whole = torch.cat([embeds, model.llm.get_input_embeddings()(answer)], dim=1)
    mask = torch.nn.functional.pad(reference_batch.attention_mask, (0, 4), value=True)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model.llm(inputs_embeds=whole, attention_mask=mask.long(), position_ids=places).logits[
        :, -1
    ]
    torch.testing.assert_close(step.cached.logits, logits, atol=1e-4, rtol=1e-4)


def test_the_last_question_alone_is_its_own_prompt(
    parts: tuple[AVLLM, AVProcessor], samples: list[Sample]
) -> None:
    model, processor = parts
    batch = processor.collate(rows_of(processor, samples[3:]), padding_side="left")
    decoder = Generation(decoding={"type": "contrastive", "reference": "no_examples"}).arguments(
        model, processor
    )
    reference = decoder["decoder"].processors(model, batch)[0].reference
    short = [sample.model_copy(update={"messages": sample.messages[-1:]}) for sample in samples[3:]]
    expected = processor.collate(rows_of(processor, short), padding_side="left")
    assert torch.equal(reference.batch.input_ids, expected.input_ids)
    assert torch.equal(reference.batch.attention_mask, expected.attention_mask)
    assert torch.equal(reference.batch.clip_row, expected.clip_row)
    assert torch.equal(reference.batch.clip_at, expected.clip_at)
    merged = model.merge_media(reference.batch.input_ids, reference.tokens, reference.batch)
    torch.testing.assert_close(merged, model.embed(expected))


def test_contrast_by_hand() -> None:
    scores, reference = torch.tensor([[2.0, 1.0, -4.0]]), torch.tensor([[3.0, 0.0, -9.0]])
    assert torch.equal(
        contrast(scores, reference, 1.0, 0.1), torch.tensor([[1.0, 2.0, -torch.inf]])
    )
    assert torch.equal(contrast(scores, reference, 0.5, 0.0), torch.tensor([[1.5, 1.5, -1.5]]))


def test_yaml_of_the_command_line() -> None:
    assert read_decoding(None) is None
    assert read_decoding("contrastive") == {"type": "contrastive"}
    read = read_decoding("{type: contrastive, alpha: 1, beta: 1e-1}")
    assert read == {"type": "contrastive", "alpha": 1, "beta": 0.1}
    for text in ("{type: contrastive, alpa: 1}", "{type: contrasting}"):
        with pytest.raises(UnknownPartError, match="contrastive|alpha"):
            read_decoding(text)
    for text, key in (
        ("{type: contrastive, beta: 2}", "beta"),
        ("[1]", "decoding"),
        ("{type", "decoding"),
    ):
        with pytest.raises(UserError, match=key):
            read_decoding(text)
