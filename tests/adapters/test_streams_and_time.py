"""temporal_conv, spatial_pool, branch and join: worked numbers, masks, and the promised grid."""

import pytest
import torch

from avllm.adapters.join import Join
from avllm.adapters.spatial_pool import SpatialPool
from avllm.adapters.temporal_conv import TemporalConv, deltas
from avllm.models.connector import Connector
from avllm.tokens import Grid, Tokens

BRANCHED = [
    {"type": "branch", "stream": "video", "to": "video.places"},
    {"type": "temporal_pool", "stream": "video.places", "seconds": 1000},
    {"type": "spatial_pool", "stream": "video.places", "factor": 2},
    {"type": "temporal_pool", "stream": "video", "tokens": "mean"},
    {"type": "temporal_conv", "stream": "video", "layers": 2, "growth": 2, "deltas": True},
    {"type": "temporal_pool", "stream": "video", "seconds": 0.25},
    {"type": "join", "stream": "video", "first": "video.places"},
]


def span(steps: int) -> torch.Tensor:
    """Eighths of a second."""
    edges = torch.arange(steps + 1) / 8
    return torch.stack([edges[:-1], edges[1:]], 1)


def two_clips(long: int = 20, short: int = 13) -> Tokens:
    """Two clips of different length, 16 tokens a step; masked places hold large numbers."""
    mask = torch.ones(2, long, 16, dtype=torch.bool)
    mask[1, short:] = False
    spans = torch.stack([span(long), torch.cat([span(short), torch.zeros(long - short, 2)])])
    x = torch.randn(2, long, 16, 8).masked_fill(~mask[..., None], 1e3)
    return Tokens(x, mask, spans)


def test_a_clip_in_a_batch_is_the_clip_alone() -> None:
    torch.manual_seed(0)
    connector, batch = Connector(BRANCHED, {"video": 8}, 8), two_clips()
    both = connector({"video": batch})["video"]
    alone = connector(
        {"video": Tokens(batch.x[1:, :13], batch.mask[1:, :13], batch.span[1:, :13])}
    )["video"]
    torch.testing.assert_close(both.x[1][both.mask[1]], alone.x[alone.mask])


def test_the_grid_counts_what_forward_makes() -> None:
    connector, batch = Connector(BRANCHED, {"video": 8}, 8), two_clips()
    made = connector({"video": batch})["video"]
    for row, steps in enumerate((20, 13)):
        grid = connector.output_grid(
            {"video": Grid(span(steps), torch.ones(steps, 16, dtype=torch.bool))}
        )["video"]
        real = made.mask[row].any(-1)
        assert torch.equal(grid.mask, made.mask[row][real])
        torch.testing.assert_close(grid.span, made.span[row][real])
    assert (
        grid.places == 4 + 7
    )  # a grid of 2 x 2 for the clip, then a token for each quarter of 1.625 s


def test_an_absent_stream_stays_absent() -> None:
    connector = Connector(BRANCHED, {"video": 8, "audio": 8}, 8)
    assert connector({}) == {}
    assert connector.output_grid({}) == {}


def test_a_convolution_sees_its_kernel_and_no_further() -> None:
    adapter = TemporalConv({"video": 4}, 4, stream="video", layers=1, kernel=3, growth=1)
    x = torch.randn(1, 9, 1, 4, requires_grad=True)
    out = adapter.adapt(Tokens(x, torch.ones(1, 9, 1, dtype=torch.bool), span(9)[None]))
    out.x[0, 4].sum().backward()
    assert x.grad is not None
    assert x.grad[0, :, 0].abs().sum(-1).nonzero().flatten().tolist() == [3, 4, 5]


def test_squares_are_averaged_over_what_is_real() -> None:
    x = torch.arange(16.0).reshape(1, 1, 16, 1)
    mask = torch.ones(1, 1, 16, dtype=torch.bool)
    mask[0, 0, :2] = False  # the upper half of the first square
    pooled = SpatialPool({"video": 1}, 1, stream="video").adapt(
        Tokens(x, mask, torch.zeros(1, 1, 2))
    )
    assert pooled.x.flatten().tolist() == [4.5, 4.5, 10.5, 12.5]


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="kernel 4"):
        TemporalConv({"video": 4}, 4, stream="video", kernel=4)
    with pytest.raises(ValueError, match="video.places"):
        Join({"video": 4, "video.places": 8}, 4, stream="video", first="video.places")
    with pytest.raises(ValueError, match="6 tokens"):
        SpatialPool({"video": 1}, 1, stream="video").grid(
            Grid(span(1), torch.ones(1, 6, dtype=torch.bool))
        )


def test_deltas_are_what_changes_from_step_to_step_and_nothing_at_the_edges() -> None:
    mask = torch.ones(1, 6, 1, dtype=torch.bool)
    way = torch.tensor([1.0, -1.0, 1.0, -1.0])
    base = torch.tensor([3.0, 1.0, -1.0, -3.0])
    x = (base + torch.arange(6.0)[:, None] * way).view(1, 6, 1, 4)
    moving = deltas(Tokens(x, mask, span(6)[None]), noise=0.0)
    torch.testing.assert_close(moving[0, 1:5, 0], (way / way.std()).expand(4, 4))
    assert not moving[0, [0, 5]].any()
    noisy = Tokens(base.view(1, 1, 1, 4) + 1e-3 * torch.randn(1, 6, 1, 4), mask, span(6)[None])
    assert float(deltas(noisy).abs().max()) < 0.05  # far below the noise: it is not blown up
    mask[:, 3:] = False
    assert not deltas(Tokens(x, mask, span(6)[None]))[:, 2:].any()
