"""Streams by any name: two encoders of a medium, streams of adapters, pairs of any two sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import World, make_world

from avllm.config_model import ModelConfig
from avllm.data.augment import Augment
from avllm.data.manifest import read_manifest
from avllm.data.reading import MediaReader
from avllm.errors import UserError
from avllm.evaluation.conditions import Condition
from avllm.evaluation.runner import evaluate
from avllm.inference.chat import Chat
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.checkpoint import save_checkpoint
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.objectives.contrastive import Contrastive
from avllm.streams import medium_of

torch.set_num_threads(1)
EVENTS = {
    "medium": "audio",
    "type": "mel_conv",
    "config": {"num_mel_bins": 16, "hidden_size": 12, "max_frames": 64},
    "preprocessing": {"sampling_rate": 8_000, "hop_length": 80, "n_fft": 256},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=4)


def compose(
    world: World, encoders: dict[str, Any], connector: list[dict[str, Any]]
) -> tuple[AVLLM, AVProcessor]:
    description = ModelConfig.model_validate(
        world.model | {"encoders": encoders, "connector": connector}
    )
    tokenizer, ids = load_tokenizer(description)
    torch.manual_seed(0)
    model = AVLLM.from_backbones(description, ids).eval()
    return model, AVProcessor.from_model(model, tokenizer)


@pytest.fixture(scope="module")
def two_ears(world: World) -> tuple[AVLLM, AVProcessor]:
    """SALMONN's form: encoders for speech and events, here at 16 and at 8 kHz; and for video."""
    given = world.model["encoders"]
    encoders = {
        "speech": given["audio"] | {"medium": "audio"},
        "events": EVENTS,
        "video": given["video"],
    }
    return compose(world, encoders, [{"type": "linear", "stream": s} for s in encoders])


def test_each_encoder_hears_what_it_would_hear_alone(
    world: World, two_ears: tuple[AVLLM, AVProcessor]
) -> None:
    part = read_manifest(world.captions)[0].media
    inputs = MediaReader(two_ears[1]).inputs(part, world.captions.parent)[0]
    for stream, spec in {"speech": world.model["encoders"]["audio"], "events": EVENTS}.items():
        _, alone = compose(world, {"audio": spec}, [{"type": "linear", "stream": "audio"}])
        expected = MediaReader(alone).inputs(part, world.captions.parent)[0]["audio"]
        for key, value in expected.inputs.items():
            assert torch.equal(inputs[stream].inputs[key], value)
        assert torch.equal(inputs[stream].span, expected.span)


def test_a_changed_sound_is_heard_changed_by_all(
    world: World, two_ears: tuple[AVLLM, AVProcessor]
) -> None:
    from avllm.config_data import AugmentConfig

    processor = two_ears[1]
    clip = processor.load_clips(read_manifest(world.captions)[0].media, world.captions.parent)[0]
    assert [s.rate for s in clip.more_sounds] == [8_000]
    changed = Augment(AugmentConfig(gain=20.0), seed=1)(clip, place=0)
    louder = changed.sound_at(8_000).x.square().mean() / clip.sound_at(8_000).x.square().mean()
    expected = changed.sound_at(16_000).x.square().mean() / clip.sound_at(16_000).x.square().mean()
    assert float(louder) == pytest.approx(float(expected), rel=1e-3)
    assert float(louder) != pytest.approx(1.0, rel=1e-3)


def test_a_model_of_two_ears_answers_and_comes_back(
    world: World, two_ears: tuple[AVLLM, AVProcessor], tmp_path: Path
) -> None:
    model, processor = two_ears
    rows = read_manifest(world.captions)[:2]
    batch = processor(rows, world.captions.parent, answer=True)
    assert {"<|speech|>", "<|events|>", "<|video|>"} <= set(processor.tokenizer.get_vocab())
    assert set(batch.streams) == {"speech", "events", "video"}
    assert set(processor.blanks) == {"speech", "events", "video"}
    save_checkpoint(model, processor, tmp_path / "checkpoint", [])
    chat = Chat.load(tmp_path / "checkpoint")
    with torch.no_grad():
        assert torch.equal(chat.model(batch).logits, model(batch).logits)
    seen = chat.look(video=str(world.captions.parent / "000.mp4"))[0]
    assert set(seen.tokens) == {"speech", "events", "video"}
    assert seen.frames is not None
    assert seen.spectrogram is not None


