"""Streams put side by side on one clock, and clips summed up."""

from __future__ import annotations

import pytest
import torch

from avllm.adapters.base import sinusoids
from avllm.adapters.clip_sum import ClipSum
from avllm.adapters.sync_concat import SyncConcat
from avllm.models.connector import Connector
from avllm.tokens import Grid, Tokens


def stream(seconds: list[float], step: float, width: int, places: int = 1) -> Tokens:
    """A batch of clips of these lengths; 0 is a clip without the stream."""
    steps = [round(s / step) for s in seconds]
    most = max(steps)
    edges = torch.arange(most + 1) * step
    span = torch.stack([edges[:-1], edges[1:]], 1).repeat(len(steps), 1, 1)
    mask = (torch.arange(most)[None] < torch.tensor(steps)[:, None])[..., None].repeat(1, 1, places)
    torch.manual_seed(0)
    return Tokens(torch.randn(len(steps), most, places, width), mask, span * mask[..., :1])


def test_values_by_hand() -> None:
    video = stream([1.0, 1.0], 0.25, 1)
    audio = stream([0.5, 0.0], 0.125, 1)
    adapter = SyncConcat({"video": 1, "audio": 1}, 1, streams=["video", "audio"], seconds=0.5)
    torch.nn.init.constant_(adapter.absent[1], 7.0)
    out = adapter({"video": video, "audio": audio})["av"]
    assert out.x.shape == (2, 2, 1, 2)
    torch.testing.assert_close(out.x[0, 0, 0, 0], video.x[0, :2].mean())
    torch.testing.assert_close(out.x[0, 0, 0, 1], audio.x[0, :4].mean())
    assert out.x[0, 1, 0, 1].item() == 7.0, "the sound ended before the second window"
    assert out.x[1, :, 0, 1].tolist() == [7.0, 7.0], "a clip without sound"
    assert out.span[0].tolist() == [[0.0, 0.5], [0.5, 1.0]]


def test_missing_in_the_batch_is_missing_in_the_clip() -> None:
    adapter = SyncConcat({"video": 2, "audio": 3}, 1, streams=["video", "audio"])
    for p in adapter.absent:
        torch.nn.init.normal_(p)
    video, audio = stream([1.0, 0.5], 0.125, 2, places=2), stream([0.0, 0.5], 0.02, 3)
    both = adapter({"video": video, "audio": audio})["av"]
    first = Tokens(video.x[:1], video.mask[:1], video.span[:1])
    alone = adapter({"video": first})["av"]
    torch.testing.assert_close(both.x[:1][both.mask[:1]], alone.x[alone.mask])


SPECS = [
    {"type": "temporal_pool", "stream": "video", "tokens": "mean"},
    {"type": "sync_concat", "streams": ["video", "audio"], "to": "av", "seconds": 0.125},
    {"type": "clip_sum", "stream": "av", "num_tokens": 2, "moments": 1, "dim": 8},
    {"type": "linear", "stream": "av"},
    {"type": "linear", "stream": "video"},
    {"type": "linear", "stream": "audio"},
]


@pytest.mark.parametrize("lengths", [(1.0, 0.5), (0.5, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_the_grid_is_what_comes_out(lengths: tuple[float, float]) -> None:
    connector = Connector(SPECS, {"video": 2, "audio": 3}, 4)
    video, audio = stream([lengths[0], 1.0], 0.125, 2, places=4), stream([lengths[1], 1.0], 0.02, 3)
    out = connector({"video": video, "audio": audio})
    clip = {
        name: Grid(t.span[0][t.mask[0].any(-1)], t.mask[0][t.mask[0].any(-1)])
        for name, t in (("video", video), ("audio", audio))
        if bool(t.mask[0].any())
    }
    grids = connector.output_grid(clip)
    assert grids["av"].places == int(out["av"].mask[0].sum()) == 3
    torch.testing.assert_close(grids["av"].span, out["av"].span[0])
    for name in clip:
        assert grids[name].places == int(out[name].mask[0].sum())


def test_a_sum_counts() -> None:
    """Twice the same steps give twice the sum; masked steps give nothing."""
    adapter = ClipSum({"av": 4}, 4, stream="av", num_tokens=2)
    once = stream([0.5], 0.125, 4)
    twice = Tokens(
        once.x.repeat(1, 2, 1, 1), once.mask.repeat(1, 2, 1), stream([1.0], 0.125, 4).span
    )
    torch.testing.assert_close(adapter.adapt(twice).x, 2 * adapter.adapt(once).x)
    masked = Tokens(twice.x, twice.mask & (torch.arange(8) < 4)[None, :, None], twice.span)
    torch.testing.assert_close(adapter.adapt(masked).x, adapter.adapt(once).x)


def test_a_moment_is_when_it_happens() -> None:
    """What stands out in one step leaves the sinusoids of that step's second."""
    adapter = ClipSum({"av": 4}, 4, stream="av", num_tokens=0, moments=1, dim=8, hidden=4)
    found = stream([1.0], 0.125, 4)
    tokens = Tokens(torch.zeros_like(found.x), found.mask, found.span)
    tokens.x[0, 5, 0, 0] = 1.0  # after the norm this is the only step with anything in it
    with torch.no_grad():
        adapter.layers[1].weight.copy_(1e4 * torch.eye(4))
        adapter.layers[1].bias.zero_()
        adapter.moment_scores.weight.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
        out = adapter.adapt(tokens)
    expected = sinusoids(torch.tensor(5.5 * 0.125), 8, 0.25, 20.0)
    torch.testing.assert_close(out.x[0, 0, 0], expected)


def test_nothing_to_sum_is_an_error() -> None:
    with pytest.raises(ValueError, match="num_tokens 0 and moments 0"):
        ClipSum({"av": 4}, 4, stream="av", num_tokens=0)


def test_an_absent_clip_is_masked() -> None:
    connector = Connector(SPECS, {"video": 2, "audio": 3}, 4)
    video, audio = stream([0.0, 1.0], 0.125, 2), stream([0.0, 1.0], 0.02, 3)
    out = connector({"video": video, "audio": audio})["av"]
    assert not bool(out.mask[0].any())
    assert bool(out.x.isfinite().all())
