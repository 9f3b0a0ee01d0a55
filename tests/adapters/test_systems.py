"""What the literature's adapters promise beyond the contract: each paper's own claim in numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from avllm.adapters._attention import Attention
from avllm.adapters.base import Adapter, Prompt, in_variant
from avllm.adapters.causal_qformer import CausalQFormer
from avllm.adapters.region_packer import RegionPacker
from avllm.adapters.slowfast_tokens import spread
from avllm.adapters.stc import STC
from avllm.adapters.token_merge import TokenMerge
from avllm.objectives.query_diversity import mean_cosine
from avllm.registry import build
from avllm.tokens import Grid, Tokens

torch.set_num_threads(1)


def clip(steps: int, tokens: int, width: int, step: float = 0.5, seed: int = 0) -> Tokens:
    """One clip of evenly spaced steps, all of whose tokens are real."""
    generator = torch.Generator().manual_seed(seed)
    edges = torch.arange(steps + 1) * step
    return Tokens(
        torch.randn(1, steps, tokens, width, generator=generator),
        torch.ones(1, steps, tokens, dtype=torch.bool),
        torch.stack([edges[:-1], edges[1:]], -1)[None],
    )


def make(name: str, widths: dict[str, int], llm_dim: int = 8, **options: Any) -> Adapter:
    torch.manual_seed(0)
    adapter: Adapter = build("adapters", {"type": name, **options}, widths, llm_dim)
    return adapter.eval()


def changed(tokens: Tokens, step: int) -> Tokens:
    x = tokens.x.clone()
    x[:, step] += 1
    return tokens.with_x(x)


# ---- FAVOR ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_later_frame_changes_nothing_before_it() -> None:
    sizes = {"num_queries": 2, "dim": 8, "layers": 2, "heads": 2}
    adapter = make(
        "causal_qformer", {"av": 6}, stream="av", seconds=1.0, causal_dim=8, causal_heads=2, **sizes
    )
    assert isinstance(adapter, CausalQFormer)
    before, after = clip(6, 3, 6), changed(clip(6, 3, 6), 4)
    assert torch.equal(adapter.with_past(before)[:, :4], adapter.with_past(after)[:, :4])
    assert not torch.equal(adapter.with_past(before)[:, 5], adapter.with_past(after)[:, 5])
    windows, others = adapter.adapt(before).x, adapter.adapt(after).x
    assert torch.equal(windows[:, :2], others[:, :2])  # both end at or before the fourth frame
    assert not torch.equal(windows[:, 2], others[:, 2])


def test_diversity_is_the_mean_cosine_of_different_queries() -> None:
    orthogonal = torch.eye(4)[None, None]  # (1, 1, 4, 4)
    real = torch.ones(1, 1, 4, dtype=torch.bool)
    assert float(mean_cosine(orthogonal, real)) == pytest.approx(0.0, abs=1e-6)
    assert float(mean_cosine(torch.ones(1, 1, 4, 4), real)) == pytest.approx(1.0)
    tokens = clip(3, 4, 5)
    tokens.mask[0, 1, 2:] = False
    tokens.mask[0, 2, 1:] = False  # one token alone has no other
    steps = []
    for step in range(2):
        own = tokens.x[0, step][tokens.mask[0, step]]
        cosines = []
        for i, a in enumerate(own):
            others = [b for j, b in enumerate(own) if j != i]
            cosines += [float(torch.cosine_similarity(a, b, dim=0)) for b in others]
        steps.append(sum(cosines) / len(cosines))
    assert float(mean_cosine(tokens.x, tokens.mask)) == pytest.approx(sum(steps) / 2, abs=1e-6)


def test_frames_and_sounds_of_half_a_second_stand_side_by_side() -> None:
    widths = {"video": 5, "audio": 3}
    options = {"streams": ["video", "audio"], "seconds": 0.5, "tokens": "keep", "absent": "zeros"}
    adapter = make("sync_concat", widths, **options)
    video, audio = clip(4, 32, 5), clip(100, 1, 3, step=0.02)
    made = adapter({"video": video, "audio": audio})["av"]
    assert made.x.shape == (1, 4, 32, 8)
    assert torch.equal(made.x[0, 1, :, :5], video.x[0, 1])
    assert torch.equal(made.x[0, 1, :25, 5:], audio.x[0, 25:50, 0])
    assert not made.x[0, 1, 25:, 5:].any()
    silent = adapter({"video": video})["av"]
    no_sound = audio.with_x(torch.zeros_like(audio.x))
    assert torch.equal(silent.x, adapter({"video": video, "audio": no_sound})["av"].x)


def test_streams_that_are_put_side_by_side_end_there_if_asked() -> None:
    streams = {"video": clip(2, 1, 5), "audio": clip(4, 1, 3, step=0.25), "other": clip(1, 1, 8)}
    widths = {"video": 5, "audio": 3, "other": 8}
    options = {"streams": ["video", "audio"], "seconds": 0.5}
    kept = make("sync_concat", widths, **options)
    ending = make("sync_concat", widths, consume=True, **options)
    assert list(kept(streams)) == ["video", "audio", "other", "av"]
    assert list(ending(streams)) == ["other", "av"]
    assert ending.out_widths == {"other": 8, "av": 8}
    grids = {name: Grid(tokens.span[0], tokens.mask[0]) for name, tokens in streams.items()}
    assert list(ending.output_grid(grids)) == ["other", "av"]
    silent = {"video": streams["video"]}
    assert list(ending(silent)) == ["av"]


# ---- CAT -----------------------------------------------------------------------------------------


def question(words: Tensor, real: int) -> Prompt:
    mask = torch.arange(words.shape[1])[None] < real
    return Prompt(words, mask, torch.zeros(1, words.shape[1], dtype=torch.long), ["?"])


@torch.no_grad()
def test_clues_follow_the_question_and_not_its_padding() -> None:
    streams = ["video", "audio"]
    sizes = {"num_queries": 2, "dim": 8, "layers": 1, "heads": 2}
    adapter = make("clue_aggregator", {"video": 6, "audio": 4}, streams=streams, **sizes)
    given = {"video": clip(3, 2, 6), "audio": clip(5, 1, 4)}
    words = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1))
    asked = adapter(given, question(words[:, :3], 3))
    padded = adapter(given, question(words, 3))
    other = adapter(given, question(words.flip(1), 3))
    for stream in streams:
        assert asked[stream].x.shape == (1, 1, 2, 8)
        assert torch.allclose(asked[stream].x, padded[stream].x, atol=1e-6)
        assert not torch.allclose(asked[stream].x, other[stream].x, atol=1e-5)


# ---- GAMA ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_without_other_layers_it_is_self_attention() -> None:
    adapter = make("layer_aggregator", {"audio": 6}, stream="audio", heads=2)
    tokens = clip(4, 3, 6)
    x, real = tokens.flat()
    (block,) = adapter.blocks
    assert torch.equal(adapter({"audio": tokens})["audio"].x.flatten(1, 2), block(x, x, real))


@torch.no_grad()
def test_inner_layers_are_read_and_consumed() -> None:
    widths = {"audio": 6, "audio.4": 6}
    adapter = make("layer_aggregator", widths, stream="audio", layers=["audio.4"], heads=2)
    last, inner = clip(4, 1, 6), clip(4, 1, 6, seed=1)
    made = adapter({"audio": last, "audio.4": inner})
    other = adapter({"audio": last, "audio.4": changed(inner, 2)})
    assert list(made) == ["audio"]
    assert not torch.equal(made["audio"].x, other["audio"].x)


# ---- Llama-MTSK ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("rate", "steps"), [(2, 4), (3, 3), (7, 1)])
def test_a_variant_names_the_rate(rate: int, steps: int) -> None:
    adapter = make("pool_mlp", {"audio": 4}, stream="audio", rates=[2, 3, 7], mode="stack")
    tokens = clip(7, 1, 4)
    with in_variant(f"video=5,audio={rate}"):
        made = adapter({"audio": tokens})["audio"]
        grid = adapter.output_grid({"audio": Grid(tokens.span[0], tokens.mask[0])})["audio"]
    assert made.x.shape[1] == grid.places == steps
    # A stack is the steps one after the other, filled with zeros.
    missing = torch.zeros(1, steps * rate - 7, 4)
    stacked = torch.cat([tokens.x[:, :, 0], missing], 1).view(1, steps, rate * 4)
    assert torch.equal(made.x[:, :, 0], adapter.mlps[str(rate)](stacked))


def test_a_rate_that_does_not_exist_is_named() -> None:
    adapter = make("pool_mlp", {"audio": 4}, stream="audio", rates=[2])
    with in_variant("audio=5"), pytest.raises(ValueError, match="rate 5"):
        adapter({"audio": clip(4, 1, 4)})


# ---- LITA ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_slow_and_fast_tokens_are_356() -> None:
    adapter = make("slowfast_tokens", {"video": 2}, stream="video", to="video_slow", pool=2)
    tokens = clip(100, 256, 2)
    made = adapter({"video": tokens})
    assert int(made["video"].mask.sum()) + int(made["video_slow"].mask.sum()) == 356
    assert torch.allclose(made["video"].x[0, 7, 0], tokens.x[0, 7].mean(0), atol=1e-6)
    square = tokens.x[0, 12, [0, 1, 16, 17]].mean(0)  # upper left of the first slow frame
    assert torch.allclose(made["video_slow"].x[0, 0, 0], square, atol=1e-6)


def test_slow_frames_are_spread_over_those_that_exist() -> None:
    real = torch.tensor([[True] * 8, [True, False, True] + [False] * 5])
    index, filled = spread(real, 4)
    assert index[0].tolist() == [1, 3, 5, 7]
    assert index[1, :2].tolist() == [0, 2]
    assert filled.tolist() == [[True] * 4, [True, True, False, False]]


# ---- BLIP-3-Video --------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pool", "transformer", "st_attn_pool", "ttm"])
def test_any_number_of_frames_becomes_the_same_tokens(kind: str) -> None:
    sizes = {"num_tokens": 4, "heads": 2, "memory": 6, "read": 2}
    adapter = make("temporal_encoder", {"video": 6}, stream="video", kind=kind, **sizes)
    for frames in (1, 5, 40):
        made = adapter({"video": clip(frames, 4, 6)})["video"]
        assert made.x.shape == (1, 1, 4, 6)
        assert made.span[0, 0].tolist() == [0.0, frames * 0.5]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "knows_order"), [("pool", False), ("ttm", True)])
def test_only_what_reads_in_order_knows_it(kind: str, knows_order: bool) -> None:
    sizes = {"num_tokens": 4, "heads": 2, "memory": 6, "read": 2}
    adapter = make("temporal_encoder", {"video": 6}, stream="video", kind=kind, **sizes)
    tokens = clip(5, 4, 6)
    back = tokens.with_x(tokens.x.flip(1))
    forth = adapter({"video": tokens})["video"].x
    same = torch.allclose(forth, adapter({"video": back})["video"].x, atol=1e-6)
    assert same is not knows_order


# ---- LLaVA-ST ------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_box_attends_to_itself_as_in_a_mask_of_blocks() -> None:
    adapter = make("region_packer", {"video": 6}, stream="video", time=2, space=2, heads=2)
    assert isinstance(adapter, RegionPacker)
    tokens = clip(4, 16, 6)
    numbers = torch.arange(4 * 16).view(1, 4, 16)
    members = adapter.boxes(numbers)[0].flatten(0, 1)  # (8, 8): the tokens of each box
    x = tokens.x.flatten(1, 2)  # (1, 64, 6)
    packed = torch.stack([x[0, own].mean(0) for own in members])[None]  # (1, 8, 6)
    mask = torch.zeros(1, 8, 64, dtype=torch.bool)
    for box, own in enumerate(members):
        mask[0, box, own] = True
    expected = packed + adapter.attention(packed, x, mask)
    made = adapter.adapt(tokens)
    assert made.x.shape == (1, 2, 4, 6)
    assert torch.allclose(made.x.flatten(1, 2), expected, atol=1e-5)
    # The first box holds the upper left square of the first two frames.
    assert members[0].tolist() == [0, 1, 4, 5, 16, 17, 20, 21]


# ---- VideoLLaMA2 ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("padding", "steps", "tokens"), [(0, 4, 144), (1, 5, 169)], ids=["paper", "released weights"]
)
def test_eight_frames_of_576_patches(padding: int, steps: int, tokens: int) -> None:
    with torch.device("meta"):
        adapter = build(
            "adapters",
            {"type": "stc", "stream": "video", "padding": padding},
            {"video": 1024},
            4096,
        )
    assert isinstance(adapter, STC)
    grid = Grid(torch.zeros(8, 2), torch.ones(8, 576, dtype=torch.bool))
    made = adapter.grid(grid)
    assert (made.steps, made.tokens, made.places) == (steps, tokens, steps * tokens)


def test_a_padded_convolution_joins_two_steps_at_most() -> None:
    """It would leave out the end of a clip, or not, by the length of its neighbours in a batch."""
    with pytest.raises(ValueError, match="time 3"):
        make("stc", {"video": 4}, stream="video", time=3, padding=1)


# ---- OneEncoder ----------------------------------------------------------------------------------


def test_a_new_modality_changes_no_other() -> None:
    both = make(
        "universal_projection", {"video": 6, "audio": 4}, streams=["video", "audio"], heads=2
    )
    video = clip(3, 2, 6)
    before = both({"video": video})["video"].x.detach().clone()
    new = [p for name, p in both.named_parameters() if name in _of("audio")]
    loss = both({"audio": clip(4, 1, 4)})["audio"].x.square().sum()
    for parameter, gradient in zip(new, torch.autograd.grad(loss, new), strict=True):
        parameter.data -= 0.1 * gradient
    assert torch.equal(both({"video": video})["video"].x, before)


def _of(stream: str) -> set[str]:
    return {f"enter.{stream}.weight", f"enter.{stream}.bias", f"modality.{stream}"}


# ---- SoundCLIP -----------------------------------------------------------------------------------


@torch.no_grad()
def test_substitution_keeps_length_places_and_mask() -> None:
    adapter = make("substitute", {"video": 3, "audio": 3}, stream="video", by="audio")
    video, audio = clip(4, 2, 3), clip(8, 1, 3, step=0.25)
    video.mask[0, 3, 1] = False
    made = adapter({"video": video, "audio": audio})
    assert list(made) == ["video"]
    assert torch.equal(made["video"].mask, video.mask)
    assert torch.equal(made["video"].span, video.span)
    assert torch.equal(made["video"].x[0, 1, 0], audio.x[0, 2, 0])  # the earlier of two as near
    assert torch.equal(made["video"].x[0, 1, 0], made["video"].x[0, 1, 1])


@torch.no_grad()
def test_patches_that_sound_alike_stay() -> None:
    adapter = make("substitute", {"video": 3, "audio": 3}, stream="video", by="audio", keep=1)
    video, audio = clip(2, 4, 3), clip(2, 1, 3, seed=3)
    video.x[0, 1, 2] = 2 * audio.x[0, 1, 0]  # the same direction
    made = adapter({"video": video, "audio": audio})["video"].x
    assert torch.equal(made[0, 1, 2], video.x[0, 1, 2])
    assert torch.equal(made[0, 1, [0, 1, 3]], audio.x[0, 1].expand(3, -1))


# ---- token merging -------------------------------------------------------------------------------


def test_still_clips_become_few_tokens_and_lively_ones_the_bound() -> None:
    adapter = make("token_merge", {"video": 6}, stream="video", most=8)
    assert isinstance(adapter, TokenMerge)
    still = torch.randn(1, 6, generator=torch.Generator().manual_seed(0)).expand(40, -1)
    lively = clip(40, 1, 6).x[0, :, 0]
    assert adapter.merge(still).shape == (1, 6)
    assert torch.allclose(adapter.merge(still), still[:1], atol=1e-6)
    merged = adapter.merge(lively)
    assert len(merged) <= 8
    alike = make("token_merge", {"video": 6}, stream="video", most=20, alike=1.0)
    assert isinstance(alike, TokenMerge)
    assert len(alike.merge(lively)) == 20


def test_half_precision_counts_all_that_a_token_stands_for() -> None:
    adapter = make("token_merge", {"video": 6}, stream="video", most=1)
    assert isinstance(adapter, TokenMerge)
    x = torch.cat([torch.zeros(600, 6), torch.ones(600, 6)]).bfloat16()
    merged = adapter.merge(x)
    assert merged.dtype is torch.bfloat16
    assert torch.allclose(merged.float(), torch.full((1, 6), 0.5), atol=1e-2)


# ---- attention -----------------------------------------------------------------------------------


@torch.no_grad()
def test_a_query_that_sees_nothing_reads_nothing() -> None:
    torch.manual_seed(0)
    attention = Attention(4, 2)
    x, keys = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    real = torch.ones(2, 5, dtype=torch.bool)
    real[1] = False
    made = attention(x, keys, real)
    assert not made[1].any()
    assert torch.allclose(made[0], attention(x[:1], keys[:1], real[:1])[0])
