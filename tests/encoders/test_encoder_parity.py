"""Features against those of transformers' own model, called by hand on the same pixels or sound."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from encoders.encoder_families import CONFIGS, build, encode, frames, sound
from torch import Tensor
from transformers import (
    Data2VecAudioModel,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    InternVLVisionModel,
    MetaClip2VisionModel,
    PeAudioEncoder,
    PeAudioFeatureExtractor,
    PeVideoEncoder,
    Qwen2AudioEncoder,
    SeamlessM4TFeatureExtractor,
    VideoMAEConfig,
    VideoMAEModel,
    ViTModel,
    VJEPA2Config,
    VJEPA2Model,
    Wav2Vec2BertModel,
    Wav2Vec2FeatureExtractor,
    WavLMModel,
)

torch.set_num_threads(1)
LAYERS = [0, 1, -1]


def copy_of(encoder: Any, model_class: type, config: Any) -> Any:
    """A model of transformers with the encoder's weights; predictor and pooler are not in it."""
    model = model_class(config).eval()
    report = model.load_state_dict(encoder.backbone.state_dict(), strict=False)
    assert not report.unexpected_keys
    assert all(key.startswith(("predictor.", "pooler.")) for key in report.missing_keys)
    return model


def layers_of(out: Any) -> dict[str, Tensor]:
    """The layers of LAYERS, by our names."""
    states = out.hidden_states
    return {"0": states[0], "1": states[1], "": out.last_hidden_state}


@torch.no_grad()
@pytest.mark.parametrize("size", [None, [24, 56]], ids=["square", "wide"])
def test_dinov3(size: list[int] | None) -> None:
    encoder = build("dinov3", layers=LAYERS, image_size=size)
    model = copy_of(encoder, DINOv3ViTModel, DINOv3ViTConfig(**CONFIGS["dinov3"]))
    clip = encoder.preprocessor()(frames(2), 1.0)
    pixels = clip.inputs["pixel_values"]
    assert list(pixels.shape[-2:]) == (size or [32, 32])
    out = model(pixels, output_hidden_states=True)
    ours = encode(encoder, [clip])
    for name, theirs in layers_of(out).items():
        torch.testing.assert_close(ours[name][0], theirs[:, 3:])  # class token and two registers
    for feature, theirs in {
        "cls": out.last_hidden_state[:, :1],
        "all": out.last_hidden_state,
        "pooled": out.pooler_output[:, None],
    }.items():
        other = build("dinov3", feature=feature, image_size=size)
        torch.testing.assert_close(
            encode(other, [other.preprocessor()(frames(2), 1.0)])[""][0], theirs
        )


@torch.no_grad()
def test_videomae_in_windows_of_four_frames() -> None:
    encoder = build("videomae", layers=LAYERS)
    model = copy_of(encoder, VideoMAEModel, VideoMAEConfig(**CONFIGS["videomae"]))
    media = frames(7)
    clip = encoder.preprocessor()(media, 3.5)
    pixels = encoder.preprocessor().pixels(media.x)
    windows = torch.stack([pixels[:4], torch.cat([pixels[4:], pixels[-1:]])])
    theirs = layers_of(model(windows, output_hidden_states=True))
    ours = encode(encoder, [clip])
    for name in ours:
        # Two windows of two steps of 16 patches.
        torch.testing.assert_close(ours[name][0], theirs[name].reshape(4, 16, -1))


