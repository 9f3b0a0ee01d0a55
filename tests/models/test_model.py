"""The composed model on real files: places, labels, masks, generation, checkpoints."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from tiny import RATE, World, make_tokenizer, make_world
from transformers import AutoProcessor

from avllm.config_model import ModelConfig
from avllm.config_peft import LoraConfig
from avllm.data.media.load import Clip, Sound
from avllm.data.row import IGNORE
from avllm.data.schema import RowError, Sample
from avllm.evaluation.listing import inspect_checkpoint
from avllm.models.attention import block_mask
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.checkpoint import mark_trained, save_checkpoint
from avllm.models.checkpoint_format import CheckpointError, find_backbone
from avllm.models.loading.digests import ALL_FILES, write_manifest
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.tokens import Tokens

QUERIES = 3
QFORMER = {"dim": 16, "layers": 2, "heads": 2, "cross_every": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=4)


def description(world: World, **changes: object) -> ModelConfig:
    connector = [
        {"type": "position", "stream": "video"},
        {"type": "temporal_pool", "stream": "video", "tokens": "mean"},
        {"type": "mlp", "stream": "video"},
        {
            "type": "qformer",
            "stream": "audio",
            "per": "window",
            "seconds": 0.5,
            "num_queries": QUERIES,
        }
        | QFORMER,
        {"type": "linear", "stream": "audio"},
    ]
    settings = world.model | {
        "connector": connector,
        "layout": {"type": "interleave"},
        "sampling": {"num_frames": 4},
    }
    return ModelConfig.model_validate(settings | changes)


def compose(settings: ModelConfig) -> tuple[AVLLM, AVProcessor]:
    torch.manual_seed(1)
    tokenizer, ids = load_tokenizer(settings)
    model = AVLLM.from_backbones(settings, ids).eval()
    return model, AVProcessor.from_model(model, tokenizer)


@pytest.fixture(scope="module")
def built(world: World) -> tuple[AVLLM, AVProcessor]:
    return compose(description(world))


def sample(*content: dict[str, object] | str, answer: str | None = "red", id: str = "s") -> Sample:
    parts = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    messages = [{"role": "user", "content": parts}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return Sample.model_validate({"id": id, "messages": messages})


def video(name: str = "000.mp4", **options: object) -> dict[str, object]:
    return {"type": "video", "video": name, **options}


def rows(processor: AVProcessor, world: World, samples: list[Sample], answer: bool = True) -> list:
    root = world.captions.parent
    return [
        processor.row(
            s, [processor.prepare(c) for c in processor.load_clips(s.media, root)], answer=answer
        )
        for s in samples
    ]


MIX = [
    sample(video(), "what colour is it ?", id="both"),
    sample(video(sound="off"), "what colour is it ?", id="seen"),
    sample(
        {"type": "audio", "audio": "000.mp4"},
        "do you hear a low sound ?",
        answer="low sound",
        id="heard",
    ),
    sample("yes or no ?", answer="yes", id="text"),
    sample(video("002.mp4"), "what ?", answer="nothing", id="mute"),
]


def test_media_tokens_stand_in_their_places(built: tuple[AVLLM, AVProcessor], world: World) -> None:
    model, processor = built
    made = rows(processor, world, MIX)
    batch = processor.collate(made)
    embeds, streams = model.embed(batch), model.media_tokens(batch)
    for name, token_id in model.config.media_token_ids.items():
        in_order = streams[name].x[streams[name].mask]
        assert torch.equal(embeds[batch.input_ids == token_id], in_order)
    text = ~batch.input_ids.ge(min(model.config.media_token_ids.values()))
    assert torch.equal(embeds[text], model.llm.get_input_embeddings()(batch.input_ids[text]))
    assert processor.describe(made[0]) | {"text": 0} == {
        "text": 0,
        "video": 4,
        "audio": 2 * QUERIES,
    }
    assert set(processor.describe(made[1])) == {"text", "video"}
    assert set(processor.describe(made[2])) == {"text", "audio"}
    assert set(processor.describe(made[3])) == {"text"}
    assert set(processor.describe(made[4])) == {"text", "video"}, (
        "a clip without a sound track has no audio tokens"
    )


def test_interleaved_by_time(built: tuple[AVLLM, AVProcessor], world: World) -> None:
    model, processor = built
    ids = model.config.media_token_ids
    row = rows(processor, world, MIX[:1])[0]
    names = {v: k for k, v in ids.items()}
    order = [names[int(i)] for i in row.input_ids if int(i) in names]
    audio = ["audio"] * QUERIES
    assert order == ["video", *audio, "video", "video", *audio, "video"]


def test_labels_are_the_answers_and_nothing_else(
    built: tuple[AVLLM, AVProcessor], world: World
) -> None:
    _, processor = built
    turns = Sample.model_validate(
        {
            "id": "turns",
            "messages": [
                {
                    "role": "user",
                    "content": [video(), {"type": "text", "text": "what colour is it ?"}],
                },
                {"role": "assistant", "content": "red"},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "low or high ?"}, video("001.mp4")],
                },
                {"role": "assistant", "content": "high sound"},
            ],
        }
    )
    row = rows(processor, world, [turns])[0]
    trained = row.labels != IGNORE
    assert torch.equal(row.labels[trained], row.input_ids[trained])
    tokens = processor.tokenizer.convert_ids_to_tokens(row.input_ids[trained].tolist())
    assert tokens == ["red", "</s>", "high", "sound", "</s>"]
    assert not bool((trained & row.is_media).any())
    assert len(row.clips) == 2


def test_a_prompt_is_the_beginning_of_its_row(
    built: tuple[AVLLM, AVProcessor], world: World
) -> None:
    _, processor = built
    for training, prompt in zip(
        rows(processor, world, MIX), rows(processor, world, MIX, answer=False), strict=True
    ):
        length = len(prompt.input_ids)
        assert torch.equal(training.input_ids[:length], prompt.input_ids)
        assert bool((training.labels[:length] == IGNORE).all())
        assert int(training.labels[length]) != IGNORE


def test_a_batch_is_its_rows_one_by_one(built: tuple[AVLLM, AVProcessor], world: World) -> None:
    model, processor = built
    made = rows(processor, world, MIX)
    with torch.no_grad():
        together = model(processor.collate(made)).logits
        for i, row in enumerate(made):
            alone = model(processor.collate([row])).logits[0]
            torch.testing.assert_close(
                together[i, : len(row.input_ids)], alone, atol=1e-5, rtol=1e-4
            )


def test_logits_at_kept_positions(built: tuple[AVLLM, AVProcessor], world: World) -> None:
    model, processor = built
    batch = processor.collate(rows(processor, world, MIX))
    keep = torch.tensor([3, 7, 11])
    with torch.no_grad():
        torch.testing.assert_close(model(batch, keep=keep).logits, model(batch).logits[:, keep])


def test_clips_change_places_with_their_embeddings(
    built: tuple[AVLLM, AVProcessor], world: World
) -> None:
    model, processor = built
    first, second = video("000.mp4", sound="off"), video("001.mp4", sound="off")
    a, b = rows(
        processor, world, [sample(first, "and", second, "?"), sample(second, "and", first, "?")]
    )
    with torch.no_grad():
        x, y = (model.embed(processor.collate([r]))[0] for r in (a, b))
    assert torch.equal(a.input_ids, b.input_ids)
    places = a.is_media.nonzero().flatten()
    one, two = places[:4], places[4:]
    torch.testing.assert_close(x[one], y[two])
    torch.testing.assert_close(x[two], y[one])
    assert torch.equal(x[~a.is_media], y[~a.is_media])


def test_an_absent_stream_has_no_influence(built: tuple[AVLLM, AVProcessor], world: World) -> None:
    """A blank unit that only keeps processes in step must not change a number."""
    model, processor = built
    made = rows(processor, world, [MIX[1], MIX[3]])
    with torch.no_grad():
        plain = model(processor.collate(made)).logits
        blank = processor.collate(made, blanks=True)
        assert set(blank.streams) == {"audio", "video"}
        assert not bool(blank.streams["audio"].mask.any())
        assert torch.equal(model(blank).logits, plain)


def test_blanks_put_every_parameter_into_the_graph(
    built: tuple[AVLLM, AVProcessor], world: World
) -> None:
    model, processor = built
    batch = processor.collate(rows(processor, world, [MIX[3]]), blanks=True)
    model.zero_grad()
    model(batch).logits.sum().backward()
    assert all(p.grad is not None for p in model.connector.parameters())
    assert all(bool((p.grad == 0).all()) for p in model.connector.parameters())


def test_wrong_number_of_media_tokens_is_named(
    built: tuple[AVLLM, AVProcessor], world: World
) -> None:
    model, processor = built
    batch = processor.collate(rows(processor, world, MIX[:2]))
    streams = model.connect(model.encode_media(batch.streams))
    fewer = streams["video"].mask.clone()
    fewer[1, 0] = False
    cut = streams | {"video": Tokens(streams["video"].x, fewer, streams["video"].span)}
    with pytest.raises(
        ValueError, match=r"row 'seen': 4 <\|video\|> tokens but the connector made 3"
    ):
        model.merge_media(batch.input_ids, cut, batch)


def test_a_row_with_too_many_and_one_with_too_few_are_named(
    built: tuple[AVLLM, AVProcessor], world: World
) -> None:
    model, processor = built
    batch = processor.collate(rows(processor, world, MIX[:2]))
    tokens = model.connect(model.encode_media(batch.streams))["video"]
    mask = torch.nn.functional.pad(tokens.mask, (0, 0, 0, 1))
    mask[0, 3], mask[1, 4] = False, True  # the sums agree
    x, span = (
        torch.nn.functional.pad(tokens.x, (0, 0, 0, 0, 0, 1)),
        torch.nn.functional.pad(tokens.span, (0, 0, 0, 1)),
    )
    moved = {**model.connect(model.encode_media(batch.streams)), "video": Tokens(x, mask, span)}
    with pytest.raises(
        ValueError, match=r"row 'both': 4 <\|video\|> tokens but the connector made 3"
    ):
        model.merge_media(batch.input_ids, moved, batch)


def test_a_stream_without_a_placeholder_is_named(world: World) -> None:
    audio = {**world.model["encoders"]["audio"], "layers": [1, -1]}
    connector = [{"type": "linear", "stream": s} for s in ("video", "audio", "audio.1")]
    encoders = {**world.model["encoders"], "audio": audio}
    with pytest.raises(ValueError, match=r"\['audio\.1'\]"):
        compose(description(world, connector=connector, encoders=encoders))


def test_a_layout_of_streams_that_are_not_there_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match="'vidoe'"):
        compose(description(world, layout={"type": "concat", "streams": ["vidoe", "audio"]}))


def test_sound_that_must_be_heard_needs_an_ear(world: World) -> None:
    encoders = {"video": world.model["encoders"]["video"]}
    connector = [{"type": "linear", "stream": "video"}]
    _, processor = compose(description(world, connector=connector, encoders=encoders))
    assert len(rows(processor, world, [sample(video(), "what ?")])) == 1
    with pytest.raises(RowError) as error:
        rows(processor, world, [sample(video(sound="on"), "what ?")])
    assert error.value.reason == "no_encoder"


def test_a_video_of_which_an_ear_gets_nothing_is_refused(world: World) -> None:
    encoders = {"audio": world.model["encoders"]["audio"]}
    connector = [{"type": "linear", "stream": "audio"}]
    _, processor = compose(description(world, connector=connector, encoders=encoders))
    assert len(rows(processor, world, [sample(video(), "what ?")])) == 1
    for silent in (video("002.mp4"), video(sound="off")):
        with pytest.raises(RowError) as error:
            rows(processor, world, [sample(silent, "what ?")])
        assert error.value.reason == "no_encoder"
        assert Path(str(silent["video"])).name in error.value.detail


@pytest.mark.parametrize("text", ["<Video>", "{media}{media}"])
def test_the_text_around_media_holds_it_once(world: World, text: str) -> None:
    with pytest.raises(ValueError, match="once"):
        compose(description(world, media_text={"video": text}))


# as Qwen3's: the last answer alone stands behind (empty) thoughts
THINKING = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ' ' }}"
    "{% if m['role'] == 'assistant' and loop.last %}"
    "{{ 'nothing : ' }}{% endif %}{{ m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant ' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
)


def test_templates_that_drop_earlier_thoughts_or_refuse_a_role(world: World) -> None:
    _, processor = compose(description(world))
    turns = [("user", "what ?"), ("assistant", "red"), ("user", "what ?"), ("assistant", "blue")]
    talk = Sample.model_validate(
        {"id": "t", "messages": [{"role": r, "content": c} for r, c in turns]}
    )
    processor.tokenizer.chat_template = THINKING
    row = processor.row(talk, [])
    trained = processor.tokenizer.decode(row.labels[row.labels != IGNORE])
    assert trained.split() == [
        "blue",
        "</s>",
    ]  # "red" does not follow its prompt here, see EachTurn
    prompt = processor.row(talk, [], answer=False).input_ids
    assert row.input_ids[: len(prompt)].tolist() == prompt.tolist()
    processor.tokenizer.chat_template = NO_SYSTEM + THINKING
    messages = [{"role": "system", "content": "describe"}, *talk.model_dump()["messages"]]
    with pytest.raises(RowError) as error:
        processor.row(Sample.model_validate({"id": "t", "messages": messages}), [])
    assert error.value.reason == "chat_template"


def test_rows_that_cannot_be_made(built: tuple[AVLLM, AVProcessor], world: World) -> None:
    _, processor = built
    with pytest.raises(RowError) as caught:
        rows(processor, world, [sample(video(), "what ?", answer="  ")])
    assert caught.value.reason == "empty_answer"
    with pytest.raises(RowError) as caught:
        rows(processor, world, [sample("what is \x01 ?")])
    assert caught.value.reason == "reserved_text"
    processor.max_length = 10
    try:
        with pytest.raises(RowError, match="10") as caught:
            rows(processor, world, MIX[:1])
    finally:
        processor.max_length = 2048
    assert caught.value.reason == "too_long"


def test_long_sound_is_heard_to_its_end(built: tuple[AVLLM, AVProcessor]) -> None:
    _, processor = built
    clip = Clip(frames=None, sound=Sound(torch.randn(int(3.3 * RATE)), RATE, 0.0), duration=3.3)
    prepared = processor.prepare(clip)["audio"]
    assert len(prepared.inputs["input_features"]) == 4, "windows of one second cover 3.3 s"
    assert math.isclose(float(prepared.span[-1, 1]), 3.3, abs_tol=1e-4)
    assert len(processor.order({"audio": prepared})) == 7 * QUERIES


LLMS = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "mistral": {"sliding_window": None},
}


def make_llm(kind: str, folder: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer(folder)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **sizes, **tokens, num_key_value_heads=1, **LLMS[kind])
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", LLMS)
def test_batched_answers_are_single_answers(kind: str, world: World, tmp_path: Path) -> None:
    model, processor = compose(
        description(world, llm={"name": str(make_llm(kind, tmp_path / kind))})
    )
    prompts = rows(processor, world, MIX, answer=False)
    options = {"max_new_tokens": 6, "min_new_tokens": 6}
    together = model.generate(processor.collate(prompts, padding_side="left"), **options)
    for i, row in enumerate(prompts):
        alone = model.generate(processor.collate([row], padding_side="left"), **options)
        assert torch.equal(together[i], alone[0])
    uncached = model.generate(
        processor.collate(prompts, padding_side="left"), use_cache=False, **options
    )
    assert torch.equal(together, uncached)


def test_generated_tokens_are_the_arg_max(built: tuple[AVLLM, AVProcessor], world: World) -> None:
    model, processor = built
    prompt = rows(processor, world, MIX[:1], answer=False)
    batch = processor.collate(prompt, padding_side="left")
    first = model.generate(batch, max_new_tokens=1)[0, 0]
    with torch.no_grad():
        assert int(model(batch).logits[0, -1].argmax()) == int(first)


@pytest.mark.parametrize("lora", [False, True])
def test_checkpoint_round_trip(world: World, tmp_path: Path, lora: bool) -> None:
    model, processor = compose(description(world))
    if lora:
        model.add_lora(LoraConfig(r=2)).freeze()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        model.eval()
    mark_trained(model)
    processor.max_length, processor.timeout = 4096, 7.0
    save_checkpoint(model, processor, tmp_path, [{"stage": "align"}])
    again, its_processor = AVLLM.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(its_processor, AVProcessor)
    assert (its_processor.max_length, its_processor.timeout) == (4096, 7.0)
    batch, its_batch = (p.collate(rows(p, world, MIX)) for p in (processor, its_processor))
    assert torch.equal(batch.input_ids, its_batch.input_ids)
    with torch.no_grad():
        assert torch.equal(model(batch).logits, again(its_batch).logits)
    assert (tmp_path / "lora" / "default" / "adapter_model.safetensors").is_file() == lora


def test_an_encoder_that_trained_is_kept_whole(world: World, tmp_path: Path) -> None:
    model, processor = compose(description(world))
    model.encoders["audio"].requires_grad_(True)
    mark_trained(model)
    with torch.no_grad():
        for parameter in model.encoders["audio"].parameters():
            parameter.add_(0.01)
    save_checkpoint(model, processor, tmp_path, [])
    again = AVLLM.from_pretrained(tmp_path)
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_damaged_checkpoints_are_refused(world: World, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, processor = compose(description(world))
    save_checkpoint(model, processor, tmp_path, [])
    state = load_file(tmp_path / "trained.safetensors")
    first, *others = state
    save_file({k: state[k] for k in others}, tmp_path / "trained.safetensors")
    with pytest.raises(CheckpointError) as differs:
        AVLLM.from_pretrained(tmp_path)
    assert differs.value.reason == "files_differ"
    write_manifest(tmp_path, ALL_FILES)
    with pytest.raises(CheckpointError, match="missing") as caught:
        AVLLM.from_pretrained(tmp_path)
    assert first in str(caught.value)
    save_file(state | {"connector.9.weight": torch.ones(1)}, tmp_path / "trained.safetensors")
    write_manifest(tmp_path, ALL_FILES)
    with pytest.raises(CheckpointError, match=r"unexpected \['connector\.9\.weight'\]"):
        AVLLM.from_pretrained(tmp_path)


def test_arguments_that_would_do_nothing_are_refused(world: World, tmp_path: Path) -> None:
    model, processor = compose(description(world))
    model.config.trained = ["connector", "llm"]
    save_checkpoint(model, processor, tmp_path, [])
    with pytest.raises(
        CheckpointError, match=r"no backbone encoder\.audio; it has llm, encoders\.audio"
    ):
        AVLLM.from_pretrained(tmp_path, backbones={"encoder.audio": "x"})
    with pytest.raises(CheckpointError, match="leave quantize out"):
        AVLLM.from_pretrained(tmp_path, quantize="4bit")


def test_a_checkpoint_is_read_from_any_folder_and_moves_with_its_backbones(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "runs" / "llm").parent.mkdir(parents=True)
    shutil.copytree(world.llm, tmp_path / "here" / "runs" / "llm")
    monkeypatch.chdir(tmp_path / "here")
    model, processor = compose(description(world, llm={"name": "runs/llm"}))
    save_checkpoint(model, processor, "runs/stage", [])
    monkeypatch.chdir(tmp_path)
    AVLLM.from_pretrained("here/runs/stage")
    (tmp_path / "here").rename(tmp_path / "there")
    AVLLM.from_pretrained("there/runs/stage")
    assert inspect_checkpoint("there/runs/stage")["backbones"]["llm"]["found"] is True
    (tmp_path / "there" / "runs" / "llm").rename(tmp_path / "there" / "runs" / "gone")
    with pytest.raises(CheckpointError, match="llm', which is not there any more; looked for in /"):
        AVLLM.from_pretrained("there/runs/stage")


def test_a_folder_of_a_backbones_name_is_not_taken_for_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right one beside the checkpoint goes before another; no folder is a hub's name."""
    monkeypatch.chdir(shutil.copytree(world.llm, tmp_path / "here" / "llm").parent)
    model, processor = compose(description(world, llm={"name": "llm"}))
    save_checkpoint(model, processor, "stage", [])
    torch.manual_seed(9)
    make_llm("llama", tmp_path / "elsewhere" / "llm")
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = AVLLM.from_pretrained("../here/stage")
    assert Path(str(found.config.llm["name"])).resolve() == tmp_path / "here" / "llm"
    hub = {"name": "llm", "sha256": None, "place": None}
    assert find_backbone(hub, tmp_path / "here" / "stage") == "llm"


