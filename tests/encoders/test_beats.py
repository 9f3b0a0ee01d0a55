"""BEATs: its published files, its filter banks, and the arithmetic of its attention, by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torchaudio
from encoders.encoder_families import CONFIGS, build, encode, sound
from torch import Tensor

from avllm.encoders._beats_model import BeatsBlock, BeatsConfig, BeatsModel, distance_buckets
from avllm.encoders.beats import BEATs, published_name
from avllm.models.encoders import output_widths
from avllm.published import PublishedError

torch.set_num_threads(1)
SETTINGS: dict[str, Any] = {
    "encoder_layers": 3,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 64,
    "encoder_attention_heads": 2,
    "activation_fn": "gelu",
    "dropout": 0.0,
    "layer_norm_first": False,
    "deep_norm": True,
    "conv_bias": False,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "relative_position_embedding": True,
    "num_buckets": 32,
    "max_distance": 80,
    "gru_rel_pos": True,
    "input_patch_size": 16,
    "embed_dim": 24,
    "finetuned_model": True,
}


def shapes(s: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a published file."""
    inner, width, mlp = s["embed_dim"], s["encoder_embed_dim"], s["encoder_ffn_embed_dim"]
    heads, side = s["encoder_attention_heads"], s["input_patch_size"]
    found: dict[str, tuple[int, ...]] = {
        "post_extract_proj.weight": (width, inner),
        "post_extract_proj.bias": (width,),
        "patch_embedding.weight": (inner, 1, side, side),
        "encoder.pos_conv.0.bias": (width,),
        "encoder.pos_conv.0.weight_g": (1, 1, s["conv_pos"]),
        "encoder.pos_conv.0.weight_v": (width, width // s["conv_pos_groups"], s["conv_pos"]),
        "encoder.layer_norm.weight": (width,),
        "encoder.layer_norm.bias": (width,),
        "layer_norm.weight": (inner,),
        "layer_norm.bias": (inner,),
    }
    for number in range(s["encoder_layers"]):
        layer = f"encoder.layers.{number}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found[f"{layer}self_attn.{name}.weight"] = (width, width)
            found[f"{layer}self_attn.{name}.bias"] = (width,)
        found[f"{layer}self_attn.grep_linear.weight"] = (8, width // heads)
        found[f"{layer}self_attn.grep_linear.bias"] = (8,)
        found[f"{layer}self_attn.grep_a"] = (1, heads, 1, 1)
        found[f"{layer}self_attn.relative_attention_bias.weight"] = (s["num_buckets"], heads)
        for name, inside, outside in (("fc1", width, mlp), ("fc2", mlp, width)):
            found[f"{layer}{name}.weight"] = (outside, inside)
            found[f"{layer}{name}.bias"] = (outside,)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            found[f"{layer}{name}.weight"] = (width,)
            found[f"{layer}{name}.bias"] = (width,)
    return found


def make_state() -> dict[str, Tensor]:
    """Random weights of a fine-tuned model; the layers share the distances' table."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: 0.3 * torch.randn(*shape, generator=generator)
        for name, shape in shapes(SETTINGS).items()
    }
    for name in state:
        if name.endswith("relative_attention_bias.weight"):
            state[name] = state["encoder.layers.0.self_attn.relative_attention_bias.weight"]
    return state | {"predictor.weight": torch.randn(5, 32), "predictor.bias": torch.randn(5)}


def write(path: Path, state: dict[str, Tensor], **changes: Any) -> Path:
    torch.save({"cfg": SETTINGS | changes, "model": state}, path)
    return path


def test_the_published_names_and_shapes_are_those_of_the_model_at_full_size() -> None:
    full = SETTINGS | {
        "encoder_layers": 12,
        "encoder_embed_dim": 768,
        "encoder_ffn_embed_dim": 3072,
        "encoder_attention_heads": 12,
        "conv_pos": 128,
        "conv_pos_groups": 16,
        "num_buckets": 320,
        "embed_dim": 512,
    }
    with torch.device("meta"):
        state = BeatsModel(BeatsConfig()).state_dict()
    ours = {published_name(name): tuple(x.shape) for name, x in state.items()}
    shared = "self_attn.relative_attention_bias.weight"  # published with each layer
    theirs = shapes(full)
    assert ours == {n: s for n, s in theirs.items() if not n.endswith(shared) or "s.0." in n}


@torch.no_grad()
def test_a_published_file_is_an_encoder(tmp_path: Path) -> None:
    path = write(tmp_path / "BEATs.pt", make_state())
    encoder = BEATs.from_pretrained(str(path), layers=[0, 1, -1], window=1.0)
    assert encoder.backbone_config.max_distance == 80
    assert output_widths("audio", {"type": "beats", "name": str(path)}) == {"audio": 32}
    clip = encoder.preprocessor()(sound(1.7, 16_000), 1.7)
    bank = clip.inputs["input_values"][0]  # the first window is full
    expected = by_hand(bank)
    own = encoder(**clip.inputs)
    for name, number in (("0", 0), ("1", 1), ("", 3)):
        ours = own[name][0].flatten(0, 1)
        torch.testing.assert_close(ours, expected[number], atol=1e-4, rtol=1e-4)

    encoder.backbone.save_pretrained(tmp_path / "folder")
    again = BEATs.from_pretrained(str(tmp_path / "folder"), window=1.0)
    assert torch.equal(again(**clip.inputs)[""], own[""])


def by_hand(bank: Tensor) -> list[Tensor]:
    """The embedding and each block's output of one spectrogram, token by token and head by head."""
    state = make_state()

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias)

    kernel = state["patch_embedding.weight"].flatten(1)
    patches = []
    for step in range(bank.shape[0] // 16):
        for band in range(8):
            patch = bank[16 * step : 16 * step + 16, 16 * band : 16 * band + 16]
            patches.append(kernel @ patch.flatten())
    x = linear(norm(torch.stack(patches), "layer_norm"), "post_extract_proj")  # (N, D)
    tokens = len(x)

    g, v = (state[f"encoder.pos_conv.0.weight_{part}"] for part in "gv")
    weight = g * v / v.square().sum((0, 1), keepdim=True).sqrt()  # one length a place of the kernel
    around = torch.nn.functional.conv1d(
        torch.nn.functional.pad(x.T, (8, 7)), weight, state["encoder.pos_conv.0.bias"], groups=4
    )
    x = norm(x + torch.nn.functional.gelu(around.T), "encoder.layer_norm")
    states = [x]
    table = state["encoder.layers.0.self_attn.relative_attention_bias.weight"]
    alpha = (2 * 3) ** 0.25
    for number in range(3):
        layer = f"encoder.layers.{number}."
        q, k, v = (linear(x, f"{layer}self_attn.{part}_proj") for part in "qkv")
        heads = []
        for head in range(2):
            own = slice(16 * head, 16 * head + 16)
            gate = torch.sigmoid(
                linear(q[:, own], f"{layer}self_attn.grep_linear").view(tokens, 2, 4).sum(-1)
            )
            a = state[f"{layer}self_attn.grep_a"][0, head, 0, 0]
            factor = gate[:, 0] * (gate[:, 1] * a - 1) + 2  # (N,)
            scores = q[:, own] @ k[:, own].T / 4
            for query in range(tokens):
                for key in range(tokens):
                    scores[query, key] += factor[query] * table[bucket(key - query), head]
            heads.append(scores.softmax(1) @ v[:, own])
        attended = linear(torch.cat(heads, 1), f"{layer}self_attn.out_proj")
        x = norm(alpha * x + attended, f"{layer}self_attn_layer_norm")
        mlp = linear(torch.nn.functional.gelu(linear(x, f"{layer}fc1")), f"{layer}fc2")
        x = norm(alpha * x + mlp, f"{layer}final_layer_norm")
        states.append(x)
    return states


def bucket(relative: int, buckets: int = 32, farthest: int = 80) -> int:
    """T5's bucket of a distance: half of them for later keys, half of each half exact."""
    later = buckets // 2 if relative > 0 else 0
    distance = abs(relative)
    exact = buckets // 4
    if distance < exact:
        return later + distance
    share = math.log(distance / exact) / math.log(farthest / exact)
    return later + min(exact + int(share * exact), buckets // 2 - 1)


def test_buckets_by_hand() -> None:
    found = distance_buckets(496, 320, 800)
    # Below 80 each distance has a bucket; 160 is 80 + 80 * log(2) / log(10) = 104.08; keys after
    # the query are 160 further on.
    expected = {0: 0, -1: 1, -79: 79, -80: 80, -160: 104, 1: 161, 79: 239, 80: 240, 160: 264}
    for relative, number in expected.items():
        query = max(0, -relative)
        assert found[query, query + relative] == number, relative
    assert distance_buckets(900, 320, 800)[899, 0] == 159  # the last holds all beyond
    small = distance_buckets(100, 32, 80)
    assert small[50].tolist() == [bucket(key - 50) for key in range(100)]


def test_the_gate_by_hand() -> None:
    block = BeatsBlock(BeatsConfig(**{**CONFIGS["beats"], "hidden_size": 4}))  # 2 heads of 2
    with torch.no_grad():
        block.grep_linear.weight.zero_()
        block.grep_linear.weight[:4, 0] = 0.25  # the four rows of a gate are added
        block.grep_linear.weight[4:, 1] = 0.25
        block.grep_linear.bias.zero_()
        block.grep_a[0, :, 0, 0] = torch.tensor([1.0, 3.0])
    q = torch.tensor([math.log(3), 0.0]).expand(1, 2, 1, 2)  # sigmoids 0.75 and 0.5
    factor = block.gate(q)[0, :, 0, 0]
    expected = torch.tensor([0.75 * (0.5 * 1 - 1) + 2, 0.75 * (0.5 * 3 - 1) + 2])
    torch.testing.assert_close(factor, expected)


def test_filter_banks_are_those_of_the_published_code() -> None:
    with torch.device("meta"):
        made = BEATs({"num_hidden_layers": 1}).preprocessor()
    assert (made.steps, made.tokens, made.unit_samples, made.reach) == (62, 8, 158_720, 158_960)
    media = sound(12.0, 16_000)
    wave = media.x[:158_960][None] * 2**15
    bank = torchaudio.compliance.kaldi.fbank(
        wave, num_mel_bins=128, sample_frequency=16_000, frame_length=25, frame_shift=10
    )
    clip = made(media, 12.0)
    assert torch.equal(clip.inputs["input_values"][0], (bank - 15.41663) / (2 * 6.55582))
    assert clip.inputs["step_mask"].sum(1).tolist() == [62, 13]
    assert clip.span[:2].flatten().tolist() == pytest.approx([0, 0.16, 0.16, 0.32])


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    """A short window's steps are those of a model that gets no padding."""
    encoder = build("beats", window=1.6)
    short = encoder.preprocessor()(sound(0.24, 16_000), 1.0)  # three whole steps of 8 frames
    padded = encode(encoder, [short])[""][0]
    unpadded = {name: value.clone() for name, value in short.inputs.items()}
    unpadded["input_values"] = unpadded["input_values"][:, :24]
    unpadded["step_mask"] = unpadded["step_mask"][:, :3]
    encoder.steps = 3
    torch.testing.assert_close(encoder(**unpadded)[""][0], padded[:3], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("encoder.layers.1.self_attn.grep_a", None),
        ("encoder.layers.1.self_attn.grep_b", torch.ones(2)),
        ("encoder.layers.2.self_attn.relative_attention_bias.weight", torch.ones(32, 2)),
        ("patch_embedding.weight", torch.ones(24, 1, 8, 8)),
        ("encoder.layers.3.fc1.weight", torch.ones(64, 32)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, change: Tensor | None
) -> None:
    state = make_state()
    state.pop(name, None)
    if change is not None:
        state[name] = change
    path = write(tmp_path / "BEATs.pt", state)
    with pytest.raises(PublishedError, match=name) as error:
        BEATs.from_pretrained(str(path))
    assert error.value.reason == "weights"


@pytest.mark.parametrize(
    ("setting", "value"), [("deep_norm", False), ("gru_rel_pos", False), ("activation_fn", "glu")]
)
def test_settings_of_another_architecture_are_refused(
    tmp_path: Path, setting: str, value: Any
) -> None:
    path = write(tmp_path / "BEATs.pt", make_state(), **{setting: value})
    with pytest.raises(PublishedError, match=setting) as error:
        BEATs.from_pretrained(str(path))
    assert error.value.reason == "settings"
    torch.save(make_state(), path)
    with pytest.raises(PublishedError, match="cfg") as error:
        BEATs.from_pretrained(str(path))
    assert error.value.reason == "settings"


def test_a_file_that_runs_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "BEATs.pt"
    torch.save({"cfg": SETTINGS, "model": make_state(), "hook": print}, path)
    with pytest.raises(PublishedError) as error:
        BEATs.from_pretrained(str(path))
    assert error.value.reason == "damaged"