@torch.no_grad()
@pytest.mark.parametrize(("window", "cuts"), [(None, [4, 2]), (2, [2, 2, 2]), (6, [6]), (100, [6])])
def test_vjepa2_sees_a_window_at_once(window: int | None, cuts: list[int]) -> None:
    encoder = build("vjepa2", layers=LAYERS, window=window)
    model = copy_of(encoder, VJEPA2Model, VJEPA2Config(**CONFIGS["vjepa2"]))
    media = frames(5)
    pixels = encoder.preprocessor().pixels(media.x)
    pixels = torch.cat([pixels, pixels[-1:]])
    theirs: dict[str, list[Tensor]] = {}
    for cut in pixels.split(cuts):
        out = model(cut[None], skip_predictor=True, output_hidden_states=True)
        for name, x in layers_of(out).items():
            theirs.setdefault(name, []).append(x[0])
    ours = encode(encoder, [encoder.preprocessor()(media, 2.5)])
    for name in ours:
        expected = torch.cat(theirs[name]).reshape(3, 16, -1)
        torch.testing.assert_close(ours[name][0], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_vjepa2_at_another_size_is_the_model_of_that_size() -> None:
    encoder = build("vjepa2", image_size=48)
    config = VJEPA2Config(**{**CONFIGS["vjepa2"], "crop_size": 48})
    model = copy_of(encoder, VJEPA2Model, config)
    clip = encoder.preprocessor()(frames(4), 2.0)
    pixels = clip.inputs["pixel_values"].flatten(0, 1)[None]
    assert pixels.shape == (1, 4, 3, 48, 48)
    theirs = model(pixels, skip_predictor=True).last_hidden_state.reshape(2, 36, -1)
    torch.testing.assert_close(encode(encoder, [clip])[""][0], theirs)


@torch.no_grad()
def test_pe_av_video() -> None:
    """One clip alone, and in transformers' padded batch."""
    encoder = build("pe_av_video", layers=LAYERS)
    model = copy_of(encoder, PeVideoEncoder, encoder.backbone_config)
    clips = [encoder.preprocessor()(frames(n, seed=n), 3.0) for n in (5, 3)]
    pixels = torch.zeros(2, 5, 3, 32, 32)
    for row, clip in zip(pixels, clips, strict=True):
        row[: len(clip.span)] = clip.inputs["pixel_values"][:, 0]
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2])
    out = model(pixels, padding_mask_videos=mask, output_hidden_states=True)
    ours = encode(encoder, clips)
    for name, theirs in layers_of(out).items():
        theirs = theirs[:, -5:] * mask[..., None]  # inner layers have the class token, too
        torch.testing.assert_close(ours[name][:, :, 0], theirs, atol=1e-5, rtol=1e-4)
    pooled = build("pe_av_video", feature="pooled")
    clips = [pooled.preprocessor()(frames(n, seed=n), 3.0) for n in (5, 3)]
    ours = encode(pooled, clips)[""]
    torch.testing.assert_close(ours[:, 0, 0], out.pooler_output, atol=1e-5, rtol=1e-4)
    assert [clip.span.tolist() for clip in clips] == [[[0.0, 2.5]], [[0.0, 1.5]]]


@torch.no_grad()
def test_pe_av_audio() -> None:
    """A window that is not full: mirrored up to a whole step, padded and masked."""
    encoder = build("pe_av_audio", layers=LAYERS)
    model = copy_of(encoder, PeAudioEncoder, encoder.backbone_config)
    made = encoder.preprocessor()
    assert (made.unit_samples, made.steps) == (48_000, 25)
    media = sound(0.69, 48_000)
    clip = made(media, 0.69)
    theirs = PeAudioFeatureExtractor()(
        media.x.numpy(),
        sampling_rate=48_000,
        padding="max_length",
        max_length=48_000,
        return_tensors="pt",
    )
    assert torch.equal(clip.inputs["input_values"], theirs["input_values"])
    assert torch.equal(clip.inputs["padding_mask"], theirs["padding_mask"].long())
    out = model(**theirs, output_hidden_states=True)
    ours = encode(encoder, [clip])
    assert len(clip.span) == 18
    for name, x in layers_of(out).items():
        torch.testing.assert_close(ours[name][0, :, 0], x[0, -25:][:18], atol=1e-5, rtol=1e-4)
    pooled = build("pe_av_audio", feature="pooled")
    clip = pooled.preprocessor()(media, 0.69)
    torch.testing.assert_close(encode(pooled, [clip])[""][0, 0], out.pooler_output)
    assert clip.span.flatten().tolist() == pytest.approx([0.0, 0.69])


def test_a_moment_of_sound_is_mirrored_as_often_as_it_takes() -> None:
    made = build("pe_av_audio").preprocessor()
    media = sound(0.001, 48_000)
    theirs = PeAudioFeatureExtractor()._reflect_pad(media.x.numpy())
    ours = made(media, 0.001).inputs["input_values"][0, 0]
    assert np.array_equal(ours[:1920].numpy(), theirs)
    assert not ours[1920:].any()


@torch.no_grad()
@pytest.mark.parametrize("has_mask", [True, False])
def test_wavlm(has_mask: bool) -> None:
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=has_mask)
    encoder = build("wavlm", layers=LAYERS, preprocessing=extractor.to_dict())
    model = copy_of(encoder, WavLMModel, encoder.backbone_config)
    media = sound(0.7, 16_000)
    clip = encoder.preprocessor()(media, 0.7)
    theirs = extractor(media.x.numpy(), sampling_rate=16_000, return_tensors="pt")["input_values"]
    given = clip.inputs["input_values"]
    torch.testing.assert_close(given[:, : theirs.shape[1]], theirs, atol=1e-5, rtol=0)
    assert ("attention_mask" in clip.inputs) == has_mask
    out = model(**clip.inputs, output_hidden_states=True)
    ours = encode(encoder, [clip])
    for name, x in layers_of(out).items():
        torch.testing.assert_close(ours[name][0, :, 0], x[0, : len(clip.span)])


