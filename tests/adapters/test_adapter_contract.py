"""Every adapter keeps its promises: the grid, exact masks, independent clips, gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.adapter_cases import LEFT_OUT, SQUARE, case_name, cases, dead_parameters
from torch import Tensor, nn

from avllm.adapters.base import Adapter, Prompt
from avllm.registry import build
from avllm.tokens import Grid, Tokens

torch.set_num_threads(1)
D, LLM = 6, 10
WIDTHS = {"video": D, "video.4": D, "audio": 4}
STEPS = [7, 4, 1, 3]  # of the four clips
CASE = pytest.mark.parametrize("name, options", cases(), ids=case_name)


def make(name: str, options: dict[str, Any]) -> Adapter:
    torch.manual_seed(0)
    adapter: Adapter = build("adapters", {"type": name, **options}, WIDTHS, LLM).eval()
    with (
        torch.no_grad()
    ):  # layers that begin at zero (residual branches, gates) would hide what they read
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return adapter


def sizes(name: str) -> list[tuple[int, int]]:
    """(steps, tokens a step) of the four clips."""
    return list(zip(STEPS, [4, 4, 4 if name in SQUARE else 1, 4], strict=True))


def stream(width: int, seed: int, name: str = "") -> Tokens:
    """Clips of different length; 0.3 s a step; one token is missing, the third is a picture."""
    generator = torch.Generator().manual_seed(seed)
    b, t, p = len(STEPS), max(STEPS), 4
    mask = torch.zeros(b, t, p, dtype=torch.bool)
    span = torch.zeros(b, t, 2)
    for i, (n, k) in enumerate(sizes(name)):
        mask[i, :n, :k] = True
        edges = torch.arange(n + 1) * 0.3
        span[i, :n] = torch.stack([edges[:-1], edges[1:]], 1) if n > 1 else torch.zeros(1, 2)
    mask[0, 2, 3] = False
    return Tokens(torch.randn(b, t, p, width, generator=generator), mask, span)


def streams(name: str) -> dict[str, Tokens]:
    return {key: stream(width, seed, name) for seed, (key, width) in enumerate(WIDTHS.items())}


def prompt(clips: int) -> Prompt:
    generator = torch.Generator().manual_seed(9)
    mask = torch.ones(clips, 5, dtype=torch.bool)
    mask[0, 3:] = False
    ids = torch.randint(0, 9, (clips, 5), generator=generator)
    return Prompt(
        torch.randn(clips, 5, LLM, generator=generator), mask, ids, ["what colour is it ?"] * clips
    )


def run(adapter: Adapter, given: dict[str, Tokens]) -> dict[str, Tokens]:
    return adapter(
        given, prompt(next(iter(given.values())).x.shape[0]) if adapter.conditioned else None
    )


def one(given: dict[str, Tokens], clip: int, steps: int, tokens: int) -> dict[str, Tokens]:
    """A clip by itself, without any padding."""
    part = slice(clip, clip + 1)
    return {
        name: Tokens(
            t.x[part, :steps, :tokens], t.mask[part, :steps, :tokens], t.span[part, :steps]
        )
        for name, t in given.items()
    }


def real(tokens: Tokens, clip: int) -> Tensor:
    return tokens.x[clip][tokens.mask[clip]]  # (M, D)


@CASE
def test_the_promised_grid_is_what_comes_out(name: str, options: dict[str, Any]) -> None:
    adapter = make(name, options)
    given = streams(name)
    for clip, (steps, tokens) in enumerate(sizes(name)):
        alone = one(given, clip, steps, tokens)
        made = run(adapter, alone)
        grids = {k: Grid(t.span[0], t.mask[0]) for k, t in alone.items()}
        promised = adapter.output_grid(grids)
        assert set(promised) == set(made) == set(adapter.out_widths)
        for key, tokens_out in made.items():
            assert tokens_out.x.shape[-1] == adapter.out_widths[key]
            # Where content decides, what is promised are the places of which some hold a token.
            bounded = promised[key].at_most
            reserved = tokens_out.extra["places"] if bounded else tokens_out.mask
            assert torch.equal(promised[key].mask, reserved[0])
            assert not (tokens_out.mask & ~reserved).any()
            where = tokens_out.mask[0].any(-1)
            assert torch.allclose(promised[key].span[where], tokens_out.span[0][where])


@CASE
def test_the_grid_needs_no_weights(name: str, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        adapter = build("adapters", {"type": name, **options}, WIDTHS, LLM)
    given = {k: Grid(t.span[0], t.mask[0]) for k, t in streams(name).items()}
    assert all(int(grid.mask.sum()) > 0 for grid in adapter.output_grid(given).values())


@CASE
def test_absent_streams_pass_by(name: str, options: dict[str, Any]) -> None:
    adapter = make(name, options)
    given = {"audio": streams(name)["audio"]}
    made = run(adapter, given)
    assert set(made) == set(
        adapter.output_grid({"audio": Grid(given["audio"].span[0], given["audio"].mask[0])})
    )


@CASE
def test_masked_tokens_have_no_influence(name: str, options: dict[str, Any]) -> None:
    adapter = make(name, options)
    given = streams(name)
    loud = {k: t.with_x(torch.where(t.mask[..., None], t.x, 1e4)) for k, t in given.items()}
    expected, seen = run(adapter, given), run(adapter, loud)
    for key, tokens in expected.items():
        assert torch.equal(tokens.mask, seen[key].mask)
        assert torch.allclose(tokens.x[tokens.mask], seen[key].x[tokens.mask], atol=1e-5), key


@CASE
def test_a_batch_is_its_clips_one_by_one(name: str, options: dict[str, Any]) -> None:
    adapter = make(name, options)
    if adapter.conditioned:
        pytest.skip("clips are compared with one and the same prompt only where none is read")
    given = streams(name)
    together = run(adapter, given)
    for clip, (steps, tokens) in enumerate(sizes(name)):
        alone = run(adapter, one(given, clip, steps, tokens))
        for key, made in together.items():
            assert torch.allclose(real(made, clip), real(alone[key], 0), atol=1e-5), (key, clip)
            spans = (
                made.span[clip][made.mask[clip].any(-1)],
                alone[key].span[0][alone[key].mask[0].any(-1)],
            )
            assert torch.allclose(*spans)


@CASE
def test_an_absent_clip_gives_finite_numbers_and_gradients(
    name: str, options: dict[str, Any]
) -> None:
    adapter = make(name, options)
    for absent in ([0], [0, 1, 2, 3]):
        given = streams(name)
        for tokens in given.values():
            tokens.mask[absent] = False
        given = {k: t.with_x(t.x.requires_grad_()) for k, t in given.items()}
        made = run(adapter, given)
        assert all(torch.isfinite(t.x).all() for t in made.values())
        assert not any(t.mask[absent].any() for t in made.values())
        loss = sum(t.x.square().sum() for t in made.values())
        assert isinstance(loss, Tensor)
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in adapter.parameters() if p.grad is not None)
        adapter.zero_grad(set_to_none=True)


@CASE
def test_side_information_stays_with_its_grid(name: str, options: dict[str, Any]) -> None:
    adapter = make(name, options)
    given = {}
    for key, tokens in streams(name).items():
        b, t, p, _ = tokens.x.shape
        extra = {
            "of_clip": torch.rand(b, 1, 2),
            "of_step": torch.rand(b, t),
            "of_token": torch.rand(b, t, p),
        }
        given[key] = replace(tokens, extra=extra)
    for key, made in run(adapter, given).items():
        before = given.get(key)
        if (
            before is not None
            and made.mask.shape == before.mask.shape
            and torch.equal(made.span, before.span)
        ):
            assert made.extra.keys() == before.extra.keys()
            assert all(torch.equal(made.extra[n], before.extra[n]) for n in before.extra)
        elif key in given and not adapter.keeps_extra:
            # The places of a bound are the new grid's own.
            assert set(made.extra) <= {"places"}, "what belongs to another grid"


@CASE
def test_gradients_reach_every_parameter(name: str, options: dict[str, Any]) -> None:
    adapter = make(name, options).train()
    made = run(adapter, streams(name))
    torch.manual_seed(1)
    loss = sum((t.x * torch.randn_like(t.x) * t.mask[..., None]).sum() for t in made.values())
    assert isinstance(loss, Tensor)
    if not list(adapter.parameters()):
        return
    loss.backward()
    left_out = LEFT_OUT[name](options) if name in LEFT_OUT else []
    assert dead_parameters(adapter, left_out) == ([], [])


def test_a_mode_may_leave_parameters_out_and_names_them() -> None:
    adapter = nn.ModuleDict({"used": nn.Linear(2, 2), "other_mode": nn.Linear(2, 2)})
    adapter["used"](torch.ones(1, 2)).sum().backward()
    assert dead_parameters(adapter, []) == (["other_mode.weight", "other_mode.bias"], [])
    assert dead_parameters(adapter, [r"^other_mode\."]) == ([], [])
    assert dead_parameters(adapter, [r"^other_mode\.", r"used\.bias"]) == ([], ["used.bias"])


@CASE
def test_state_dict_round_trip(name: str, options: dict[str, Any]) -> None:
    adapter, other = (
        make(name, options),
        build("adapters", {"type": name, **options}, WIDTHS, LLM).eval(),
    )
    other.load_state_dict(adapter.state_dict())
    expected, seen = run(adapter, streams(name)), run(other, streams(name))
    assert all(torch.equal(expected[k].x, seen[k].x) for k in expected)


@CASE
def test_a_stream_that_does_not_arrive_is_named(name: str, options: dict[str, Any]) -> None:
    wrong = {"streams": ["smell", "audio"]} if "streams" in options else {"stream": "smell"}
    with pytest.raises(ValueError, match="'smell'"):
        build("adapters", {"type": name, **options, **wrong}, WIDTHS, LLM)


OWN = '''
"""An adapter outside of the package."""
from avllm.adapters.base import StreamAdapter


class Halved(StreamAdapter):
    """Half of everything."""

    def __init__(self, widths, llm_dim, *, stream):
        super().__init__(widths, llm_dim, stream)

    def adapt(self, tokens, prompt=None):
        return tokens.with_x(tokens.x / 2)
'''


def test_an_own_adapter_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from avllm.models.connector import Connector

    (tmp_path / "own_adapters_here").mkdir()
    (tmp_path / "own_adapters_here" / "halved.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    specs = [
        {"type": "own_adapters_here.halved:Halved", "stream": "video"},
        {"type": "linear", "stream": "video"},
    ]
    connector = Connector(specs, {"video": D}, LLM)
    given = {"video": stream(D, 0)}
    expected = connector[1]({"video": given["video"].with_x(given["video"].x / 2)})["video"].x
    assert torch.equal(connector(given)["video"].x, expected)
