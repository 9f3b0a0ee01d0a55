"""Checkpoints of transformers, of one tower and of whole models, load without a key left over."""

from __future__ import annotations

import json

import pytest
import torch
from encoders.encoder_families import (
    CONFIGS,
    KEYS,
    OPTIONS,
    PE,
    encode,
    family,
    some_media,
    without,
)
from safetensors.torch import load_file, save, save_file
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    ASTModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2VisionModel,
    ClapAudioModel,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Data2VecAudioConfig,
    Data2VecAudioForCTC,
    Data2VecAudioModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    HubertConfig,
    HubertForCTC,
    HubertModel,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionModel,
    MetaClip2Config,
    MetaClip2Model,
    MetaClip2VisionModel,
    OPTConfig,
    PeAudioConfig,
    PeAudioEncoder,
    PeAudioEncoderConfig,
    PeAudioModel,
    PeAudioVideoConfig,
    PeAudioVideoModel,
    PeVideoConfig,
    PeVideoEncoder,
    PeVideoModel,
    Qwen2AudioConfig,
    Qwen2AudioEncoder,
    Qwen2AudioForConditionalGeneration,
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    VJEPA2Config,
    VJEPA2ForVideoClassification,
    VJEPA2Model,
    VJEPA2VideoProcessor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertForCTC,
    Wav2Vec2BertModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMForCTC,
    WavLMForXVector,
    WavLMModel,
    WhisperConfig,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
    WhisperModel,
    modeling_utils,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from avllm.encoders.mel_conv import MelConvConfig, MelConvModel

torch.set_num_threads(1)
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 20,
    "projection_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
REGISTERS = "dinov2_with_registers"
BERT = {**TEXT, "max_position_embeddings": 16}


@pytest.fixture
def reports(monkeypatch):
    """The reports of keys that transformers logs while it loads."""
    seen = []
    monkeypatch.setattr(modeling_utils.logger, "warning", seen.append)
    return seen


def dual(config_class, key, tower="vision_config", **more):
    text = {
        k: v
        for k, v in TEXT.items()
        if k != "projection_dim" or "Siglip" not in config_class.__name__
    }
    return config_class(**{tower: CONFIGS[key], "text_config": text, **more})


def blip2():
    qformer = {**BERT, "encoder_hidden_size": 32, "cross_attention_frequency": 1}
    qformer.pop("projection_dim")
    text = OPTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=16,
        vocab_size=20,
        word_embed_proj_dim=16,
    )
    return Blip2Config(
        vision_config=CONFIGS["eva"],
        qformer_config=qformer,
        text_config=text.to_dict(),
        num_query_tokens=2,
    )


def clap():
    return ClapConfig(audio_config=CONFIGS["clap"], text_config=BERT, projection_dim=8)