@torch.no_grad()
def test_dinov2_registers_are_left_out_of_the_patches() -> None:
    encoder = build("dinov2_registers", layers=LAYERS)
    model = copy_of(encoder, Dinov2WithRegistersModel, encoder.backbone_config)
    clip = encoder.preprocessor()(frames(2), 1.0)
    ours = encode(encoder, [clip])
    out = model(clip.inputs["pixel_values"], output_hidden_states=True)
    for name, theirs in layers_of(out).items():
        torch.testing.assert_close(ours[name][0], theirs[:, 3:])  # class token and two registers


@torch.no_grad()
@pytest.mark.parametrize(
    ("key", "model_class"),
    [("vit", ViTModel), ("metaclip2", MetaClip2VisionModel), ("intern_vit", InternVLVisionModel)],
)
def test_other_vision_transformers(key: str, model_class: type) -> None:
    encoder = build(key, layers=LAYERS, feature="all")
    model = copy_of(encoder, model_class, encoder.backbone_config)
    clip = encoder.preprocessor()(frames(2), 1.0)
    out = model(clip.inputs["pixel_values"], output_hidden_states=True)
    ours = encode(encoder, [clip])
    for name, theirs in layers_of(out).items():
        torch.testing.assert_close(ours[name][0], theirs)


@torch.no_grad()
def test_data2vec_audio() -> None:
    encoder = build("data2vec_audio", layers=LAYERS)
    model = copy_of(encoder, Data2VecAudioModel, encoder.backbone_config)
    clip = encoder.preprocessor()(sound(0.7, 16_000), 0.7)
    assert "attention_mask" in clip.inputs
    out = model(**clip.inputs, output_hidden_states=True)
    ours = encode(encoder, [clip])
    for name, x in layers_of(out).items():
        torch.testing.assert_close(ours[name][0, :, 0], x[0, : len(clip.span)])


@torch.no_grad()
def test_qwen2_audio_averages_pairs_of_steps() -> None:
    encoder = build("qwen2_audio", layers=LAYERS)
    model = copy_of(encoder, Qwen2AudioEncoder, encoder.backbone_config)
    made = encoder.preprocessor()
    assert (made.steps, made.frames, made.unit_samples) == (25, 100, 16_000)  # 40 ms a step
    clip = made(sound(0.7, 16_000), 0.7)
    theirs = layers_of(model(**clip.inputs, output_hidden_states=True))
    ours = encode(encoder, [clip])
    assert len(clip.span) == 18
    for name in ("0", "1"):
        theirs[name] = theirs[name].reshape(1, 25, 2, -1).mean(2)
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name][0, :, 0], x[0, :18])


@torch.no_grad()
@pytest.mark.parametrize("samples", [400 + 160 * 49, 400 + 160 * 48, 8_317, 16_000])
def test_w2v_bert(samples: int) -> None:
    """Whole steps are transformers'; the last begins before the sound's end."""
    encoder = build("w2v_bert", layers=LAYERS)
    model = copy_of(encoder, Wav2Vec2BertModel, encoder.backbone_config)
    extractor = SeamlessM4TFeatureExtractor(feature_size=20, num_mel_bins=20)
    media = sound(samples / 16_000, 16_000)
    theirs = extractor(media.x.numpy(), sampling_rate=16_000, return_tensors="pt")
    clip = encoder.preprocessor()(media, 1.0)
    whole = int(theirs["attention_mask"].sum())
    assert int(clip.inputs["attention_mask"].sum()) == whole
    assert len(clip.span) == -(-samples // 320)
    given = clip.inputs["input_features"][:, : theirs["input_features"].shape[1]]
    torch.testing.assert_close(given, theirs["input_features"], atol=1e-3, rtol=1e-3)
    out = layers_of(model(**theirs, output_hidden_states=True))
    ours = encode(encoder, [clip])
    for name, x in out.items():
        torch.testing.assert_close(ours[name][0, :whole, 0], x[0, :whole], atol=2e-3, rtol=1e-3)