@pytest.mark.parametrize(
    "condition, left", [(Condition(without="audio"), {"video"}), (Condition(swap="audio"), None)]
)
def test_a_condition_is_about_all_streams_of_its_medium(
    world: World,
    two_ears: tuple[AVLLM, AVProcessor],
    monkeypatch: pytest.MonkeyPatch,
    condition: Condition,
    left: set[str] | None,
) -> None:
    asked: list[dict[str, Any]] = []
    make_row = AVProcessor.row

    def watched(self: AVProcessor, sample: Any, clips: Any, *args: Any, **kwargs: Any) -> Any:
        asked.extend(clips)
        return make_row(self, sample, clips, *args, **kwargs)

    monkeypatch.setattr(AVProcessor, "row", watched)
    result = evaluate(
        *two_ears, world.questions, without=condition.without, swap=condition.swap, max_new_tokens=2
    )
    assert sum(p.touched for p in result.predictions) >= 4
    changed = asked[len(result.predictions) :]
    if left is not None:
        assert all(set(clip) <= left for clip in changed)
        return
    # An exchanged stream is a copy with the clip's duration; its clock is the other clip's tensor.
    originals = {id(clip[s].span) for clip in asked[: len(result.predictions)] for s in clip}
    for clip in changed:  # both ears come from one and the same other clip
        assert {id(clip["speech"].span), id(clip["events"].span)} <= originals
        others = [c for c in asked if "speech" in c and c["video"] is not clip["video"]]
        owner = next(c for c in others if c["speech"].span is clip["speech"].span)
        assert owner["events"].span is clip["events"].span


@pytest.mark.parametrize(
    "pair, sides",
    [
        ("speech-text", (("speech",), ())),
        ("speech+video-text", (("speech", "video"), ())),
        ("video-events", (("video",), ("events",))),
        ("speech+events-video", (("speech", "events"), ("video",))),
    ],
)
def test_pairs_are_any_two_sides(
    world: World,
    two_ears: tuple[AVLLM, AVProcessor],
    pair: str,
    sides: tuple[tuple[str, ...], tuple[str, ...]],
) -> None:
    model, processor = two_ears
    batch = processor(read_manifest(world.captions), world.captions.parent, answer=True)
    objective = Contrastive(model, pairs=[pair], dim=8)
    with_sound = 3  # of four clips
    assert objective.weight(batch) == with_sound
    loss, _ = objective(model, batch)
    loss.backward()
    adapters = dict(zip(("speech", "events", "video"), model.connector, strict=True))
    left, right = sides
    for stream, adapter in adapters.items():
        gradient = adapter.proj.weight.grad
        assert (gradient is not None and bool(gradient.any())) == (stream in (*left, *right))
    assert objective.media_projection[pair].weight.grad.any()
    assert bool(right) == (pair in objective.key_projection)
    model.zero_grad()


@pytest.mark.parametrize(
    "pair", ["speech", "text-speech", "speech-speech", "smell-text", "speech-text+video", "-text"]
)
def test_what_is_no_pair_is_refused(two_ears: tuple[AVLLM, AVProcessor], pair: str) -> None:
    with pytest.raises(ValueError, match="pair"):
        Contrastive(two_ears[0], pairs=[pair])


@pytest.mark.parametrize(
    "stream, spec, word",
    [
        ("speech", {}, "medium"),
        ("speech", {"medium": "sound"}, "medium"),
        ("speech", {"medium": "video"}, "video"),
        ("text", {"medium": "audio"}, "text"),
        ("a.b", {"medium": "audio"}, "a.b"),
        ("keys", {"medium": "audio"}, "keys"),
    ],
)
def test_a_wrong_stream_is_named(
    world: World, stream: str, spec: dict[str, Any], word: str
) -> None:
    with pytest.raises(ValueError, match=word):
        compose(
            world,
            {stream: world.model["encoders"]["audio"] | spec},
            [{"type": "linear", "stream": stream}],
        )


@pytest.mark.parametrize(
    "made, names",
    [
        (
            [
                {"type": "sync_concat", "streams": ["video", "audio"]},
                {"type": "linear", "stream": "av"},
            ],
            ["av"],
        ),
        (
            [
                {"type": "branch", "stream": "video", "to": ["fine", "coarse"]},
                *({"type": "linear", "stream": s} for s in ("fine", "coarse")),
            ],
            ["fine", "coarse"],
        ),
    ],
)
def test_streams_that_adapters_make_get_placeholders(
    world: World, made: list[dict[str, Any]], names: list[str]
) -> None:
    last = [{"type": "linear", "stream": s} for s in ("video", "audio")]
    model, processor = compose(world, world.model["encoders"], [*made, *last])
    assert list(model.config.media_token_ids) == ["video", "audio", *names]
    batch = processor(read_manifest(world.captions)[:2], world.captions.parent, answer=True)
    for name in names:
        assert bool((batch.input_ids == model.config.media_token_ids[name]).any())
    assert torch.isfinite(model(batch).logits).all()


def test_a_stream_without_a_medium_is_a_users_mistake() -> None:
    assert medium_of("audio", {}) == medium_of("speech", {"medium": "audio"}) == "audio"
    with pytest.raises(UserError, match="medium: audio"):
        medium_of("speech", {})
