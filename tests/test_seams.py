"""Use a part of one's own at each seam: a module in a folder, named `pkg.module:Class`.

Nothing of the package is edited. A seam is proven end to end at tiny size: settings are built, rows
read, a model run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import World, make_world, row, settings, text, write_rows
from tiny_runs import losses, run

from avllm.config import RunConfig
from avllm.config_model import ModelConfig
from avllm.data.dataset import SampleDataset
from avllm.data.manifest import read_manifest
from avllm.data.reading import MediaReader
from avllm.data.schema import Sample
from avllm.errors import UserError
from avllm.evaluation import asking
from avllm.evaluation.command import run_eval
from avllm.evaluation.conditions import AS_IS, Condition
from avllm.evaluation.runner import evaluate, evaluate_all
from avllm.inference.chat import Chat
from avllm.inference.generation import Generation
from avllm.models.attention import PackingError, check_packing
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.checkpoint import save_checkpoint
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.training.start import build_datasets, build_parts, padding

torch.set_num_threads(1)
Own = Callable[[str], str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny world for all seams."""
    return make_world(tmp_path_factory.mktemp("world"), clips=4)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Own:
    """Write a module outside of the package, in a package of each test; returns its name."""
    package = f"parts_of_{request.node.name.partition('[')[0]}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(source: str) -> str:
        (tmp_path / package / "own.py").write_text(source, encoding="utf-8")
        return f"{package}.own"

    return write


def compose(world: World, **changes: Any) -> tuple[AVLLM, AVProcessor]:
    """Build a model and its processor out of the tiny world's settings with some changed."""
    description = ModelConfig.model_validate(world.model | changes)
    tokenizer, ids = load_tokenizer(description)
    torch.manual_seed(0)
    model = AVLLM.from_backbones(description, ids).eval()
    return model, AVProcessor.from_model(model, tokenizer)


def read(world: World, processor: AVProcessor, manifest: Path | None = None) -> Any:
    """Read the rows of a manifest as one batch."""
    path = manifest or world.captions
    return processor(read_manifest(path), path.parent, answer=True)


ADAPTER = '''
import torch
from torch import nn
from avllm.adapters.base import StreamAdapter


class Scaled(StreamAdapter):
    """Each feature times a number that trains."""

    def __init__(self, widths, llm_dim, *, stream, start=1.0):
        super().__init__(widths, llm_dim, stream)
        self.scale = nn.Parameter(torch.full((self.in_dim,), start))

    def adapt(self, tokens, prompt=None):
        return tokens.with_x(tokens.x * self.scale)
'''


def test_adapter(world: World, own: Own, tmp_path: Path) -> None:
    module = own(ADAPTER)
    scaled = {"type": f"{module}:Scaled", "stream": "video", "start": 2.0}
    model = world.model | {"connector": [scaled, *world.model["connector"]]}
    run(settings(world, tmp_path / "run", model=model, train__max_steps=2))
    trained = AVLLM.from_pretrained(str(tmp_path / "run"), allow_parts=[scaled["type"]])
    scale = trained.connector[0].scale
    assert scale.shape == (16,)
    assert not torch.equal(
        scale, torch.full((16,), 2.0)
    )  # it trained, and came back out of the checkpoint


ENCODER = '''
import torch
from torch import nn
from transformers import PretrainedConfig

from avllm.encoders.base import Encoder, part_name
from avllm.tokens import EncoderInput


class ColourReader:
    """The mean colour of each frame."""

    medium = "video"

    def __call__(self, media, duration):
        colour = media.x.float().mean((1, 2)) / 255  # (T, 3)
        real = torch.ones(len(colour), 1, dtype=torch.bool)
        return EncoderInput({"colour": colour}, media.span, real)

    def settings(self):
        return {"part": part_name(self)}

    @classmethod
    def from_settings(cls, settings):
        return cls()


class Colour(Encoder):
    """One token a frame: its mean colour."""

    medium = "video"
    layer_names = [""]
    out_dims = {"": 3}
    out_dim = 3

    def __init__(self, config, *, gain=1.0):
        super().__init__()
        self.backbone_config = PretrainedConfig()
        self.gain = nn.Parameter(torch.tensor(gain))

    def options(self):
        return {"gain": self.gain.item()}

    def preprocessor(self):
        return ColourReader()

    def forward(self, colour):
        return {"": (colour * self.gain)[:, None, None]}  # (U, 1, 1, 3)
'''


