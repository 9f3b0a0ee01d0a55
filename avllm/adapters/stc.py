"""Convolve frames in space and time: VideoLLaMA2's STC connector (arXiv 2406.07476, 3.1)."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.functional import pad

from avllm.adapters.base import Prompt, StreamAdapter, joint_span
from avllm.tokens import Grid, Tokens


class STC(StreamAdapter):
    """Halve a video in time and space by convolutions, then project it with an MLP.

    RegNet blocks work on each frame, one 3-D convolution joins ``time`` frames and squares of
    ``space`` x ``space`` patches, RegNet blocks follow, and an MLP ends it. A clip's missing steps
    are zeros to the convolution.

    Args:
        stream: the stream to convolve; its steps hold a square grid of patches.
        time, space: what the 3-D convolution joins; its stride is its size.
        padding: zeros around the clip before the 3-D convolution: 0 as in the paper (8 frames of
            24 x 24 patches become 4 x 12 x 12 tokens), or 1 as in the first released weights.
        dim: width of the result; None: the LLM's.
        hidden: width inside; None: that of the result.
        depth: RegNet blocks before and after the 3-D convolution, each.
        group: channels that a grouped convolution of a block joins.
        mlp: linear layers at the end.
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        stream: str,
        time: int = 2,
        space: int = 2,
        padding: int = 0,
        dim: int | None = None,
        hidden: int | None = None,
        depth: int = 4,
        group: int = 64,
        mlp: int = 2,
    ) -> None:
        super().__init__(widths, llm_dim, stream)
        if min(time, space, depth, mlp) < 1 or padding not in (0, 1):
            raise ValueError(
                f"stc on {stream!r} has time {time}, space {space}, depth {depth}, mlp {mlp} and "
                f"padding {padding}; expected 1 or more, and a padding of 0 or 1"
            )
        if padding and time > 2:
            raise ValueError(
                f"stc on {stream!r} has time {time} and padding 1, which leaves out the end of "
                "clips of some lengths; expected a time of 1 or 2, or no padding"
            )
        dim = dim or llm_dim
        hidden = hidden or dim
        self.size = (time, space, space)
        self.padding = padding
        self.before = _stage(self.in_dim, hidden, depth, group)
        self.joint = nn.Conv3d(hidden, hidden, self.size, stride=self.size, padding=padding)
        self.after = _stage(hidden, hidden, depth, group)
        layers: list[nn.Module] = [nn.Linear(hidden, dim)]
        for _ in range(mlp - 1):
            layers += [nn.GELU(), nn.Linear(dim, dim)]
        self.readout = nn.Sequential(*layers)
        self.set_out_dim(dim)

    def adapt(self, tokens: Tokens, prompt: Prompt | None = None) -> Tokens:
        b, t, p, d = tokens.x.shape
        side = self._side(p)
        keep = tokens.mask.view(b * t, 1, side, side).to(tokens.x.dtype)
        frames = tokens.x.reshape(b * t, side, side, d).permute(0, 3, 1, 2) * keep
        x = self.before(frames) * keep  # (B * T, D', S, S)
        x = x.view(b, t, -1, side, side).transpose(1, 2)  # (B, D', T, S, S)
        x = nn.functional.silu(self.joint(pad(x, (0, 0, 0, 0, 0, self._missing(t)))))
        x = x.transpose(1, 2)  # (B, T', D', S', S')
        made = x.shape[:2]
        x = self.after(x.flatten(0, 1)).flatten(2).transpose(1, 2)  # (B * T', S' * S', D')
        x = self.readout(x).unflatten(0, made)  # (B, T', P', D'')
        mask, span = self._after(tokens.mask, tokens.span)
        return Tokens(x * mask.unsqueeze(-1), mask, span)

    def grid(self, grid: Grid) -> Grid:
        mask, span = self._after(grid.mask[None], grid.span[None])
        return Grid(span[0], mask[0])

    def _after(self, mask: Tensor, span: Tensor) -> tuple[Tensor, Tensor]:
        """Return mask and seconds after the 3-D convolution: ``(B, T', P')``, ``(B, T', 2)``.

        A token is real if any token is that it joins.
        """
        b, t, p = mask.shape
        side = self._side(p)
        around = (self.padding,) * 4 + (self.padding, self.padding + self._missing(t))
        kept = pad(mask.view(b, t, side, side), around)  # (B, T + ..., S + ..., S + ...)
        kept = _boxes(kept, self.size).any(-1)  # (B, T', S', S')
        real = pad(mask.any(-1), around[4:])  # (B, T + ...)
        steps = kept.shape[1]
        real = real[:, : steps * self.size[0]].unflatten(1, (steps, -1))  # (B, T', time)
        times = pad(span, (0, 0, *around[4:]))[:, : steps * self.size[0]]
        times = times.unflatten(1, (steps, -1))  # (B, T', time, 2)
        return kept.flatten(2), joint_span(times, real)

    def _missing(self, steps: int) -> int:
        """Return how many steps are missing to a whole number of groups.

        With padding, the last group may lack its end, as in the released code: it is left out.
        """
        return 0 if self.padding else -steps % self.size[0]

    def _side(self, tokens: int) -> int:
        """Return the side of the square grid of patches.

        Raises:
            ValueError: the tokens of a step are no square, or too few for the convolution.
        """
        side = math.isqrt(tokens)
        if side * side != tokens or side + 2 * self.padding < self.size[1]:
            raise ValueError(
                f"stc on {self.stream!r}: {tokens} tokens a step; expected a square grid with a "
                f"side of {self.size[1]} or more"
            )
        return side


