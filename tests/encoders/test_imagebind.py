"""ImageBind's audio trunk: its published file, its segments, its filter banks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from encoders.encoder_families import Sound, build, encode, sound
from importing.originals import imagebind, make_imagebind

from avllm.encoders.imagebind import ImageBind
from avllm.models.checkpoint_format import find_backbone, fingerprint
from avllm.models.encoders import output_widths
from avllm.published import PublishedError

torch.set_num_threads(1)
GOLDEN = Path(__file__).resolve().parents[2] / "../shared/parity/video_llama_tiny"
HUGE = {"patches": (12, 19)}  # of a spectrogram of 128 x 204, stride 10


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "imagebind_huge.pth"
    torch.save(make_imagebind(**HUGE), path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("feature", ["cls", "pooled"])
def test_the_published_file_is_an_encoder(file: Path, feature: str) -> None:
    encoder = ImageBind.from_pretrained(str(file), feature=feature, heads=2)
    mel = torch.randn(3, 1, 128, 204)
    first, embedding = imagebind(make_imagebind(**HUGE), mel, heads=2, stride=10)
    expected = first if feature == "cls" else embedding
    (x,) = encoder(mel=mel).values()
    torch.testing.assert_close(x[:, 0, 0], expected, atol=1e-5, rtol=1e-5)
    assert encoder.out_dim == expected.shape[1]
    spec = {"type": "imagebind", "name": str(file), "feature": feature, "heads": 2}
    assert output_widths("audio", spec) == {"audio": expected.shape[1]}


def test_a_saved_folder_is_the_same_encoder(file: Path, tmp_path: Path) -> None:
    encoder = ImageBind.from_pretrained(str(file), heads=2, dtype="float32")
    encoder.backbone.save_pretrained(tmp_path / "folder")
    again = ImageBind.from_pretrained(str(tmp_path / "folder"), feature="cls")
    state = again.backbone.state_dict()
    for name, x in encoder.backbone.state_dict().items():
        assert torch.equal(state[name], x)
    assert again.backbone_config.num_attention_heads == 2


def test_a_published_file_has_a_hash(file: Path) -> None:
    before = fingerprint(str(file))
    assert before is not None
    assert find_backbone({"name": file.name, "sha256": before}, file.parent) == str(file)
    torch.save({"x": torch.ones(1)}, file)
    assert fingerprint(str(file)) != before


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("modality_trunks.audio.blocks.0.attn.bias_v", None),
        ("modality_trunks.audio.blocks.0.norm_3.weight", torch.ones(2)),
        ("modality_heads.audio.2.weight", torch.ones(12, 17)),
        ("modality_preprocessors.audio.pos_embedding_helper.pos_embed", torch.ones(1, 9, 16)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, change: torch.Tensor | None
) -> None:
    state = make_imagebind(**HUGE)
    state.pop(name, None)
    if change is not None:
        state[name] = change
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(PublishedError, match=name) as error:
        ImageBind.from_pretrained(str(tmp_path / "file.pth"), heads=2)
    assert error.value.reason == "weights"


def test_filter_banks_are_those_of_imagebinds_loader() -> None:
    with torch.device("meta"):
        made = ImageBind({"num_hidden_layers": 1}).preprocessor()
    media = sound(2.0, 16_000)
    bank = torchaudio.compliance.kaldi.fbank(
        (media.x - media.x.mean())[None],
        htk_compat=True,
        sample_frequency=16_000,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=128,
        dither=0.0,
        frame_length=25,
        frame_shift=10,
    )
    expected = torch.zeros(128, 204)
    expected[:, : len(bank)] = bank.T
    expected = (expected + 4.268) / 9.138
    mels = made(media, 2.0).inputs["mel"]
    assert mels.shape == (8, 1, 128, 204)
    torch.testing.assert_close(mels[0, 0], expected, atol=1e-5, rtol=1e-5)


def test_segments_are_spread_evenly_over_the_sound() -> None:
    encoder = build("imagebind", segments=4, seconds=0.5)
    clip = encoder.preprocessor()(sound(3.5, 16_000, start=1.0), 9.0)
    expected = [[1.0, 1.5], [2.0, 2.5], [3.0, 3.5], [4.0, 4.5]]
    torch.testing.assert_close(clip.span, torch.tensor(expected))
    place = round(2.1 * 16_000)
    loud = sound(3.5, 16_000).x.clone()
    loud[place : place + 100] += 5
    heard = encoder.preprocessor()(Sound(loud, 16_000, 1.0), 9.0)
    changed = (heard.inputs["mel"] - clip.inputs["mel"]).abs().amax((1, 2, 3)) > 1e-3
    assert changed.tolist() == [False, False, True, False]


@pytest.mark.parametrize("seconds", [0.01, 0.3, 0.7])
def test_a_short_sound_has_as_many_segments(seconds: float) -> None:
    encoder = build("imagebind", segments=4, seconds=0.5)
    clip = encoder.preprocessor()(sound(seconds, 16_000), seconds)
    assert clip.span.shape == (4, 2)
    assert clip.span[-1, 1].item() == pytest.approx(seconds)
    assert (clip.span.diff(dim=0) >= 0).all()
    assert encode(encoder, [clip])[""].isfinite().all()


def test_segments_may_cover_all_of_a_sound() -> None:
    encoder = build("imagebind", segments=None, seconds=0.5)
    clip = encoder.preprocessor()(sound(1.7, 16_000), 1.7)
    assert torch.equal(clip.span[1:, 0], clip.span[:-1, 1])
    assert clip.span.flatten()[[0, -1]].tolist() == pytest.approx([0.0, 1.7])
    assert len(clip.inputs["mel"]) == 4


@pytest.mark.parametrize("wrong", [{"seconds": 2.5}, {"segments": 0}, {"seconds": 0.0}])
def test_segments_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        build("imagebind", **wrong)


@torch.no_grad()
@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"{GOLDEN.name} is not beside the repository")
def test_the_numbers_of_the_original() -> None:
    dims = json.loads((GOLDEN / "dims.json").read_text())["imagebind"]
    golden = np.load(GOLDEN / "golden.npz")
    mel = torch.from_numpy(golden["mel"])
    for feature, name in (("cls", "imagebind_trunk_cls"), ("pooled", "imagebind_embedding")):
        encoder = ImageBind.from_pretrained(
            str(GOLDEN / "imagebind_huge.pth"), feature=feature, heads=dims["audio_heads"]
        )
        (x,) = encoder(mel=mel.flatten(0, 1)).values()
        expected = torch.from_numpy(golden[name]).flatten(0, 1)
        torch.testing.assert_close(x[:, 0, 0], expected, atol=1e-4, rtol=1e-4)