def test_encoder(world: World, own: Own, tmp_path: Path) -> None:
    module = own(ENCODER)
    colour = {"medium": "video", "type": f"{module}:Colour", "config": {}, "gain": 2.0}
    encoders = {"colour": colour, "audio": world.model["encoders"]["audio"]}
    connector = [{"type": "linear", "stream": stream} for stream in encoders]
    model, processor = compose(world, encoders=encoders, connector=connector)
    batch = read(world, processor)
    red = batch.streams["colour"].inputs["colour"][0] * 255
    assert torch.allclose(red, torch.tensor([220.0, 30.0, 30.0]), atol=6)
    save_checkpoint(model, processor, tmp_path / "saved", [])
    allowed = [f"{module}:Colour", f"{module}:ColourReader"]
    again = AVLLM.from_pretrained(str(tmp_path / "saved"), allow_parts=allowed)
    reader = AVProcessor.from_pretrained(tmp_path / "saved", allow_parts=allowed)
    assert torch.equal(again(read(world, reader)).logits, model(batch).logits)


LAYOUT = '''
from avllm.layouts.base import Layout


class Backwards(Layout):
    """The connector's streams in reverse order."""

    def order(self, grids):
        return [name for name in reversed(list(grids)) for _ in range(grids[name].places)]
'''


def test_layout(world: World, own: Own) -> None:
    _, forwards = compose(world)
    model, backwards = compose(world, layout={"type": f"{own(LAYOUT)}:Backwards"})
    one, other = (
        MediaReader(p).inputs(read_manifest(world.captions)[0].media, world.captions.parent)[0]
        for p in (forwards, backwards)
    )
    order, reverse = forwards.order(one), backwards.order(other)
    assert order != reverse
    assert sorted(order) == sorted(reverse)
    assert order[0] == reverse[-1]
    assert torch.isfinite(model(read(world, backwards)).logits).all()


OBJECTIVE = '''
from avllm.objectives.base import Objective


class Small(Objective):
    """Make the connector's tokens small: mean square of each row's."""

    by_row = True

    def __init__(self, model, *, strength=1.0):
        super().__init__(model)
        self.strength = strength

    def weight(self, batch):
        return float(len(batch.ids))

    def forward(self, model, batch):
        tokens = model.media_tokens(batch)
        squares = [t.x.square().mul(t.mask[..., None]).sum() for t in tokens.values()]
        return self.strength * sum(squares), {}
'''


def test_objective(world: World, own: Own, tmp_path: Path) -> None:
    small = {"type": f"{own(OBJECTIVE)}:Small", "strength": 0.5}
    run(settings(world, tmp_path / "run", objectives=[small], train__max_steps=6, train__warmup=0))
    first, *_, last = losses(tmp_path / "run")
    assert last < first


BENCHMARK = '''
from pathlib import Path

from avllm.data.schema import Sample
from avllm.evaluation.benchmarks.base import Benchmark, Score


class Lengths(Benchmark):
    """Asks what is in each clip of a folder; long answers are good ones."""

    def __init__(self, *, data, question="what colour is it ?"):
        self.folder, self.question = Path(data), question

    @property
    def root(self):
        return self.folder

    def samples(self):
        return [self.sample(path.name) for path in sorted(self.folder.glob("*.mp4"))]

    def sample(self, name):
        content = [{"type": "video", "video": name}, {"type": "text", "text": self.question}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
        return Sample.model_validate({"id": name, "messages": messages})

    def score(self, sample, answer, duration):
        return Score(values={"letters": float(len(answer))})

    def figures(self, predictions):
        return {"longest": max(p.score.values["letters"] for p in predictions)}
'''


def test_benchmark(world: World, own: Own, tmp_path: Path) -> None:
    save_checkpoint(*compose(world), tmp_path / "saved", [])
    figures = run_eval(
        tmp_path / "saved",
        benchmark=f"{own(BENCHMARK)}:Lengths",
        data=world.captions.parent,
        options=["question=describe the clip"],
        max_new_tokens=4,
    )["conditions"]["as_is"]["all"]
    assert figures["n"] == figures["values"]["letters"]["n"] == 4
    assert figures["corpus"]["longest"] >= figures["values"]["letters"]["mean"]


