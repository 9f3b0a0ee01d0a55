"""An adapter of a user's whose grid and tokens disagree is named when it is first used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from avllm.errors import UserError
from avllm.models.connector import Connector
from avllm.tokens import Tokens

HALVES = '''
from avllm.adapters.base import StreamAdapter
from avllm.tokens import Grid, Tokens


class Halve(StreamAdapter):
    """Keep every second step."""

    def __init__(self, widths, llm_dim, *, stream: str, width: int = 8):
        super().__init__(widths, llm_dim, stream)
        self.set_out_dim(width)

    def adapt(self, tokens, prompt=None):
        return Tokens(tokens.x[:, ::2], tokens.mask[:, ::2], tokens.span[:, ::2])

    def grid(self, grid):
        return Grid(grid.span[::2], grid.mask[::2])


class Forgetful(Halve):
    """Count as many tokens as come in."""

    def grid(self, grid):
        return grid
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_adapters_{abs(hash(tmp_path)) % 10**9}"
    (tmp_path / f"{name}.py").write_text(HALVES)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def clips() -> dict[str, Tokens]:
    """Three clips: an absent one, one of 3 steps and one of 5."""
    mask = torch.zeros(3, 5, 2, dtype=torch.bool)
    mask[1, :3] = mask[2] = True
    span = torch.arange(10.0).reshape(1, 5, 2).expand(3, 5, 2)
    return {"video": Tokens(torch.randn(3, 5, 2, 8), mask, span)}


def test_grid_and_tokens_that_agree_pass(module: str) -> None:
    connector = Connector([{"type": f"{module}:Halve", "stream": "video"}], {"video": 8}, 8)
    assert connector(clips())["video"].mask.sum(1).sum(1).tolist() == [0, 4, 6]


def test_a_grid_that_counts_other_tokens_is_named(module: str) -> None:
    spec = {"type": f"{module}:Forgetful", "stream": "video"}
    connector = Connector([spec], {"video": 8}, 8)
    with pytest.raises(UserError, match=f"{module}:Forgetful.* 6 tokens .*'video'.* 4 ") as refused:
        connector(clips())
    assert refused.value.reason == "grid"


def test_a_width_that_is_not_declared_is_named(module: str) -> None:
    narrow = {"type": f"{module}:Halve", "stream": "video", "width": 4}
    last = {"type": "linear", "stream": "video"}
    connector = Connector([narrow, last], {"video": 8}, 8)
    with pytest.raises(UserError, match="8 wide.* 4;") as refused:
        connector(clips())
    assert refused.value.reason == "width"