def whisper():
    decoder = {
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 16,
        "vocab_size": 20,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    return WhisperConfig(**CONFIGS["whisper"], **decoder)


def speech(config_class, key):
    quantizer = {"num_codevectors_per_group": 4, "codevector_dim": 8, "proj_codevector_dim": 8}
    return config_class(**CONFIGS[key], vocab_size=20, **(quantizer if key == "wav2vec2" else {}))


def metaclip2():
    return dual(MetaClip2Config, "metaclip2", projection_dim=8)


def internvl():
    text = {"model_type": "qwen2", **without(TEXT, "projection_dim"), "num_key_value_heads": 2}
    return InternVLConfig(vision_config=CONFIGS["intern_vit"], text_config=text)


def qwen2_audio():
    text = {"model_type": "qwen2", **without(TEXT, "projection_dim"), "num_key_value_heads": 2}
    audio = {"model_type": "qwen2_audio_encoder", **CONFIGS["qwen2_audio"]}
    return Qwen2AudioConfig(audio_config=audio, text_config=text)


def registers():
    return Dinov2WithRegistersConfig(**CONFIGS["dinov2_registers"])


def data2vec():
    return Data2VecAudioConfig(**CONFIGS["data2vec_audio"], vocab_size=20)


def videomae(**more):
    decoder = {
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16,
    }
    return VideoMAEConfig(**CONFIGS["videomae"], **decoder, **more)


def vjepa2():
    return VJEPA2Config(**CONFIGS["vjepa2"], num_pooler_layers=1)


def w2v_bert():
    return Wav2Vec2BertConfig(**CONFIGS["w2v_bert"], vocab_size=20)


def wavlm():
    return WavLMConfig(**CONFIGS["wavlm"], vocab_size=20, tdnn_dim=[16] * 5, xvector_output_dim=8)


def pe_text():
    return {"model_type": "modernbert", **without(TEXT, "projection_dim"), "cls_token_id": 0}


def pe_audio():
    return PeAudioConfig(audio_config=CONFIGS["pe_av_audio"], text_config=pe_text())


def pe_video():
    tower = family("pe_av_video").read_config(CONFIGS["pe_av_video"])
    return PeVideoConfig(video_config=tower, text_config=pe_text())


def pe_audio_video():
    towers = {
        "audio_config": PeAudioEncoderConfig(**CONFIGS["pe_av_audio"]),
        "video_config": pe_video().video_config,
    }
    joint = {**PE, **towers, "model_type": "pe_audio_video_encoder"}
    return PeAudioVideoConfig(audio_video_config=joint, text_config=pe_text())


# family, the saved model, its config, where the tower stands in it
CASES = [
    ("clip", CLIPVisionModel, lambda: dual(CLIPConfig, "clip").vision_config, ""),
    (
        "clip",
        CLIPVisionModelWithProjection,
        lambda: dual(CLIPConfig, "clip").vision_config,
        "vision_model",
    ),
    ("clip", CLIPModel, lambda: dual(CLIPConfig, "clip", projection_dim=8), "vision_model"),
    ("siglip", SiglipVisionModel, lambda: dual(SiglipConfig, "siglip").vision_config, ""),
    ("siglip", SiglipModel, lambda: dual(SiglipConfig, "siglip"), "vision_model"),
    ("siglip2", Siglip2VisionModel, lambda: dual(Siglip2Config, "siglip2").vision_config, ""),
    ("siglip2", Siglip2Model, lambda: dual(Siglip2Config, "siglip2"), "vision_model"),
    ("eva", Blip2VisionModel, lambda: blip2().vision_config, ""),
    ("eva", Blip2ForConditionalGeneration, blip2, "vision_model"),
    ("dinov2", Dinov2Model, lambda: Dinov2Config(**CONFIGS["dinov2"]), ""),
    ("dinov2", Dinov2ForImageClassification, lambda: Dinov2Config(**CONFIGS["dinov2"]), "dinov2"),
    ("whisper", WhisperEncoder, whisper, ""),
    ("whisper", WhisperModel, whisper, "encoder"),
    ("whisper", WhisperForConditionalGeneration, whisper, "model.encoder"),
    ("whisper", WhisperForAudioClassification, whisper, "encoder"),
    ("ast", ASTModel, lambda: ASTConfig(**CONFIGS["ast"]), ""),
    (
        "ast",
        ASTForAudioClassification,
        lambda: ASTConfig(**CONFIGS["ast"]),
        "audio_spectrogram_transformer",
    ),
    ("clap", ClapAudioModel, lambda: clap().audio_config, ""),
    ("clap", ClapModel, clap, "audio_model"),
    ("mel_conv", MelConvModel, lambda: MelConvConfig(**CONFIGS["mel_conv"]), ""),
    ("wav2vec2", Wav2Vec2Model, lambda: speech(Wav2Vec2Config, "wav2vec2"), ""),
    ("wav2vec2", Wav2Vec2ForCTC, lambda: speech(Wav2Vec2Config, "wav2vec2"), "wav2vec2"),
    ("wav2vec2", Wav2Vec2ForPreTraining, lambda: speech(Wav2Vec2Config, "wav2vec2"), "wav2vec2"),
    ("vit", ViTModel, lambda: ViTConfig(**CONFIGS["vit"]), ""),
    ("vit", ViTForImageClassification, lambda: ViTConfig(**CONFIGS["vit"]), "vit"),
    ("metaclip2", MetaClip2VisionModel, lambda: metaclip2().vision_config, ""),
    ("metaclip2", MetaClip2Model, metaclip2, "vision_model"),
    ("intern_vit", InternVLVisionModel, lambda: internvl().vision_config, ""),
    ("intern_vit", InternVLForConditionalGeneration, internvl, "model.vision_tower"),
    ("dinov2_registers", Dinov2WithRegistersModel, registers, ""),
    ("dinov2_registers", Dinov2WithRegistersForImageClassification, registers, REGISTERS),
    ("data2vec_audio", Data2VecAudioModel, data2vec, ""),
    ("data2vec_audio", Data2VecAudioForCTC, data2vec, "data2vec_audio"),
    ("qwen2_audio", Qwen2AudioEncoder, lambda: qwen2_audio().audio_config, ""),
    ("qwen2_audio", Qwen2AudioForConditionalGeneration, qwen2_audio, "model.audio_tower"),
    ("dinov3", DINOv3ViTModel, lambda: DINOv3ViTConfig(**CONFIGS["dinov3"]), ""),
    ("videomae", VideoMAEModel, videomae, ""),
    ("videomae", VideoMAEModel, lambda: videomae(use_mean_pooling=False), ""),
    ("videomae", VideoMAEForVideoClassification, videomae, "videomae"),
    ("videomae", VideoMAEForPreTraining, videomae, "videomae"),
    ("vjepa2", VJEPA2Model, vjepa2, ""),
    ("vjepa2", VJEPA2ForVideoClassification, vjepa2, "vjepa2"),
    ("pe_av_audio", PeAudioEncoder, lambda: pe_audio().audio_config, ""),
    ("pe_av_audio", PeAudioModel, pe_audio, "audio_encoder"),
    ("pe_av_audio", PeAudioVideoModel, pe_audio_video, "audio_model.audio_encoder"),
    ("pe_av_video", PeVideoEncoder, lambda: pe_video().video_config, ""),
    ("pe_av_video", PeVideoModel, pe_video, "video_encoder"),
    ("pe_av_video", PeAudioVideoModel, pe_audio_video, "video_model.video_encoder"),
    ("w2v_bert", Wav2Vec2BertModel, w2v_bert, ""),
    ("w2v_bert", Wav2Vec2BertForCTC, w2v_bert, "wav2vec2_bert"),
    ("wavlm", WavLMModel, wavlm, ""),
    ("wavlm", WavLMForCTC, wavlm, "wavlm"),
    ("wavlm", WavLMForXVector, wavlm, "wavlm"),
    ("hubert", HubertModel, lambda: speech(HubertConfig, "hubert"), ""),
    ("hubert", HubertForCTC, lambda: speech(HubertConfig, "hubert"), "hubert"),
]


@pytest.mark.parametrize(
    ("key", "saved", "config", "at"), CASES, ids=[f"{c[0]}-{c[1].__name__}" for c in CASES]
)
def test_saved_by_transformers_loaded_by_us(tmp_path, key, saved, config, at, reports):
    torch.manual_seed(1)
    model = saved(config()).eval()
    model.save_pretrained(tmp_path)
    encoder = family(key).from_pretrained(str(tmp_path), **OPTIONS.get(key, {}))
    assert reports == []  # the other towers' weights are no news
    tower = model.get_submodule(at).state_dict()
    ours = encoder.backbone.state_dict()
    unused = [
        k for k in tower if k == "masked_spec_embed" or k.startswith(("predictor.", "pooler."))
    ]
    assert set(ours) == set(tower) - set(unused)  # of training, and ViT's pooler
    assert all(torch.equal(ours[k], tower[k]) for k in ours)
    assert not encoder.training
    assert not any(p.is_meta for p in encoder.parameters())

    again = family(key)(encoder.backbone_config.to_dict(), **encoder.options()).eval()
    again.load_state_dict(encoder.state_dict())
    clips = [encoder.preprocessor()(some_media(encoder, 2), 1.0)]
    assert torch.equal(encode(again, clips)[""], encode(encoder, clips)[""])


def test_files_of_older_versions(tmp_path):
    """Vision-only files from before transformers 5 carry a vision_model. prefix."""
    model = SiglipVisionModel(dual(SiglipConfig, "siglip").vision_config)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    bare = {k.removeprefix("vision_model."): v for k, v in load_file(file).items()}
    save_file({f"vision_model.{k}": v for k, v in bare.items()}, file, {"format": "pt"})
    ours = family("siglip").from_pretrained(str(tmp_path)).backbone.state_dict()
    assert all(torch.equal(ours[k], v) for k, v in model.state_dict().items())


def test_dinov3_files_of_older_versions(tmp_path):
    """Its blocks were called layer.0 and so on, without a model. before them."""
    model = DINOv3ViTModel(DINOv3ViTConfig(**CONFIGS["dinov3"]))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    old = {k.removeprefix("model."): v for k, v in load_file(file).items()}
    assert "layer.0.norm1.weight" in old
    save_file(old, file, {"format": "pt"})
    ours = family("dinov3").from_pretrained(str(tmp_path)).backbone.state_dict()
    assert all(torch.equal(ours[k], v) for k, v in model.state_dict().items())


def test_a_video_processors_own_file_is_used(tmp_path):
    VJEPA2Model(vjepa2()).save_pretrained(tmp_path)
    VJEPA2VideoProcessor(crop_size=28, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"sampling_rate": 16000}')
    made = family("vjepa2").from_pretrained(str(tmp_path)).preprocessor()
    assert (made.shortest, made.size, made.mean) == (round(32 * 32 / 28), (32, 32), (0.1, 0.2, 0.3))


def test_a_file_of_several_processors_has_each_encoders(tmp_path):
    PeAudioVideoModel(pe_audio_video()).save_pretrained(tmp_path)
    sections = {
        "processor_class": "PeAudioVideoProcessor",
        "feature_extractor": {"sampling_rate": 24_000},
        "video_processor": {"size": {"height": 24, "width": 24}, "image_std": [0.1, 0.2, 0.3]},
    }
    (tmp_path / "processor_config.json").write_text(json.dumps(sections))
    audio = family("pe_av_audio").from_pretrained(str(tmp_path)).preprocessor()
    assert audio.rate == 24_000
    video = family("pe_av_video").from_pretrained(str(tmp_path)).preprocessor()
    assert (video.size, video.std) == ((24, 24), (0.1, 0.2, 0.3))


def test_the_checkpoints_own_preprocessing_is_used(tmp_path):
    CLIPVisionModel(dual(CLIPConfig, "clip").vision_config).save_pretrained(tmp_path)
    CLIPImageProcessor(
        size={"shortest_edge": 40},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.1, 0.2, 0.3],
        resample=2,
    ).save_pretrained(tmp_path)
    made = family("clip").from_pretrained(str(tmp_path)).preprocessor()
    assert (made.shortest, made.size, made.resample, made.mean) == (
        40,
        (32, 32),
        2,
        (0.1, 0.2, 0.3),
    )