TIME_CODEC = '''
import re

from avllm.time_codecs.base import Mention, TimeCodec


class Tenths(TimeCodec):
    """Tenths of the clip, as letters: `@a` to `@k`."""

    def resolution(self, duration):
        return duration / 20

    def moment(self, seconds, duration):
        return ["@" + "abcdefghijk"[round(10 * seconds / duration)]]

    def find(self, text, duration):
        matches = re.finditer("@([a-k])", text)
        return [Mention(*m.span(), "abcdefghijk".index(m[1]) / 10 * duration) for m in matches]
'''


def test_time_codec(world: World, own: Own, tmp_path: Path) -> None:
    _, processor = compose(world, time_codec={"type": f"{own(TIME_CODEC)}:Tenths"})
    media = {"type": "video", "video": str(world.captions.parent / "000.mp4")}
    asked = row("when", [media, text("when is it red ?")], "there")
    asked["messages"][1]["content"] = [{"type": "time", "seconds": 0.5}]
    manifest = write_rows(tmp_path / "when.jsonl", [asked])
    messages = Sample.model_validate(asked).messages
    assert processor.content.write(messages, [1.0]).messages[1].text == "@f"
    assert processor.content.say_seconds("it is @c", 10.0) == "it is 2.0 s"
    assert read(world, processor, manifest).num_targets > 0


FUSION = '''
from contextlib import contextmanager

import torch
from torch import nn

from avllm.fusions.base import Fusion, decoder_layers


class AddMean(Fusion):
    """The mean of a row's tokens, added to what the LLM's first layer reads."""

    def __init__(self, widths, llm, *, streams=["audio"]):
        super().__init__(widths, llm, streams=streams)
        self.gate = nn.Parameter(torch.ones(1))

    def prepare(self, tokens, batch):
        x, mask = tokens[self.streams[0]].flat()
        mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)  # (B, D)
        rows = x.new_zeros(len(batch.input_ids), x.shape[-1]).index_add(0, batch.clip_row, mean)
        return self.gate * rows[:, None]  # (R, 1, D)

    @contextmanager
    def context(self, llm, prepared):
        def add(module, arguments):
            return (arguments[0] + prepared, *arguments[1:])

        if prepared is None:
            yield
            return
        hook = decoder_layers(llm)[0].register_forward_pre_hook(add)
        try:
            yield
        finally:
            hook.remove()
'''


def test_fusion(world: World, own: Own) -> None:
    model, processor = compose(
        world, fusion={"type": f"{own(FUSION)}:AddMean", "streams": ["audio"]}
    )
    batch = read(world, processor)
    assert "audio" not in model.config.media_token_ids or not bool(
        (batch.input_ids == model.config.media_token_ids["audio"]).any()
    )
    with torch.no_grad():
        open_gate = model(batch).logits
        model.fusion.gate.zero_()
        shut = model(batch).logits
    heard = [number for number in range(4) if bool(batch.streams["audio"].mask[number].any())]
    assert all(not torch.equal(open_gate[r], shut[r]) for r in heard)
    assert all(torch.equal(open_gate[r], shut[r]) for r in range(4) if r not in heard)


DECODER = '''
import torch
from transformers import LogitsProcessor

from avllm.decoders.base import Decoder


class Only(Decoder):
    """Says one token again and again."""

    def __init__(self, *, token):
        self.token = token

    def processors(self, model, batch):
        return [_Only(self.token)]


class _Only(LogitsProcessor):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.token]), 0.0)
'''


def test_decoder(world: World, own: Own) -> None:
    model, processor = compose(world)
    token = processor.tokenizer.convert_tokens_to_ids("green")
    spec = {"type": f"{own(DECODER)}:Only", "token": token}
    batch = processor(read_manifest(world.questions)[:2], world.questions.parent)
    arguments = Generation(max_new_tokens=3, decoding=spec).arguments(model, processor)
    assert processor.decode(model.generate(batch, **arguments)) == ["green green green"] * 2


