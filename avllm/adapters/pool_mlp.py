"""Shorten a stream at one of several rates, then project it: Llama-MTSK (arXiv 2503.06362, 3.1)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import pad

from avllm.adapters.base import Prompt, StreamAdapter, joint_span, variant
from avllm.tokens import Grid, Tokens


class PoolMLP(StreamAdapter):
    """Put ``rate`` neighbouring steps together and project them with a two-layer MLP.

    With several rates, the variant in which the connector runs names one of them
    (``video=2,audio=4``, as the row maker ``matryoshka`` writes it); without a variant it is the
    first. Steps are neighbours by their order; a last group that is short holds fewer steps.

    Args:
        stream: the stream to shorten.
        rates: numbers of steps that become one.
        mode: ``avg``, the mean of the real steps; or ``stack``, their features side by side, where
            a step that is missing is zero.
        dim: width of the result; None: the LLM's.
        hidden: width inside; None: that of the result.
        shared: one MLP for all rates, as the paper has it for averages. Stacks of different rates
            have different widths, so that each has its own MLP.
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        stream: str,
        rates: list[int],
        mode: str = "avg",
        dim: int | None = None,
        hidden: int | None = None,
        shared: bool = True,
    ) -> None:
        super().__init__(widths, llm_dim, stream)
        if mode not in ("avg", "stack"):
            raise ValueError(f"pool_mlp on {stream!r} has mode {mode!r}; expected 'avg' or 'stack'")
        if not rates or min(rates) < 1 or len(set(rates)) < len(rates):
            raise ValueError(
                f"pool_mlp on {stream!r} has rates {rates}; expected different numbers from 1 on"
            )
        self.rates = list(rates)
        self.mode = mode
        dim = dim or llm_dim
        self.mlps = nn.ModuleDict()
        for rate in self.rates:
            if mode == "stack":
                self.mlps[str(rate)] = _mlp(rate * self.in_dim, hidden or dim, dim)
            elif not shared:
                self.mlps[str(rate)] = _mlp(self.in_dim, hidden or dim, dim)
        if mode == "avg" and shared:
            self.mlps["shared"] = _mlp(self.in_dim, hidden or dim, dim)
        self.set_out_dim(dim)

    def rate(self) -> int:
        """Return the rate of the variant in which the connector runs.

        Raises:
            ValueError: the variant names a rate that this adapter does not have.
        """
        named = rates_of(variant())
        rate = named.get(self.stream, self.rates[0])
        if rate not in self.rates:
            raise ValueError(
                f"pool_mlp on {self.stream!r}: variant {variant()!r} asks for rate {rate}; "
                f"expected one of {self.rates}"
            )
        return rate

    def adapt(self, tokens: Tokens, prompt: Prompt | None = None) -> Tokens:
        rate = self.rate()
        x, mask, span = _grouped(tokens, rate)  # (B, W, rate, P, D), (B, W, rate, P), (B, W, 2)
        x = x * mask.unsqueeze(-1).to(x.dtype)
        if self.mode == "stack":
            pooled = x.transpose(2, 3).flatten(3)  # (B, W, P, rate * D)
        else:
            pooled = x.sum(2) / mask.sum(2).clamp(min=1).unsqueeze(-1)  # (B, W, P, D)
        key = "shared" if "shared" in self.mlps else str(rate)
        return Tokens(self.mlps[key](pooled) + self._unused(key, pooled), mask.any(2), span)

    def _unused(self, used: str, x: Tensor) -> Tensor | float:
        """Return 0, on the graph of the other MLPs: processes wait for gradients of all weights."""
        zero: Tensor | float = 0.0
        for key, mlp in self.mlps.items():
            if key != used:
                width = mlp[0].in_features  # type: ignore[index]
                zero = zero + 0.0 * mlp(x.new_zeros(1, width)).sum()
        return zero

    def grid(self, grid: Grid) -> Grid:
        rate = self.rate()
        mask = _groups(grid.mask[None], rate)[0].any(1)  # (W, P)
        return Grid(_spans(grid.span[None], grid.mask.any(-1)[None], rate)[0], mask)


def rates_of(name: str | None) -> dict[str, int]:
    """Return the rates that a variant names, by stream: ``video=2,audio=4``.

    Raises:
        ValueError: it is not of that form.
    """
    rates: dict[str, int] = {}
    for entry in (name or "").split(",") if name else []:
        stream, _, rate = entry.partition("=")
        if not stream or not rate.isdecimal():
            raise ValueError(f"variant {name!r}: {entry!r} is no rate; expected 'stream=number'")
        rates[stream] = int(rate)
    return rates


def _mlp(width: int, hidden: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, dim))


def _groups(x: Tensor, rate: int) -> Tensor:
    """Group steps by ``rate``: ``(B, T, ...)`` -> ``(B, W, rate, ...)``, filled with zeros."""
    missing = -x.shape[1] % rate
    x = pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    return x.unflatten(1, (-1, rate))


def _spans(span: Tensor, real: Tensor, rate: int) -> Tensor:
    """Return the seconds of each group, ``(B, W, 2)``, from its first to its last real step."""
    return joint_span(_groups(span, rate), _groups(real, rate))


def _grouped(tokens: Tokens, rate: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return features, mask and seconds of the groups of ``rate`` steps."""
    spans = _spans(tokens.span, tokens.mask.any(-1), rate)
    return _groups(tokens.x, rate), _groups(tokens.mask, rate), spans
