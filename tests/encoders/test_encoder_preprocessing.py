"""Our preprocessing against that of transformers, number by number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from encoders.encoder_families import Sound, frames, sound
from transformers import (
    ASTFeatureExtractor,
    BitImageProcessor,
    BlipImageProcessor,
    ClapFeatureExtractor,
    CLIPImageProcessor,
    DINOv3ViTImageProcessor,
    PeVideoVideoProcessor,
    Siglip2ImageProcessor,
    SiglipImageProcessor,
    VideoMAEImageProcessor,
    VideoMAEVideoProcessor,
    VJEPA2VideoProcessor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from avllm.encoders.ast import AST
from avllm.encoders.clap import CLAP
from avllm.encoders.clip import CLIP
from avllm.encoders.dinov2 import DINOv2
from avllm.encoders.dinov3 import DINOv3
from avllm.encoders.eva import EVA
from avllm.encoders.pe_av_video import PEAVVideo
from avllm.encoders.siglip import SigLIP
from avllm.encoders.siglip2 import SigLIP2
from avllm.encoders.videomae import VideoMAE
from avllm.encoders.vjepa2 import VJEPA2
from avllm.encoders.wav2vec2 import Wav2Vec2
from avllm.encoders.whisper import Whisper
from avllm.registry import load

torch.set_num_threads(1)
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
PICTURES = [
    (CLIP, CLIPImageProcessor()),
    (SigLIP, SiglipImageProcessor()),
    (EVA, BlipImageProcessor(size={"height": 224, "width": 224})),
    (
        DINOv2,
        BitImageProcessor(
            size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, **IMAGENET
        ),
    ),
    (DINOv3, DINOv3ViTImageProcessor()),
]
NARROW = {"hidden_size": 48, "num_attention_heads": 2}  # VideoMAE computes its positions in Python
VIT = {"model_type": "vit", "image_size": 336, "num_hidden_layers": 1, "hidden_size": 96}
PE = PeVideoVideoProcessor(
    do_resize=True,
    do_rescale=True,
    do_normalize=True,
    size={"height": 336, "width": 336},
    image_mean=[0.5] * 3,
    image_std=[0.5] * 3,
)
CLIPS = [
    (VideoMAE, NARROW, VideoMAEImageProcessor(**IMAGENET), True),
    (VideoMAE, NARROW, VideoMAEVideoProcessor(**IMAGENET), True),
    (VideoMAE, NARROW, VideoMAEVideoProcessor(size={"shortest_edge": 240}), False),
    (VJEPA2, {}, VJEPA2VideoProcessor(), True),
    (PEAVVideo, {"vision_config": VIT}, PE, True),
]


def on_meta(family, config=None, **options):
    """An encoder at full size, whose weights nobody needs here."""
    with torch.device("meta"):
        return family(config or {}, **options)


def hf_pixels(processor, media):
    pictures = [np.asarray(f) for f in media.x]
    return processor(images=pictures, return_tensors="pt", input_data_format="channels_last")


@pytest.mark.parametrize("given", [True, False], ids=["checkpoint", "defaults"])
@pytest.mark.parametrize("shape", [(360, 640), (333, 187), (100, 131)])
@pytest.mark.parametrize(
    ("family", "processor"), PICTURES, ids=lambda v: getattr(v, "__name__", "")
)
def test_pictures(family, processor, shape, given):
    media = frames(2, *shape)
    options = {"preprocessing": processor.to_dict()} if given else {}
    encoder = on_meta(family, {"image_size": 224, "num_hidden_layers": 1}, **options)
    ours = encoder.preprocessor()(media, 1.0).inputs["pixel_values"]
    theirs = hf_pixels(processor, media)["pixel_values"]
    assert ours.shape == theirs.shape == (2, 3, 224, 224)
    assert (ours - theirs).abs().max() * min(processor.image_std) < 1.01 / 255


@pytest.mark.parametrize("shape", [(360, 640), (333, 187), (100, 131)])
@pytest.mark.parametrize(
    ("family", "config", "processor", "is_usual"),
    CLIPS,
    ids=lambda value: type(value).__name__ if hasattr(value, "to_dict") else None,
)
def test_frames_of_a_clip(family, config, processor, is_usual, shape):
    media = frames(3, *shape)
    pictures = [np.asarray(f) for f in media.x]
    theirs = processor([pictures], return_tensors="pt")
    theirs = theirs.get("pixel_values", theirs.get("pixel_values_videos"))[0]
    for settings in [processor.to_dict(), *([None] if is_usual else [])]:
        encoder = on_meta(family, {**config, "num_hidden_layers": 1}, preprocessing=settings)
        ours = encoder.preprocessor()(media, 1.5).inputs["pixel_values"].flatten(0, 1)
        assert ours.shape[1:] == theirs.shape[1:]
        assert (ours[:3] - theirs).abs().max() * min(processor.image_std) < 1.01 / 255
        assert all(torch.equal(filling, ours[2]) for filling in ours[3:])


def test_old_preprocessor_files_hold_bare_numbers():
    old = {"size": 224, "crop_size": 224, "do_center_crop": True, "resample": 3}
    new = {
        "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224},
        "resample": 3,
    }
    small = {"num_hidden_layers": 1}
    assert (
        on_meta(CLIP, small, preprocessing=old).preprocessor()
        == on_meta(CLIP, small, preprocessing=new).preprocessor()
    )


@pytest.mark.parametrize("shape", [(360, 640), (640, 360), (40, 40), (500, 31)])
def test_naflex(shape):
    media = frames(2, *shape)
    processor = Siglip2ImageProcessor(max_num_patches=64)
    made = on_meta(
        SigLIP2, {"num_hidden_layers": 1}, preprocessing=processor.to_dict()
    ).preprocessor()
    ours, theirs = made(media, 1.0).inputs, hf_pixels(processor, media)
    assert torch.equal(ours["spatial_shapes"], theirs["spatial_shapes"].long())
    assert torch.equal(ours["pixel_attention_mask"], theirs["pixel_attention_mask"].int())
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("mels", [80, 128])
def test_whisper_mel(mels):
    extractor = WhisperFeatureExtractor(feature_size=mels)
    made = on_meta(Whisper, {"num_mel_bins": mels, "encoder_layers": 1}).preprocessor()
    media = sound(34.0, 16_000)
    ours = made(media, 34.0).inputs["input_features"]
    windows = [media.x[:480_000].numpy(), media.x[480_000:].numpy()]
    theirs = extractor(windows, sampling_rate=16_000, return_tensors="pt")["input_features"]
    assert ours.shape == (2, mels, 3000)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seconds", [0.3, 7.0, 10.24])
def test_ast_filter_banks(seconds):
    media = sound(seconds, 16_000)
    made = on_meta(AST, {"num_hidden_layers": 1}).preprocessor()
    ours = made(media, seconds).inputs["input_values"]
    theirs = ASTFeatureExtractor()(media.x.numpy(), sampling_rate=16_000, return_tensors="pt")[
        "input_values"
    ]
    torch.testing.assert_close(ours[:1], theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("truncation", ["fusion", "rand_trunc"])
@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
def test_clap_decibels(truncation, padding):
    media = sound(3.1, 48_000)
    extractor = ClapFeatureExtractor(truncation=truncation, padding=padding)
    config = {"enable_fusion": truncation == "fusion"}
    made = on_meta(CLAP, config, preprocessing=extractor.to_dict()).preprocessor()
    ours = made(media, 3.1).inputs["input_features"]
    theirs = extractor(media.x.numpy(), sampling_rate=48_000, return_tensors="pt")["input_features"]
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=0)  # decibels


@pytest.mark.parametrize("normalise", [True, False])
def test_waveform(normalise):
    media = sound(2.0, 16_000)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=normalise, return_attention_mask=True)
    made = on_meta(
        Wav2Vec2, {"num_hidden_layers": 1}, preprocessing=extractor.to_dict(), window=5.0
    ).preprocessor()
    ours = made(media, 2.0).inputs
    theirs = extractor(media.x.numpy(), sampling_rate=16_000, return_tensors="pt")["input_values"]
    assert ours["input_values"].shape == (1, 80_080)
    assert made.receptive == 400
    assert made.steps == 250
    torch.testing.assert_close(ours["input_values"][:, :32_000], theirs, atol=1e-5, rtol=0)
    assert not ours["input_values"][:, 32_000:].any()
    assert ours["attention_mask"].sum() == 32_080  # all that the hundredth step sees


def test_released_sizes_have_the_known_clocks():
    whisper = on_meta(Whisper, {"encoder_layers": 1}).preprocessor()
    ast = on_meta(AST, {"num_hidden_layers": 1}).preprocessor()
    clap = on_meta(CLAP, {}).preprocessor()
    assert (whisper.steps, whisper.unit_samples, whisper.frames) == (1500, 480_000, 3000)
    assert (ast.steps, ast.tokens, ast.unit_samples) == (101, 12, 161_600)
    assert (clap.steps, clap.tokens, clap.unit_samples) == (32, 2, 480_000)


RELEASED_SOUND = {  # steps of a window, tokens of a step, samples of a window, a second
    "beats": (62, 8, 158_720, 16_000),
    "pe_av_audio": (750, 1, 1_440_000, 48_000),
    "qwen2_audio": (750, 1, 480_000, 16_000),
    "wavlm": (1500, 1, 480_000, 16_000),
    "w2v_bert": (1500, 1, 480_000, 16_000),
    "data2vec_audio": (1500, 1, 480_000, 16_000),
}
RELEASED_VIDEO = {  # side in pixels, tokens of a step, frames of a step, steps of a unit
    "videomae": (224, 196, 2, 8),
    "vjepa2": (256, 256, 2, 1),
    "dinov3": (224, 196, None, None),
    "vit": (224, 196, None, None),
    "metaclip2": (224, 49, None, None),
    "intern_vit": (448, 1024, None, None),
    "dinov2_registers": (224, 196, None, None),
}


@pytest.mark.parametrize("key", RELEASED_SOUND)
def test_released_sizes_of_sound(key):
    made = on_meta(load("encoders", key)).preprocessor()
    assert (made.steps, made.tokens, made.unit_samples, made.rate) == RELEASED_SOUND[key]


@pytest.mark.parametrize("key", RELEASED_VIDEO)
def test_released_sizes_of_frames(key):
    made = on_meta(load("encoders", key)).preprocessor()
    side, tokens, frames_a_step, steps = RELEASED_VIDEO[key]
    assert (made.size, made.tokens) == ((side, side), tokens)
    assert getattr(made, "frames", None) == frames_a_step
    assert getattr(made, "steps", None) == steps


def test_the_last_patch_of_a_window_is_not_lost():
    """AST's patches end before its frames: the next window begins where the last patch ends."""
    made = on_meta(AST, {"num_hidden_layers": 1}).preprocessor()
    x = sound(25.0, 16_000).x
    clip = made(Sound(x, 16_000), 25.0)
    assert len(clip.inputs["input_values"]) == 3
    assert len(clip.span) == 250
    second = made(Sound(x[161_600:], 16_000), 25.0).inputs["input_values"][0]
    assert torch.equal(clip.inputs["input_values"][1], second)