BY_CONTENT = '''
import torch

from avllm.adapters.base import StreamAdapter
from avllm.tokens import Grid, Tokens


class Bright(StreamAdapter):
    """Keep the tokens whose first feature is above the clip's mean."""

    by_content = True

    def __init__(self, widths, llm_dim, *, stream):
        super().__init__(widths, llm_dim, stream)

    def adapt(self, tokens, prompt=None):
        x, real = tokens.flat()  # (B, N, D), (B, N)
        mean = (x[..., 0] * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
        keep = real & (x[..., 0] > mean)
        rank = torch.where(keep, 2, torch.where(real, 1, 3))  # surplus, then kept, then no place
        order = rank.argsort(dim=1, stable=True)  # (B, N)
        x = x.gather(1, order[..., None].expand_as(x))
        whole = tokens.span.new_zeros(len(x), 1, 2)
        places = {"places": real.gather(1, order)[:, None]}
        return Tokens(x[:, None], keep.gather(1, order)[:, None], whole, places)

    def grid(self, grid):
        count = int(grid.mask.sum())
        return Grid(torch.zeros(1, 2), torch.ones(1, count, dtype=torch.bool), at_most=True)
'''


def by_content(world: World, own: Own, **changes: Any) -> tuple[AVLLM, AVProcessor]:
    bright = {"type": f"{own(BY_CONTENT)}:Bright", "stream": "video"}
    return compose(world, connector=[bright, *world.model["connector"]], **changes)


def test_count_by_content(world: World, own: Own) -> None:
    """Places without a token have no effect, in a batch, alone and while an answer grows."""
    model, processor = by_content(world, own)
    rows, root = read_manifest(world.questions), world.questions.parent
    batch = processor(rows, root, answer=True)
    seen = model.visible(batch)
    surplus = batch.attention_mask & ~seen.attention_mask
    counts = surplus.sum(1)
    assert int(counts.min()) > 0
    assert len(set(counts.tolist())) > 1  # content decides
    with torch.no_grad():
        embeds, logits = model.embed(batch), model(batch).logits
        for number in range(len(rows)):
            keep = seen.attention_mask[number]
            alone = model.llm(inputs_embeds=embeds[number : number + 1, keep]).logits[0]
            assert torch.allclose(logits[number, keep], alone, atol=1e-4)
        together = processor.decode(model.generate(processor(rows, root), max_new_tokens=4))
        singly = [
            processor.decode(model.generate(processor([r], root), max_new_tokens=4))[0]
            for r in rows
        ]
    assert together == singly
    evaluated = evaluate(model, processor, world.questions, max_new_tokens=4).predictions
    assert {p.sample.id: p.answer for p in evaluated} == {
        sample.id: answer for sample, answer in zip(rows, singly, strict=True)
    }


def test_what_content_decides_is_not_sorted_by_time_nor_packed(world: World, own: Own) -> None:
    model, processor = by_content(world, own, layout={"type": "interleave"})
    with pytest.raises(UserError, match="interleave"):
        read(world, processor)
    with pytest.raises(PackingError, match="content"):
        check_packing(model)


RATES = '''
from avllm.adapters.base import StreamAdapter, variant
from avllm.data.row_makers.base import RowMaker
from avllm.tokens import Grid, Tokens


class EveryNth(StreamAdapter):
    """Keep every step, or in the variant ``half`` every second one."""

    def __init__(self, widths, llm_dim, *, stream):
        super().__init__(widths, llm_dim, stream)

    def adapt(self, tokens, prompt=None):
        n = 2 if variant() == "half" else 1
        return Tokens(tokens.x[:, ::n], tokens.mask[:, ::n], tokens.span[:, ::n])

    def grid(self, grid):
        n = 2 if variant() == "half" else 1
        return Grid(grid.span[::n], grid.mask[::n])


class BothRates(RowMaker):
    """A row at each rate."""

    has_variants = True

    def rows(self, sample, make, drawn):
        return [make(sample), make(sample, variant="half")]
'''


def test_row_maker_and_variants(world: World, own: Own, tmp_path: Path) -> None:
    module = own(RATES)
    config = settings(
        world,
        tmp_path / "run",
        data__train=str(world.questions),
        data__rows={"type": f"{module}:BothRates"},
        data__pack="both",
        train__max_steps=2,
    )
    config["model"]["connector"] = [
        {"type": f"{module}:EveryNth", "stream": "video"},
        *config["model"]["connector"],
    ]
    stage = RunConfig.model_validate(config)
    parts = build_parts(stage)
    dataset, _ = build_datasets(stage, parts)
    collate = padding(parts, blanks=False, filled=stage.data.filled_length)
    micros = collate([dataset[0], dataset[1]])
    assert [micro.batch.variant for micro in micros] == [None, "half"]
    whole, half = (
        int(parts.model.media_tokens(micro.batch)["video"].mask.sum()) for micro in micros
    )
    assert whole == 2 * half
    assert [micro.seen for micro in micros] == [micros[0].seen, 0]
    assert len(losses(run(config))) > 0