def test_a_damaged_manifest_is_named(world: World, tmp_path: Path) -> None:
    save_checkpoint(*compose(description(world)), tmp_path, [])
    (tmp_path / "manifest.json").write_text('{"format": 1, "back')
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        AVLLM.from_pretrained(tmp_path)


def test_another_backbone_is_refused(world: World, tmp_path: Path) -> None:
    llm = shutil.copytree(world.llm, tmp_path / "llm")
    model, processor = compose(description(world, llm={"name": str(llm)}))
    save_checkpoint(model, processor, tmp_path / "run", [])
    torch.manual_seed(9)
    make_llm("llama", llm)
    with pytest.raises(CheckpointError, match="trained on other weights"):
        AVLLM.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantised_llm_trains_and_answers_after_an_evaluation(kind: str, world: World) -> None:
    pytest.importorskip("bitsandbytes")
    model, processor = compose(description(world, llm={"name": str(world.llm), "quantize": kind}))
    model.add_lora(LoraConfig(r=2)).freeze()
    batch = processor.collate(rows(processor, world, MIX))
    model.eval()
    with torch.no_grad():  # the forward that would repack the weights for good
        before = model(batch).logits
    model.generate(
        processor.collate(rows(processor, world, MIX, answer=False), padding_side="left"),
        max_new_tokens=2,
    )
    model.train()
    loss = torch.nn.functional.cross_entropy(
        model(batch).logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()
    )
    loss.backward()
    norms = {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}
    assert all(math.isfinite(v) for v in norms.values())
    assert any(v > 0 for n, v in norms.items() if "lora_B" in n)
    assert any(v > 0 for n, v in norms.items() if n.startswith("connector"))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(batch).logits, before)


