"""The text side of a Q-Former: who sees whom, and transformers' own BLIP-2 on the same weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import make_siglip
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    PreTrainedTokenizerFast,
)

from avllm.adapters._blip2 import load_blip2
from avllm.adapters._qformer_text import READ, WRITE, Text, joint_mask
from avllm.adapters.qformer import QFormer
from avllm.errors import UserError
from avllm.tokens import Tokens

torch.set_num_threads(1)
SIZES: dict[str, Any] = {"num_queries": 4, "dim": 16, "layers": 3, "heads": 2, "cross_every": 2}
WIDTH, LLM, VOCABULARY = 12, 10, 30


def qformer(text: str | int | None = VOCABULARY, **changes: Any) -> QFormer:
    torch.manual_seed(0)
    made = QFormer({"video": WIDTH}, LLM, stream="video", **SIZES | changes, text=text).eval()
    with torch.no_grad():  # weights of 0.02 would hide what is seen
        for name, p in made.named_parameters():
            if p.dim() > 1 and "norm" not in name.lower():
                p.normal_(std=0.3)
    return made


def clips(count: int = 3, frames: int = 2) -> Tokens:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, frames, 5, WIDTH, generator=generator)
    edges = torch.arange(frames + 1.0)
    span = torch.stack([edges[:-1], edges[1:]], 1).expand(count, -1, -1)
    mask = torch.ones(count, frames, 5, dtype=torch.bool)
    mask[0, 0, 3:] = False  # pictures of different resolution
    mask[1, 1:] = False  # a clip of one frame
    return Tokens(x, mask, span)


def words(count: int, length: int = 5, seed: int = 2) -> tuple[Tensor, Tensor]:
    ids = torch.randint(
        0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed)
    )
    return ids, torch.ones(count, length, dtype=torch.bool)


def test_masks_by_hand() -> None:
    real = torch.tensor([[True, True, False]])
    everybody = joint_mask(2, real, causal=False)[0, 0]
    assert everybody.tolist() == [[True, True, True, True, False]] * 5
    seen = joint_mask(2, real, causal=True)[0, 0].long()
    assert seen.tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
    ]


def test_without_the_option_nothing_changes_and_with_it_media_become_the_same() -> None:
    plain, reading = qformer(None), qformer()
    names = {n for n, _ in plain.named_parameters()}
    assert not [n for n in names if "text" in n or ".intermediate." in n]
    assert not reading.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    given = {"video": clips()}
    assert torch.equal(plain(given)["video"].x, reading(given)["video"].x)
    more = {n for n, _ in reading.named_parameters()} - names
    assert more == {
        n for n, p in reading.named_parameters() if any(p is q for q in reading._text_parameters())
    }
    rule = re.search(r"\['(.*)', null\]", QFormer.__doc__)[
        1
    ]  # what the documentation says freezes the text side
    assert more == {n for n in names | more if re.search(rule, f"connector.0.{n}")}
    with pytest.raises(ValueError, match="text True; expected 'llm' or the size"):
        qformer(True)


def test_whoever_has_no_use_for_texts_leaves_their_weights_a_gradient_of_zero() -> None:
    """Several processes wait for a gradient of every parameter."""
    reading = qformer().train()
    reading({"video": clips()})["video"].x.sum().backward()
    for p in reading._text_parameters():
        assert p.grad is not None
        assert not p.grad.any()


@pytest.mark.parametrize("text", [VOCABULARY, "llm"])
def test_a_written_text_sees_queries_and_what_stands_before(text: str | int) -> None:
    reading = qformer(text)
    x, keep, _ = reading.units(clips())
    (ids, mask), (other, _) = words(len(x)), words(len(x), seed=3)
    other[:, :2] = ids[:, :2]
    if text == "llm":
        table = torch.randn(VOCABULARY, LLM, generator=torch.Generator().manual_seed(4))
        ids, other = table[ids], table[other]
    q = SIZES["num_queries"]
    plain = reading.read(x, keep)
    one, two = (
        reading.read(x, keep, reading.text.embed(w, mask, WRITE), causal=True) for w in (ids, other)
    )
    torch.testing.assert_close(one[:, :q], plain)  # queries do not see the text, whatever it is
    torch.testing.assert_close(two[:, :q], plain)
    torch.testing.assert_close(
        one[:, q : q + 3], two[:, q : q + 3]
    )  # the beginning and two equal words
    assert not torch.isclose(one[:, q + 3 :], two[:, q + 3 :]).all(-1).any()
    moved = reading.read(x + 1, keep, reading.text.embed(ids, mask, WRITE), causal=True)
    assert (
        not torch.isclose(one[:, q:], moved[:, q:]).all(-1).any()
    )  # it sees the media through the queries
    read = reading.read(x, keep, reading.text.embed(ids, mask, READ))[:, :q]
    assert not torch.isclose(read, plain).all(-1).any()  # a text that is matched is seen
    again = reading.read(x, keep, reading.text.embed(other, mask, READ))[:, :q]
    assert not torch.isclose(read, again).all(-1).any()


@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing(causal: bool) -> None:
    reading = qformer()
    x, keep, _ = reading.units(clips())
    ids, mask = words(len(x))
    short = reading.read(x, keep, reading.text.embed(ids, mask, READ), causal)
    padded = torch.cat([ids, torch.full_like(ids, 7)], 1), F.pad(mask, (0, ids.shape[1]))
    long = reading.read(x, keep, reading.text.embed(*padded, READ), causal)
    torch.testing.assert_close(long[:, : short.shape[1]], short)
    loud = reading.read(
        torch.where(keep[..., None], x, 1e4), keep, reading.text.embed(ids, mask, READ), causal
    )  # nor that of the media
    torch.testing.assert_close(loud, short, rtol=1e-4, atol=1e-5)
    alone = reading.read_text(reading.text.embed(ids, mask, READ))
    torch.testing.assert_close(
        reading.read_text(reading.text.embed(*padded, READ))[:, : alone.shape[1]], alone
    )


def test_who_has_nothing_to_read_runs_the_same_modules() -> None:
    reading = qformer()
    x, keep, _ = reading.units(clips())
    text = reading.text.embed(*words(0), READ)
    x = x[:0].requires_grad_()
    for out in (
        reading.read(x, keep[:0], text),
        reading.read_text(text),
        reading.read(x, keep[:0]),
    ):
        assert len(out) == 0
        reading.zero_grad()
        out.sum().backward(retain_graph=True)
        assert all(
            p.grad is not None for n, p in reading.named_parameters() if "layer.0.attention" in n
        )
    assert (
        x.grad is not None
    )  # what stands before the Q-Former, and the words, have their turn as well
    reading.zero_grad()
    reading.read(x, keep[:0], text).sum().backward()
    assert reading.text.words.weight.grad is not None


@pytest.mark.parametrize(
    ("per", "clip"), [("frame", [0, 0, 1, 2, 2]), ("clip", [0, 1, 2]), ("window", [0, 0, 1, 2, 2])]
)
def test_units_are_what_the_queries_read_at_a_time(per: str, clip: list[int]) -> None:
    reading = qformer(per=per, **({"seconds": 1.0} if per == "window" else {}))
    tokens = clips()
    x, keep, owner = reading.units(tokens)
    assert owner.tolist() == clip
    made = reading({"video": tokens})["video"]
    torch.testing.assert_close(
        made.x[made.mask].unflatten(0, (len(clip), -1)), reading.read(x, keep)
    )


def retrieval_model(folder: Path) -> Blip2ForImageTextRetrieval:
    """A tiny BLIP-2 of the first stage with random weights, and its tokenizer."""
    from tokenizers import Tokenizer, models

    vision = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    text = {
        "use_qformer_text_input": True,
        "vocab_size": VOCABULARY,
        "cross_attention_frequency": 2,
    }
    config = Blip2Config(
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        qformer_config=sizes | text | {"encoder_hidden_size": WIDTH},
        num_query_tokens=4,
    )
    torch.manual_seed(5)
    model = Blip2ForImageTextRetrieval(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(folder)
    vocabulary = {f"w{i}": i for i in range(VOCABULARY - 2)} | {
        "[CLS]": VOCABULARY - 2,
        "[DEC]": VOCABULARY - 1,
    }
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    PreTrainedTokenizerFast(
        tokenizer_object=core, cls_token="[CLS]", bos_token="[DEC]", unk_token="w0"
    ).save_pretrained(folder)
    return model


def test_blip2_of_the_first_stage_says_the_same(tmp_path: Path) -> None:
    theirs = retrieval_model(tmp_path)
    ours = qformer(init=str(tmp_path))
    ours.load_init()
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(6))
    (ids, mask), cls = words(2), torch.full((2, 1), VOCABULARY - 2)
    mask[1, 3:] = False
    asked = {"pixel_values": pixels, "input_ids": torch.cat([cls, ids], 1)}
    asked["attention_mask"] = F.pad(mask.long(), (1, 0), value=1)
    with torch.no_grad():
        features = theirs.vision_model(pixels).last_hidden_state
        seen = torch.ones(features.shape[:2], dtype=torch.bool)
        text = ours.text.embed(ids, mask, READ)
        match = ours.text.match(ours.read(features, seen, text)[:, :4]).mean(1)
        expected = theirs(**asked, use_image_text_matching_head=True).logits_per_image
        torch.testing.assert_close(match, expected, atol=1e-5, rtol=1e-5)
        queries = F.normalize(ours.text.query_projection(ours.read(features, seen)), dim=-1)
        said = F.normalize(ours.text.text_projection(ours.read_text(text)[:, 0]), dim=-1)
        expected = theirs(**asked, use_image_text_matching_head=False).logits_per_image
        torch.testing.assert_close(torch.einsum("bqe,te->btq", queries, said).amax(-1), expected)
        dec = theirs.embeddings.word_embeddings.weight[VOCABULARY - 1]
        assert torch.equal(ours.text.begin[WRITE], dec)


def test_what_a_checkpoint_gives_depends_on_what_is_there(tmp_path: Path) -> None:
    theirs = retrieval_model(tmp_path / "retrieval")
    without = qformer(None, init=str(tmp_path / "retrieval"))
    without.load_init()
    assert torch.equal(without.query_tokens, theirs.query_tokens)
    by_llm = qformer("llm", init=str(tmp_path / "retrieval"))
    by_llm.load_init()
    assert torch.equal(by_llm.text.match.weight, theirs.itm_head.weight)
    with pytest.raises(
        ValueError, match=r"words.weight \(30, 16\), this Q-Former's \(29, 16\); give text: 30"
    ):
        qformer(29, init=str(tmp_path / "retrieval")).load_init()
    config = theirs.config
    config.qformer_config.use_qformer_text_input = False
    config.text_config.update(
        {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}
    )
    config.text_config.update(
        {"vocab_size": 30, "word_embed_proj_dim": 16, "max_position_embeddings": 16}
    )
    Blip2ForConditionalGeneration(config).save_pretrained(tmp_path / "second")
    with pytest.raises(
        ValueError, match="is a Blip2ForConditionalGeneration, which has no text side"
    ):
        load_blip2(str(tmp_path / "second"), with_text=True)


def test_only_the_tensors_of_the_qformer_are_read(tmp_path: Path) -> None:
    theirs = retrieval_model(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    needed = (
        "qformer.",
        "query_tokens",
        "embeddings.",
        "itm_head.",
        "text_projection.",
        "vision_projection.",
    )
    part = {key: x for key, x in state.items() if key.startswith(needed)}
    assert len(part) < len(state)
    save_file(part, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = qformer(init=str(tmp_path))
    ours.load_init()
    assert torch.equal(ours.query_tokens, theirs.query_tokens)


def test_only_the_shards_that_hold_them_are_opened(tmp_path: Path) -> None:
    theirs = retrieval_model(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    rest = {key: "rest.safetensors" for key in state if key.startswith("vision_model.")}
    places = dict.fromkeys(state.keys() - rest.keys(), "qformer.safetensors") | rest
    save_file(
        {key: state[key] for key in state.keys() - rest.keys()}, tmp_path / "qformer.safetensors"
    )
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    ours = qformer(init=str(tmp_path))
    ours.load_init()  # rest.safetensors does not exist
    assert torch.equal(ours.query_tokens, theirs.query_tokens)


@pytest.mark.parametrize(
    "edit",
    [
        lambda s: s.pop("query_tokens"),
        lambda s: s.pop("qformer.encoder.layer.0.attention.attention.key.weight"),
        lambda s: s.update({"qformer.odd": torch.zeros(1)}),
        lambda s: s["query_tokens"].fill_(float("nan")),
        lambda s: s.pop("itm_head.weight"),
        dict.clear,
    ],
)
def test_an_incomplete_qformer_is_refused(tmp_path: Path, edit: Any) -> None:
    retrieval_model(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    edit(state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError):
        qformer(init=str(tmp_path)).load_init()


def test_another_model_or_number_of_heads_is_refused(tmp_path: Path) -> None:
    retrieval_model(tmp_path / "blip2")
    with pytest.raises(UserError, match="2 heads"):
        qformer(init=str(tmp_path / "blip2"), heads=4).load_init()
    with pytest.raises(UserError, match="expected one of Blip2"):
        qformer(None, init=str(make_siglip(tmp_path / "siglip"))).load_init()


def test_text_picked_and_blank() -> None:
    text = Text(
        torch.arange(12.0).view(2, 3, 2), torch.tensor([[True, True, False], [True, True, True]])
    )
    picked = text.pick(torch.tensor([1, 0, 1]))
    assert torch.equal(picked.x[1], text.x[0])
    assert picked.mask.tolist()[1] == [True, True, False]
    blank = text.pick(torch.zeros(0, dtype=torch.long)).blank()
    assert torch.equal(blank.x, torch.zeros(1, 3, 2))
    assert blank.mask.all()