SELECTOR = '''
from dataclasses import replace

from avllm.data.selectors.base import Selector


class FirstFrames(Selector):
    """The first frame where the question says so, else all."""

    def select(self, clip, question):
        if clip.frames is None or "first" not in question:
            return clip
        frames = replace(clip.frames, x=clip.frames.x[:1], span=clip.frames.span[:1])
        return replace(clip, frames=frames)
'''


def test_selector(world: World, own: Own, tmp_path: Path) -> None:
    model, processor = compose(world, selector={"type": f"{own(SELECTOR)}:FirstFrames"})
    clip = {"type": "video", "video": str(world.captions.parent / "000.mp4")}
    asked = [
        row(name, [clip, text(name)], "red") for name in ("what is first ?", "what colour is it ?")
    ]
    manifest = write_rows(tmp_path / "asked.jsonl", asked)
    samples = read_manifest(manifest)
    one, all_frames = (int(processor([sample]).streams["video"].units[0]) for sample in samples)
    assert (one, all_frames) == (1, 2)
    dataset = SampleDataset([manifest], processor)
    units = [len(dataset[i].rows[0].clips[0]["video"].span) for i in range(2)]
    assert units == [1, 2], "the dataset decodes once and chooses for each row"
    chat = Chat(model.eval(), processor)
    for question, count in (("what is first ?", 1), ("what colour is it ?", 2)):
        "".join(
            chat.ask(question, video=clip["video"] if not chat.messages else None, max_new_tokens=1)
        )
        assert [len(perceived.frames) for perceived in chat.perceived] == [count]


def test_a_model_with_a_selector_is_evaluated_as_it_is_asked(world: World, own: Own) -> None:
    """Frames are chosen for each question, also a partner's, and with one clip held at a time."""
    model, processor = compose(world, selector={"type": f"{own(SELECTOR)}:FirstFrames"})
    rows = []
    for number in range(3):
        clip = {"type": "video", "video": f"00{number}.mp4"}
        names = ("what is first ?", "what colour is it ?")
        rows += [row(f"{name} {number}", [clip, text(name)], "red", kind=name) for name in names]
    manifest = write_rows(world.captions.parent / "asked.jsonl", rows)
    conditions = [AS_IS, Condition(swap="video")]
    seen: list[dict[str, int]] = []
    real = asking.answer_rows

    def noting(model: Any, processor: Any, rows: Any, **more: Any) -> list[str]:
        seen.append({row.id: len(row.clips[0]["video"].span) for row in rows})
        return real(model, processor, rows, **more)

    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asking, "answer_rows", noting)
        for held in (64, 1):
            results[held] = evaluate_all(
                model, processor, manifest, conditions, max_new_tokens=4, clips_at_once=held
            )
    for counts in seen:
        assert counts == {identity: 1 if "first" in identity else 2 for identity in counts}
    assert {n: r.to_dict() for n, r in results[64].items()} == {
        n: r.to_dict() for n, r in results[1].items()
    }
    arguments = Generation(max_new_tokens=4).arguments(model, processor)
    for prediction in results[64]["as_is"].predictions:
        batch = processor([prediction.sample], root=manifest.parent)
        assert processor.decode(model.generate(batch, **arguments)) == [prediction.answer]
    with pytest.raises(UserError):
        evaluate_all(model, processor, manifest, cache=manifest.parent / "cache")


@pytest.mark.parametrize("change", [{"data__pack": "media"}, {"data__cache": "features"}])
def test_a_selector_goes_with_nothing_that_shares_clips(
    world: World, own: Own, tmp_path: Path, change: dict[str, Any]
) -> None:
    config = settings(world, tmp_path / "run", data__train=str(world.questions), **change)
    config["model"]["selector"] = {"type": f"{own(SELECTOR)}:FirstFrames"}
    stage = RunConfig.model_validate(config)
    with pytest.raises(UserError, match="selector"):
        build_datasets(stage, build_parts(stage))
