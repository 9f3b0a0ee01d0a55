"""What every encoder promises, checked on every file of the folder."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from encoders.encoder_families import (
    CONFIGS,
    KEYS,
    SOUNDS,
    SPEECH_KEYS,
    build,
    collate,
    encode,
    family,
    frames,
    some_media,
    sound,
)
from torch import Tensor

from avllm.encoders._audio import SoundPreprocessor
from avllm.encoders.base import Encoder, preprocessor_from_settings
from avllm.registry import choices
from avllm.tokens import EncoderInput

torch.set_num_threads(1)
WIDE = ["clip", "siglip", "dinov2", "dinov2_registers", "dinov3", "vit", "metaclip2", "intern_vit"]
"""Families whose pictures may have any size."""


def test_every_file_of_the_folder_is_in_the_table():
    assert sorted(CONFIGS) == KEYS == choices("encoders")


def test_the_docs_have_a_line_for_each():
    page = Path(__file__).resolve().parents[2] / "docs" / "compose.md"
    tables = page.read_text(encoding="utf-8").split("## Encoders")[1].split("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \| ", tables, re.MULTILINE)) == KEYS


@pytest.mark.parametrize("key", KEYS)
def test_output_has_the_shape_that_the_preprocessor_promised(key):
    encoder = build(key)
    clip = encoder.preprocessor()(some_media(encoder, 3), 3.0)
    with torch.no_grad():
        (x,) = encoder(**clip.inputs).values()
    units, steps, tokens, width = x.shape
    assert width == encoder.out_dim == encoder.out_dims[""]
    assert tokens == clip.mask.shape[1] == clip.grid.tokens
    assert clip.span.shape == (clip.mask.shape[0], 2)
    assert clip.mask.any(1).all()
    assert (units - 1) * steps < clip.span.shape[0] <= units * steps
    assert x.isfinite().all()
    assert x.std() > 0


@pytest.mark.parametrize("key", KEYS)
def test_a_ragged_batch_equals_clip_by_clip(key):
    encoder = build(key)
    clips = [encoder.preprocessor()(some_media(encoder, n), 3.0) for n in (3, 1, 2)]
    batch = encode(encoder, clips)[""]
    for row, clip in zip(batch, clips, strict=True):
        alone = encode(encoder, [clip])[""][0]
        torch.testing.assert_close(row[: len(alone)], alone, atol=1e-5, rtol=0)
        assert not row[len(alone) :].any()


@pytest.mark.parametrize("key", KEYS)
def test_the_last_listed_layer_is_the_main_stream(key):
    encoder = build(key, layers=[0, 1, -1])
    clips = [encoder.preprocessor()(some_media(encoder, 2), 3.0)]
    out = encode(encoder, clips)
    assert list(out) == encoder.layer_names == ["0", "1", ""]
    assert {k: v.shape[-1] for k, v in out.items()} == encoder.out_dims
    torch.testing.assert_close(out[""], encode(build(key), clips)[""])
    inner = encode(build(key, layers=[-2]), clips)[""]
    same = encode(build(key, layers=[encoder.depth - 1]), clips)[""]
    torch.testing.assert_close(inner, same)
    assert not torch.equal(inner, out[""])


@pytest.mark.parametrize("key", KEYS)
def test_a_wrong_layer_is_refused_with_the_range(key):
    with pytest.raises(ValueError, match="from -4 to 3"):
        build(key, layers=[7])
    with pytest.raises(ValueError, match="twice"):
        build(key, layers=[3, -1])


@pytest.mark.parametrize("key", KEYS)
def test_a_mistyped_config_field_is_refused(key):
    with pytest.raises(ValueError, match="no field hiden_size"):
        family(key)({**CONFIGS[key], "hiden_size": 3})
    with pytest.raises(ValueError, match="model_type"):
        family(key)({"model_type": "llama"})


@pytest.mark.parametrize("key", KEYS)
def test_config_and_options_build_it_again_without_weights(key):
    encoder = build(key, layers=[1, -1])
    config = json.loads(json.dumps(encoder.backbone_config.to_dict()))
    assert config["model_type"]
    with torch.device("meta"):
        again = family(key)(config, **json.loads(json.dumps(encoder.options())))
    assert all(p.is_meta for p in again.parameters())
    assert again.preprocessor() == encoder.preprocessor()
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in encoder.state_dict().items()
    }


@pytest.mark.parametrize("key", KEYS)
def test_the_preprocessor_is_plain_and_deterministic(key):
    encoder = build(key)
    made = encoder.preprocessor()
    media = some_media(encoder, 2)
    first = made(media, 3.0)
    for other in (
        pickle.loads(pickle.dumps(made)),
        preprocessor_from_settings(json.loads(json.dumps(made.settings()))),
    ):
        second = other(media, 3.0)
        assert other == made
        assert all(torch.equal(first.inputs[k], second.inputs[k]) for k in first.inputs)
        assert torch.equal(first.span, second.span)
        assert torch.equal(first.mask, second.mask)
    assert not any(isinstance(v, Tensor) for v in vars(made).values())


@pytest.mark.parametrize("key", SOUNDS)
@pytest.mark.parametrize("seconds", [0.001, 0.5, 3.0, 3.337])
def test_windows_cover_all_of_a_sound(key, seconds):
    made = build(key).preprocessor()
    clip = made(sound(seconds, made.rate, start=1.25), 9.0)
    assert clip.span[0, 0] == 1.25
    assert clip.span[-1, 1].item() == pytest.approx(
        1.25 + round(seconds * made.rate) / made.rate, abs=1e-6
    )
    assert torch.equal(clip.span[1:, 0], clip.span[:-1, 1])
    assert (clip.span[:, 1] > clip.span[:, 0]).all()


def before_mixing(encoder: Encoder, clip: EncoderInput) -> Tensor:
    """The features of each step before anything mixes the steps, (T, ...)."""
    if hasattr(
        encoder.backbone, "feature_extractor"
    ):  # wav2vec 2.0 and HuBERT: layer 0 is behind a long convolution
        with torch.no_grad():
            x = encoder.backbone.feature_extractor(clip.inputs["input_values"])  # (U, D, S)
        return x.transpose(1, 2).flatten(0, 1)[: len(clip.span)]
    return encode(encoder, [clip])[""][0]


@pytest.mark.parametrize("key", SOUNDS)
@pytest.mark.parametrize("at", [0.137, 1.333, 2.421])
def test_each_step_hears_the_sound_of_its_own_span(key, at):
    """A click changes most the step whose span holds it, or its neighbour."""
    encoder = build(key, layers=[0])
    made = (
        replace(encoder.preprocessor(), normalise=False)
        if key in SPEECH_KEYS
        else encoder.preprocessor()
    )
    quiet = sound(2.9, made.rate, seed=1)
    loud = quiet.x.clone()
    place = round(at * made.rate)
    loud[place : place + 40] += 5.0
    clips = [made(type(quiet)(x, made.rate), 2.9) for x in (quiet.x, loud)]
    before, after = (before_mixing(encoder, c).flatten(1) for c in clips)
    step = clips[0].span[0].diff().item()
    start, end = clips[0].span[(after - before).norm(dim=1).argmax()].tolist()
    assert start - step <= at <= end + step, (at, start, end)


@pytest.mark.parametrize("key", SOUNDS)
def test_a_short_window_gives_the_same_clock(key):
    encoder = build(key, window=0.5)
    made: SoundPreprocessor = encoder.preprocessor()
    clip = made(sound(1.7, made.rate), 1.7)
    whole = build(key).preprocessor()(sound(1.7, made.rate), 1.7)
    torch.testing.assert_close(clip.span, whole.span)
    with torch.no_grad():
        x = encoder(**clip.inputs)[""]
    assert x.shape[0] == 4 if key != "clap" else x.shape[0] >= 3
    assert x.shape[1] == made.steps
    with pytest.raises(ValueError, match="window"):
        build(key, window=1e-4)


@pytest.mark.parametrize("key", ["ast", "clap"])
def test_pooled_sound_is_one_step_a_window(key):
    encoder = build(key, feature="pooled")
    made = encoder.preprocessor()
    clip = made(sound(3.0, made.rate), 3.0)
    with torch.no_grad():
        x = encoder(**clip.inputs)[""]
    assert x.shape[1:3] == (1, 1)
    assert len(clip.span) == len(x)
    assert clip.span[-1, 1] == 3.0
    with pytest.raises(ValueError, match="last layer only"):
        build(key, feature="pooled", layers=[1])


@pytest.mark.parametrize(
    "key", ["clip", "siglip", "eva", "dinov2", "vit", "metaclip2", "intern_vit"]
)
def test_features_of_a_picture(key):
    patches = 16
    expected = {"patch": patches, "cls": 1, "all": patches + 1, "pooled": 1}
    clip_of = {}
    for feature in family(key).features:
        encoder = build(key, feature=feature)
        clip = encoder.preprocessor()(frames(2), 1.0)
        clip_of[feature] = encode(encoder, [clip])[""][0]
        assert clip_of[feature].shape[:2] == (2, expected[feature]), feature
    if "all" in clip_of:
        assert torch.equal(clip_of["all"][:, 1:], clip_of["patch"])
        assert torch.equal(clip_of["all"][:, :1], clip_of["cls"])
    with pytest.raises(ValueError, match="expected one of"):
        build(key, feature="nose")


@pytest.mark.parametrize("key", ["videomae", "vjepa2"])
def test_side_averages_each_step(key):
    own = encode(build(key), [build(key).preprocessor()(frames(5), 2.5)])[""]
    encoder = build(key, side=2)
    clip = encoder.preprocessor()(frames(5), 2.5)
    assert clip.mask.shape == (3, 4)
    blocks = own.unflatten(2, (2, 2, 2, 2)).mean((3, 5)).flatten(2, 3)
    torch.testing.assert_close(encode(encoder, [clip])[""], blocks)


@pytest.mark.parametrize("key", ["eva", *WIDE])
def test_another_picture_size_interpolates_the_positions(key):
    encoder = build(key, image_size=48)
    clip = encoder.preprocessor()(frames(2), 1.0)
    assert clip.inputs["pixel_values"].shape[-2:] == (48, 48)
    assert encode(encoder, [clip])[""].shape[2] == 36 + (key == "eva")


@pytest.mark.parametrize("key", WIDE)
def test_a_picture_may_be_wide(key):
    encoder = build(key, image_size=[24, 48])
    clip = encoder.preprocessor()(frames(2, 40, 80), 1.0)
    assert clip.inputs["pixel_values"].shape[-2:] == (24, 48)
    assert encode(encoder, [clip])[""].shape[2] == clip.mask.shape[1] == 3 * 6
    assert family(key)(encoder.backbone_config, **encoder.options()).image_size == (24, 48)


@pytest.mark.parametrize("key", ["eva", "pvt_v2", *WIDE])
def test_side_averages_the_grid(key):
    clips = [build(key, feature="patch").preprocessor()(frames(2), 1.0)]
    own = encode(build(key, feature="patch"), clips)[""]
    encoder = build(key, feature="patch", side=2)
    clips[0] = encoder.preprocessor()(frames(2), 1.0)
    assert clips[0].mask.shape[1] == encoder.tokens() == 4
    rows, columns = encoder.own_grid
    blocks = own.unflatten(2, (2, rows // 2, 2, columns // 2)).mean((3, 5)).flatten(2, 3)
    torch.testing.assert_close(encode(encoder, clips)[""], blocks)
    assert family(key)(encoder.backbone_config, **encoder.options()).side == 2


def test_a_side_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="expected 1 to 4"):
        build("siglip", side=5)
    with pytest.raises(ValueError, match="feature is 'pooled'"):
        build("siglip", feature="pooled", side=2)


def test_naflex_pictures_of_any_shape_share_a_batch():
    encoder = build("siglip2")
    clips = [
        encoder.preprocessor()(frames(1, h, w), 1.0) for h, w in ((30, 90), (64, 64), (90, 30))
    ]
    real = [int(c.mask.sum()) for c in clips]
    assert all(0 < n <= 16 for n in real)
    assert real[1] == 16
    assert real[0] == real[2] < 16
    tokens = encoder.encode(collate(clips))[""]
    assert tokens.mask.sum((1, 2)).tolist() == real


@pytest.mark.parametrize("key", KEYS)
def test_half_precision_is_near_to_full(key):
    """Weights in bfloat16 take inputs in float32, and so does autocast."""
    encoder = build(key)
    clips = [encoder.preprocessor()(some_media(encoder, 3), 3.0)]
    full = encode(encoder, clips)[""]
    with torch.autocast("cpu", torch.bfloat16):
        cast = encode(encoder, clips)[""]
    half = encode(encoder.to(torch.bfloat16), clips)[""]
    assert half.dtype == torch.bfloat16
    for other in (cast, half):
        assert (other.float() - full).norm() < 0.05 * full.norm()


def test_bad_media_is_named():
    made = build("whisper").preprocessor()
    with pytest.raises(ValueError, match="8000.*16000"):
        made(sound(1.0, 8000), 1.0)
    with pytest.raises(ValueError, match=r"\(0,\)"):
        made(sound(0.0, 16000), 1.0)
    with pytest.raises(ValueError, match=r"float32.*uint8"):
        build("clip").preprocessor()(
            type(frames(1))(torch.zeros(1, 4, 4, 3), torch.zeros(1, 2)), 1.0
        )
