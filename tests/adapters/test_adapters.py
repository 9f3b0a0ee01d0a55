"""What single adapters promise beyond the contract."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from avllm.adapters.base import time_windows
from avllm.registry import build
from avllm.tokens import Grid, Tokens


def tokens(x: Tensor, seconds: float = 0.5) -> Tokens:
    b, t, p, _ = x.shape
    edges = torch.arange(t + 1) * seconds
    span = torch.stack([edges[:-1], edges[1:]], 1).expand(b, t, 2)
    return Tokens(x, torch.ones(b, t, p, dtype=torch.bool), span)


def test_qformer_is_transformers_qformer_with_the_same_weights() -> None:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    theirs = Blip2QFormerModel(
        Blip2QFormerConfig(**sizes, encoder_hidden_size=6, cross_attention_frequency=2)
    ).eval()
    spec = {
        "type": "qformer",
        "stream": "video",
        "num_queries": 5,
        "dim": 8,
        "layers": 4,
        "heads": 2,
        "per": "clip",
    }
    ours = build("adapters", spec, {"video": 6}, 10).eval()
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("embeddings.")}
    missing, unexpected = ours.qformer.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(k.startswith("embeddings.") for k in missing)
    given = tokens(torch.randn(2, 3, 4, 6))
    given.mask[1, 2:] = False  # a shorter clip
    seen = ours({"video": given})["video"].x  # (B, 1, Q, D)
    x, mask = given.flat()
    expected = theirs(
        query_embeds=ours.query_tokens.expand(2, -1, -1),
        encoder_hidden_states=x,
        encoder_attention_mask=mask.long(),
    ).last_hidden_state
    assert torch.allclose(seen[:, 0], expected, atol=1e-6)


def test_qformer_by_frame_reads_each_frame_alone() -> None:
    torch.manual_seed(0)
    spec = {
        "type": "qformer",
        "stream": "video",
        "num_queries": 2,
        "dim": 8,
        "layers": 2,
        "heads": 2,
    }
    adapter = build("adapters", spec | {"cross_every": 1}, {"video": 6}, 8).eval()
    x = torch.randn(1, 4, 3, 6)
    before = adapter({"video": tokens(x)})["video"].x
    x[0, 2] += 1.0
    after = adapter({"video": tokens(x)})["video"].x
    assert [bool((before[0, i] != after[0, i]).any()) for i in range(4)] == [
        False,
        False,
        True,
        False,
    ]


def test_windows_hold_each_step_once() -> None:
    span = tokens(torch.zeros(1, 9, 1, 1), 0.1).span
    windows = time_windows(span, torch.ones(1, 9, dtype=torch.bool), 0.25)
    assert windows.index[windows.mask].sort().values.tolist() == list(range(9))
    assert windows.span[0].flatten().tolist() == pytest.approx(
        [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 0.9]
    )


def test_temporal_pool_by_hand() -> None:
    given = tokens(torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0]).view(1, 5, 1, 1))
    given.mask[0, 3] = False
    made = build(
        "adapters", {"type": "temporal_pool", "stream": "video", "seconds": 1.0}, {"video": 1}, 1
    )({"video": given})["video"]
    assert made.x.flatten().tolist() == [2.0, 5.0, 9.0]  # 1 and 3; 5 alone, the 7 is masked; 9
    assert made.span[0].tolist() == [[0.0, 1.0], [1.0, 2.0], [2.0, 2.5]]


def test_temporal_maximum_by_hand() -> None:
    given = tokens(
        torch.tensor([[-1.0, 3.0], [-3.0, 4.0], [5.0, 5.0], [7.0, 7.0], [-9.0, 0.0]]).view(
            1, 5, 1, 2
        )
    )
    given.mask[0, 3:] = False
    spec = {"type": "temporal_pool", "stream": "video", "seconds": 1.0, "reduce": "max"}
    made = build("adapters", spec, {"video": 2}, 2)({"video": given})["video"]
    assert made.x[0, :, 0].tolist() == [
        [-1.0, 4.0],
        [5.0, 5.0],
    ]  # of each feature by itself; the 7 is masked


def test_the_maximum_over_a_whole_clip_is_that_over_its_windows() -> None:
    torch.manual_seed(0)
    given = tokens(torch.randn(3, 6, 2, 4))
    given.mask[1, 4:] = False
    given.mask[2] = False  # an absent clip

    def pooled(seconds: float) -> tuple[Tensor, Tensor]:
        x = given.x.clone().requires_grad_()
        spec = {"type": "temporal_pool", "stream": "video", "seconds": seconds, "reduce": "max"}
        made = build("adapters", spec, {"video": 4}, 4)({"video": given.with_x(x)})["video"]
        whole = made.x.masked_fill(~made.mask[..., None], -torch.inf).amax(1).nan_to_num(neginf=0.0)
        whole.square().sum().backward()
        assert x.grad is not None
        return whole, x.grad

    (whole, gradient), (windows, expected) = pooled(1000.0), pooled(1.0)
    assert torch.equal(whole, windows)
    assert torch.equal(gradient, expected)
    assert not gradient[2].any()


def test_learned_positions_beyond_the_table_are_squeezed_into_it() -> None:
    adapter = build(
        "adapters",
        {"type": "position", "stream": "video", "kind": "learned", "max_steps": 3},
        {"video": 1},
        1,
    )
    with torch.no_grad():
        adapter.embedding.copy_(torch.tensor([[0.0], [10.0], [20.0]]))
    made = adapter({"video": tokens(torch.zeros(1, 5, 1, 1))})["video"].x
    assert made.flatten().tolist() == [0.0, 5.0, 10.0, 15.0, 20.0]
    short = adapter({"video": tokens(torch.zeros(1, 2, 1, 1))})["video"].x
    assert short.flatten().tolist() == [0.0, 10.0]  # within the table a step is its own entry


def test_positions_in_seconds_follow_the_clock_and_not_the_index() -> None:
    adapter = build(
        "adapters", {"type": "position", "stream": "video", "kind": "seconds"}, {"video": 8}, 8
    )
    coarse = adapter({"video": tokens(torch.zeros(1, 2, 1, 8), seconds=1.0)})["video"].x[0, :, 0]
    fine = adapter({"video": tokens(torch.zeros(1, 5000, 1, 8), seconds=0.2)})["video"].x[0, :, 0]
    assert torch.allclose(coarse[1], fine[7], atol=1e-5)  # both are centred at 1.5 s
    assert torch.isfinite(fine).all()


@pytest.mark.parametrize(
    "spec, option",
    [
        ({"type": "qformer", "per": "page"}, "per"),
        ({"type": "qformer", "per": "window"}, "seconds"),
        ({"type": "qformer", "seconds": 1.0}, "seconds"),
        ({"type": "position", "kind": "rotary"}, "kind"),
        ({"type": "temporal_pool", "tokens": "max"}, "tokens"),
        ({"type": "temporal_pool", "seconds": 0.0}, "seconds"),
        ({"type": "temporal_pool", "seconds": 1.0, "reduce": "sum"}, "reduce"),
        ({"type": "temporal_pool", "reduce": "max"}, "seconds"),
        ({"type": "mlp", "depth": 0}, "depth"),
        ({"type": "qformer", "per": "window", "seconds": 0.0}, "seconds"),
        ({"type": "qformer", "per": "frame", "context": 2.0}, "context"),
        ({"type": "qformer", "per": "window", "seconds": 1.0, "context": 0.5}, "context"),
        ({"type": "qformer", "num_queries": 0}, "num_queries"),
        ({"type": "position", "kind": "learned", "max_steps": 0}, "max_steps"),
        ({"type": "position", "shortest": 0.0}, "shortest"),
        ({"type": "temporal_conv", "growth": 0}, "growth"),
    ],
)
def test_options_that_cannot_be(spec: dict[str, object], option: str) -> None:
    """An error names the adapter, its stream and the option."""
    with pytest.raises(ValueError) as error:
        build("adapters", spec | {"stream": "video"}, {"video": 8}, 8)
    for named in (spec["type"], "video", option):
        assert re.search(rf"\b{named}\b", str(error.value))


def test_grids_of_long_clips_are_exact() -> None:
    """4.0000001 s in windows of 0.25 s are 16, on every path."""
    given = tokens(torch.zeros(1, 40, 1, 4), seconds=0.1)
    adapter = build(
        "adapters", {"type": "temporal_pool", "stream": "video", "seconds": 0.25}, {"video": 4}, 4
    )
    assert adapter({"video": given})["video"].x.shape[1] == 16
    assert adapter.output_grid({"video": Grid(given.span[0], given.mask[0])})["video"].steps == 16