def test_block_mask_by_hand() -> None:
    shared, one, two, other, pad = [0, 0], [0, 1], [0, 2], [1, 0], [-1, -1]
    seen = (
        block_mask(torch.tensor([[shared, shared, one, two, two, other, pad]]), torch.float32)[0, 0]
        == 0
    )
    expected = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0],
            [1, 1, 0, 1, 0, 0, 0],
            [1, 1, 0, 1, 1, 0, 0],
            [0, 0, 0, 0, 0, 1, 0],
            [0, 0, 0, 0, 0, 0, 1],
        ]
    )
    assert torch.equal(seen, expected.bool())


def test_frozen_encoders_stay_in_eval_mode(built: tuple[AVLLM, AVProcessor]) -> None:
    model, _ = built
    model.train()
    assert model.connector.training
    assert not model.encoders["video"].training
    model.eval()


def test_adapters_in_which_nothing_trains_stay_in_eval_mode(world: World) -> None:
    qformer = {
        "type": "qformer",
        "stream": "video",
        "num_queries": 2,
        "dim": 8,
        "layers": 1,
        "heads": 2,
    }
    projections = [{"type": "linear", "stream": "video"}, {"type": "linear", "stream": "audio"}]
    model, _ = compose(description(world, connector=[qformer, *projections]))
    frozen, trained, _ = model.connector
    frozen.requires_grad_(False)
    model.train()
    assert not any(module.training for module in frozen.modules())
    assert all(module.training for module in trained.modules())
    frozen.requires_grad_(True)
    assert model.train().connector[0].training