def test_clap_reads_the_checkpoints_own_bands(tmp_path):
    ClapAudioModel(clap().audio_config).save_pretrained(tmp_path)
    ClapFeatureExtractor(feature_size=16, frequency_min=20, hop_length=240).save_pretrained(
        tmp_path
    )
    made = family("clap").from_pretrained(str(tmp_path)).preprocessor()
    assert (made.low, made.hop, made.mels) == (20.0, 240, 16)


def test_a_checkpoint_without_preprocessing_says_so(tmp_path, caplog):
    CLIPVisionModel(dual(CLIPConfig, "clip").vision_config).save_pretrained(tmp_path)
    family("clip").from_pretrained(str(tmp_path))
    assert "has no preprocessor_config.json" in caplog.text


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape"])
@pytest.mark.parametrize(("saved", "prefix"), [(WhisperEncoder, ""), (WhisperModel, "encoder.")])
def test_a_checkpoint_that_does_not_fit_is_an_error(tmp_path, damage, saved, prefix, reports):
    saved(whisper()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    if damage == "missing":
        weights.pop(f"{prefix}layers.1.fc1.weight")
    elif damage == "unknown":
        weights[f"{prefix}layers.9.fc1.weight"] = torch.zeros(2)
    else:
        weights[f"{prefix}layers.1.fc1.weight"] = torch.zeros(3, 3)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match="fc1.weight|mismatched"):
        family("whisper").from_pretrained(str(tmp_path))
    (report,) = reports
    assert "fc1.weight" in report
    assert "decoder" not in report


