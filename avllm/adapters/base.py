"""Define an adapter: a trainable step of the connector, from token streams to token streams.

An adapter computes without weights how many tokens it makes and when they happened
(:meth:`Adapter.output_grid`), so that loader workers can lay out the LLM's sequence. Its own
keyword arguments are its options in YAML.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from avllm.errors import UserError
from avllm.tokens import Grid, Tokens

MOST_WINDOWS = 100_000  # of a clip, two days in windows of two seconds
_VARIANT: ContextVar[str | None] = ContextVar("variant", default=None)


def variant() -> str | None:
    """Return the variant in which the connector runs now, for adapters that have several.

    Variants are different rates of tokens, for example. Row makers name them (``Row.variant``);
    rows of one variant share a micro batch. None is an adapter's default.
    """
    return _VARIANT.get()


@contextmanager
def in_variant(name: str | None) -> Iterator[None]:
    """Run the connector, or count its tokens, in a variant for as long as the block lasts."""
    before = _VARIANT.set(name)
    try:
        yield
    finally:
        _VARIANT.reset(before)


class Prompt(NamedTuple):
    """Hold the question that is asked about each clip, without the chat template.

    Attributes:
        x: ``(B, A, D_llm)`` the LLM's embeddings of the question's tokens.
        mask: ``(B, A)`` bool.
        ids: ``(B, A)`` long, the LLM's token ids.
        texts: the questions, for adapters with a tokenizer.
    """

    x: Tensor
    mask: Tensor
    ids: Tensor
    texts: list[str]


class Adapter(nn.Module):
    """Map all streams of the connector to new ones.

    Args:
        widths: the width of each stream that comes in.
        llm_dim: the width of the LLM's embeddings, the default width to project to.

    Side information (``Tokens.extra``) belongs to a grid. An adapter that keeps T and P hands it
    on, as ``Tokens.with_x`` does; one that changes either makes new ``Tokens`` and thereby drops
    it, unless it knows how the information follows to the new grid and says so in ``keeps_extra``.

    Attributes:
        out_widths: the width of each stream that goes out; a stream without an entry is consumed.
        conditioned: True where :meth:`forward` needs the prompt.
        by_content: True where the number of tokens depends on the features. :meth:`output_grid`
            then gives an upper bound (``Grid.at_most``), and :meth:`forward` tokens in so many
            places: ``extra["places"]``, ``(B, T, P)`` bool, are the places of the bound, and the
            mask says which of them hold a token; the others come first. The LLM does not see them.
        keeps_extra: True where side information goes over to another grid.
    """

    conditioned: bool = False
    by_content: ClassVar[bool] = False
    keeps_extra: ClassVar[bool] = False

    def __init__(self, widths: dict[str, int], llm_dim: int) -> None:
        super().__init__()
        self.in_widths = dict(widths)
        self.out_widths = dict(widths)
        self.llm_dim = llm_dim

    def forward(
        self, streams: dict[str, Tokens], prompt: Prompt | None = None
    ) -> dict[str, Tokens]:
        """Map all streams that come in to all that go out, ``(B, T, P, D)`` each.

        A clip whose mask is all False must give finite numbers.
        """
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def output_grid(self, grids: dict[str, Grid]) -> dict[str, Grid]:
        """Return the grid of each stream that :meth:`forward` makes of a clip, without weights."""
        raise NotImplementedError(f"{type(self).__name__}.output_grid")

    def load_init(self) -> None:
        """Load published weights where the options name some; called before a new model trains."""

    @classmethod
    def added_words(cls, options: Mapping[str, Any]) -> list[str]:
        """Return the words that an adapter with these options adds to the LLM's vocabulary.

        They get rows that train (``AVLLM.words``), when a model is composed. By default none.
        """
        del options
        return []

    def bind(self, model: Any) -> None:
        """Keep a reference to the model, for an adapter that reads the LLM or another part.

        Called once, when all parts are built; their weights may still be loaded, and LoRA put on
        the LLM, after it. So keep the model by ``weakref.ref`` and read from it in :meth:`forward`:
        as an attribute, a module or a parameter would be registered, saved and trained a second
        time, and a tensor would miss what is loaded later. The connector that counts tokens in
        loader workers is never bound: :meth:`output_grid` cannot use the model.

        Args:
            model: an :class:`~avllm.models.modeling_avllm.AVLLM`.
        """

    def require(self, stream: str) -> int:
        """Return the width of a stream that this adapter reads.

        Raises:
            ValueError: no such stream reaches this adapter.
        """
        if stream not in self.in_widths:
            raise ValueError(
                f"{type(self).__name__} reads stream {stream!r}; "
                f"the streams that reach it are {sorted(self.in_widths)}"
            )
        return self.in_widths[stream]


class StreamAdapter(Adapter):
    """Change one stream and pass the others on: implement :meth:`adapt` and :meth:`grid`."""

    def __init__(self, widths: dict[str, int], llm_dim: int, stream: str) -> None:
        super().__init__(widths, llm_dim)
        self.stream = stream
        self.in_dim = self.require(stream)

    def set_out_dim(self, dim: int) -> None:
        """Declare the width that goes out."""
        self.out_widths[self.stream] = dim

    def adapt(self, tokens: Tokens, prompt: Prompt | None = None) -> Tokens:
        """Map tokens ``(B, T, P, D)`` to ``(B, T', P', D')``."""
        raise NotImplementedError(f"{type(self).__name__}.adapt")

    def grid(self, grid: Grid) -> Grid:
        """Return the grid of :meth:`adapt`'s result for one clip; by default unchanged."""
        return grid

    def forward(
        self, streams: dict[str, Tokens], prompt: Prompt | None = None
    ) -> dict[str, Tokens]:
        if self.stream not in streams:
            return streams
        return {**streams, self.stream: self.adapt(streams[self.stream], prompt)}

    def output_grid(self, grids: dict[str, Grid]) -> dict[str, Grid]:
        if self.stream not in grids:
            return grids
        return {**grids, self.stream: self.grid(grids[self.stream])}


def masked_mean(x: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Return the mean of ``x (..., D)`` over ``dim`` where ``mask (...)`` is True.

    It is zero where nothing is real.
    """
    weight = mask.unsqueeze(-1).to(x.dtype)
    return (x * weight).sum(dim) / weight.sum(dim).clamp(min=1)


@dataclass(frozen=True)
class Windows:
    """List the steps of a batch of clips window by window.

    Attributes:
        index: ``(B, W, K)`` long, the steps of each window in time order (padded with 0).
        mask: ``(B, W, K)`` bool.
        span: ``(B, W, 2)`` seconds, the nominal window (without overlap), its end clipped to the
            clip's end.
    """

    index: Tensor
    mask: Tensor
    span: Tensor


def time_windows(
    span: Tensor, real: Tensor, seconds: float, context: float | None = None
) -> Windows:
    """Cut the clocks of a batch of clips into windows of equal length.

    Args:
        span: ``(B, T, 2)`` steps in time order.
        real: ``(B, T)`` bool, the steps that exist.
        seconds: length and distance of the windows.
        context: a step belongs to each window whose centre is nearer than ``context / 2`` seconds
            to the step's own centre; None gives windows that do not overlap, of which each step is
            in exactly one.

    Returns:
        a window for each ``seconds`` between the first start and the last end of each clip.

    Raises:
        UserError: ``too_large``, there are more than ``MOST_WINDOWS``.
    """
    t = span.shape[1]
    start = torch.where(real, span[..., 0], torch.inf).amin(1).nan_to_num(posinf=0.0)  # (B,)
    end = torch.where(real, span[..., 1], -torch.inf).amax(1).nan_to_num(neginf=0.0)  # (B,)
    # A hair less than the length, so that 4.0000001 s of 0.25 s make 16 windows and not 17.
    count = ((end - start - 1e-4) / seconds).ceil().clamp(min=1)  # (B,)
    most = int(count.max())
    if most > MOST_WINDOWS:
        raise UserError(
            f"windows of {seconds} s cut a clip into {most}; expected at most {MOST_WINDOWS}. "
            "Take longer windows",
            reason="too_large",
        )
    number = torch.arange(most, device=span.device)  # (W,)
    low = start[:, None] + seconds * number  # (B, W)
    latest = end.maximum(start)[:, None, None]  # (B, 1, 1)
    nominal = torch.stack([low, low + seconds], dim=-1).minimum(latest)  # (B, W, 2)
    centre = span.mean(-1)  # (B, T)
    if context is None:
        owner = ((centre - start[:, None]) / seconds + 1e-4).floor().clamp(min=0)  # (B, T)
        owner = owner.minimum(count[:, None] - 1)
        member = owner[:, None] == number[:, None]  # (B, W, T)
    else:
        distance = (centre[:, None] - (low + seconds / 2)[..., None]).abs()  # (B, W, T)
        member = distance <= context / 2 + 1e-4
        member &= (number < count[:, None])[..., None]
    member &= real[:, None]
    width = max(1, int(member.sum(-1).max()))
    # A step of the window keeps its number and all others get t: sorting puts the window's first.
    steps = torch.where(member, torch.arange(t, device=span.device), t)  # (B, W, T)
    steps = steps.sort(-1).values[..., :width]  # (B, W, K)
    mask = steps < t
    return Windows(torch.where(mask, steps, 0), mask, nominal)


def gather_steps(tokens: Tokens, windows: Windows) -> tuple[Tensor, Tensor]:
    """Return the tokens of each window: features ``(B, W, K, P, D)`` and mask ``(B, W, K, P)``."""
    rows = torch.arange(tokens.x.shape[0], device=tokens.x.device)[:, None, None]
    keep = tokens.mask[rows, windows.index] & windows.mask[..., None]  # (B, W, K, P)
    return tokens.x[rows, windows.index], keep  # (B, W, K, P, D)


def window_sums(tokens: Tokens, windows: Windows) -> tuple[Tensor, Tensor]:
    """Return each window's sum of real tokens, ``(B, W, P, D)``, and their number ``(B, W, P)``.

    It is a product with the matrix of windows by steps, so that a step in several windows is not
    copied. Autocast is off, since bfloat16 rounds counts above 256.
    """
    b, t, p, d = tokens.x.shape
    member = tokens.x.new_zeros(b, windows.index.shape[1], t)  # (B, W, T)
    member.scatter_add_(2, windows.index, windows.mask.to(member.dtype))
    real = tokens.mask.to(member.dtype)  # (B, T, P)
    with torch.autocast(tokens.x.device.type, enabled=False):
        sums = member @ (tokens.x * real.unsqueeze(-1)).flatten(2)  # (B, W, P * D)
        return sums.unflatten(2, (p, d)), member @ real


def window_grid(grid: Grid, seconds: float, context: float | None = None) -> tuple[Windows, Tensor]:
    """:func:`time_windows` of one clip and the mask ``(W, K, P)`` of the tokens in each window."""
    windows = time_windows(grid.span[None], grid.mask.any(-1)[None], seconds, context)
    return windows, grid.mask[windows.index[0]] & windows.mask[0, ..., None]


def whole_span(span: Tensor, real: Tensor) -> Tensor:
    """Return one span a clip, ``(B, T, 2)`` -> ``(B, 1, 2)``.

    It lasts from the first real start to the last real end; it is zero for an absent clip.
    """
    return joint_span(span, real).unsqueeze(1)


def joint_span(span: Tensor, real: Tensor) -> Tensor:
    """Return the seconds from the first real start to the last real end of each group of steps.

    Args:
        span: ``(..., K, 2)``.
        real: ``(..., K)`` bool.

    Returns:
        ``(..., 2)``; zero where nothing is real.
    """
    start = torch.where(real, span[..., 0], torch.inf).amin(-1).nan_to_num(posinf=0.0)
    end = torch.where(real, span[..., 1], -torch.inf).amax(-1).nan_to_num(neginf=0.0)
    return torch.stack([start, end], dim=-1)


def sinusoids(seconds: Tensor, dim: int, shortest: float, longest: float) -> Tensor:
    """Map seconds ``(...)`` to sinusoids ``(..., dim)``.

    They are the sine and cosine at geometrically spaced periods from shortest to longest.
    """
    half = dim // 2
    ratio = torch.linspace(0, 1, max(half, 1), device=seconds.device)
    period = shortest * torch.exp(ratio * math.log(longest / shortest))  # (dim/2,)
    angle = seconds.float().unsqueeze(-1) * (2 * math.pi / period)
    wave = torch.cat([angle.sin(), angle.cos()], dim=-1)
    return nn.functional.pad(wave, (0, dim - wave.shape[-1]))
