"""The i-th tokens of several streams side by side."""

from __future__ import annotations

import pytest
import torch

from avllm.adapters.step_concat import StepConcat
from avllm.tokens import Tokens


def stream(steps: int, tokens: int, width: int, seconds: float) -> Tokens:
    edges = torch.arange(steps + 1) * seconds
    span = torch.stack([edges[:-1], edges[1:]], 1)[None]
    x = torch.randn(1, steps, tokens, width)
    return Tokens(x, torch.ones(1, steps, tokens, dtype=torch.bool), span)


def test_tokens_of_a_step_share_its_time_and_the_shorter_stream_ends_in_zeros() -> None:
    adapter = StepConcat({"speech": 3, "sounds": 2}, 8, streams=["speech", "sounds"], norm=False)
    speech, sounds = stream(6, 1, 3, 0.02), stream(1, 8, 2, 0.16)
    out = adapter({"speech": speech, "sounds": sounds})
    assert list(out) == ["speech"]
    x = out["speech"].x[0, :, 0]  # (8, 5)
    assert torch.equal(x[:6, :3], speech.x[0, :, 0])
    assert torch.equal(x[:, 3:], sounds.x[0, 0])
    assert not x[6:, :3].any()
    edges = torch.arange(9) * 0.02
    torch.testing.assert_close(out["speech"].span[0], torch.stack([edges[:-1], edges[1:]], 1))


def test_one_stream_is_normed() -> None:
    adapter = StepConcat({"speech": 4}, 8, streams=["speech"])
    x = adapter({"speech": stream(5, 1, 4, 0.1)})["speech"].x
    torch.testing.assert_close(x.mean(-1), torch.zeros(1, 5, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("streams", [[], ["speech", "speech"]])
def test_streams_are_named_once(streams: list[str]) -> None:
    with pytest.raises(ValueError, match="each once"):
        StepConcat({"speech": 4}, 8, streams=streams)