class RegBlock(nn.Module):
    """Compute a residual block of RegNetY (arXiv 2003.13678) on frames.

    It is a bottleneck of width 1, a grouped 3 x 3 convolution, and squeeze-and-excitation
    (arXiv 1709.01507), with layer norms over the channels instead of batch norms.

    Args:
        into, out: channels that come in and go out.
        group: channels that the grouped convolution joins.
    """

    def __init__(self, into: int, out: int, group: int) -> None:
        super().__init__()
        groups = max(1, out // group) if out % group == 0 else 1
        self.first = nn.Conv2d(into, out, 1, bias=False)
        self.norm1 = ChannelNorm(out)
        self.second = nn.Conv2d(out, out, 3, padding=1, groups=groups, bias=False)
        self.norm2 = ChannelNorm(out)
        inside = max(1, into // 4)
        self.squeeze = nn.Conv2d(out, inside, 1)
        self.excite = nn.Conv2d(inside, out, 1)
        self.third = nn.Conv2d(out, out, 1, bias=False)
        self.norm3 = ChannelNorm(out)
        self.shortcut: nn.Module = nn.Identity()
        if into != out:
            self.shortcut = nn.Sequential(nn.Conv2d(into, out, 1, bias=False), ChannelNorm(out))

    def forward(self, x: Tensor) -> Tensor:
        """Change frames ``(N, C, S, S)`` -> ``(N, C', S, S)``."""
        silu = nn.functional.silu
        y = silu(self.norm1(self.first(x)))
        y = silu(self.norm2(self.second(y)))
        weight = self.excite(silu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        result: Tensor = silu(self.norm3(self.third(y * weight)) + self.shortcut(x))
        return result


class ChannelNorm(nn.LayerNorm):
    """Normalise the channels of each place of a frame, ``(N, C, S, S)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _stage(into: int, out: int, depth: int, group: int) -> nn.Sequential:
    return nn.Sequential(*(RegBlock(into if i == 0 else out, out, group) for i in range(depth)))


def _boxes(x: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Group ``(B, T, S, S)`` by boxes: ``(B, T', S', S', time * space**2)``; rests are left out."""
    for place, length in enumerate(size, 1):
        x = x.unfold(place, length, length)
    return x.flatten(4)