@pytest.mark.parametrize("key", [key for key in KEYS if key != "whisper"])
def test_another_familys_checkpoint_is_refused(tmp_path, key):
    whisper().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(save({"x": torch.zeros(1)}))
    with pytest.raises(ValueError, match=f"'whisper'.*'{family(key).config_class.model_type}'"):
        family(key).from_pretrained(str(tmp_path))


def test_dtype(tmp_path):
    WhisperEncoder(whisper()).save_pretrained(tmp_path)
    encoder = family("whisper").from_pretrained(str(tmp_path), dtype="bfloat16")
    assert encoder.backbone.dtype == torch.bfloat16


def test_weight_norm_of_older_versions(tmp_path):
    """wav2vec 2.0 files on the hub name the positional convolution's norm weight_g, weight_v."""
    model = Wav2Vec2ForCTC(speech(Wav2Vec2Config, "wav2vec2"))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    for new, old in (
        ("parametrizations.weight.original0", "weight_g"),
        ("parametrizations.weight.original1", "weight_v"),
    ):
        save_file(
            {k.replace(new, old): v for k, v in load_file(file).items()}, file, {"format": "pt"}
        )
    assert any(k.endswith("weight_g") for k in load_file(file))
    ours = family("wav2vec2").from_pretrained(str(tmp_path)).backbone.state_dict()
    assert all(torch.equal(v, model.wav2vec2.state_dict()[k]) for k, v in ours.items())


def test_pvt_v2_is_in_its_fast_order_of_memory_after_loading_too(tmp_path):
    sizes = {
        "hidden_sizes": [8, 8, 16, 16],
        "num_attention_heads": [1, 1, 2, 2],
        "depths": [1, 1, 1, 1],
    }
    pvt = family("pvt_v2")
    built = pvt({**sizes, "image_size": 32})
    built.backbone.save_pretrained(tmp_path)
    for encoder in (built, pvt.from_pretrained(str(tmp_path))):
        patches = [p for p in encoder.backbone.parameters() if p.dim() == 4]
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in patches)
