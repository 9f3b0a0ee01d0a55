"""Pack neighbouring tokens in space and time: LLaVA-ST's packer (arXiv 2501.08282, 3.2)."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import pad

from avllm.adapters._attention import Attention
from avllm.adapters.base import Prompt, StreamAdapter, joint_span, masked_mean
from avllm.tokens import Grid, Tokens


class RegionPacker(StreamAdapter):
    """Turn boxes of ``time`` steps and ``space`` x ``space`` patches into one token each.

    A packed token begins as the mean of its box, attends to the tokens of its box alone, and adds
    what it reads (the paper's point-to-region attention). LLaVA-ST packs one copy of the video
    in time (slow) and one in space (fast): copy the stream with ``branch`` and pack each.

    Args:
        stream: the stream to pack; its steps hold a square grid of patches.
        time: steps that become one; a last box that is short holds fewer.
        space: side of the squares of patches; has to divide the grid's side.
        heads: of the attention.
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        stream: str,
        time: int = 1,
        space: int = 1,
        heads: int = 8,
    ) -> None:
        super().__init__(widths, llm_dim, stream)
        if time < 1 or space < 1:
            raise ValueError(
                f"region_packer on {stream!r} has time {time} and space {space}; "
                "expected 1 or more of each"
            )
        self.time = time
        self.space = space
        self.attention = Attention(self.in_dim, heads)

    def adapt(self, tokens: Tokens, prompt: Prompt | None = None) -> Tokens:
        real = self.boxes(tokens.mask)  # (B, W, P', K)
        x = self.boxes(tokens.x.movedim(-1, 0)).movedim(0, -1)  # (B, W, P', K, D)
        packed = masked_mean(x, real, 3)  # (B, W, P', D)
        query = packed.flatten(0, 2).unsqueeze(1)  # (B * W * P', 1, D)
        read = self.attention(query, x.flatten(0, 2), real.flatten(0, 2)).view(packed.shape)
        mask = real.any(-1)
        return Tokens(
            (packed + read) * mask.unsqueeze(-1), mask, self._span(tokens.span, tokens.mask)
        )

    def grid(self, grid: Grid) -> Grid:
        mask = self.boxes(grid.mask[None])[0].any(-1)
        return Grid(self._span(grid.span[None], grid.mask[None])[0], mask)

    def boxes(self, x: Tensor) -> Tensor:
        """Group ``(..., T, P)`` by boxes: ``(..., T / time, P / space**2, time * space**2)``.

        Raises:
            ValueError: the patches are no square grid whose side ``space`` divides.
        """
        t, p = x.shape[-2:]
        side = math.isqrt(p)
        if side * side != p or side % self.space:
            raise ValueError(
                f"region_packer on {self.stream!r}: {p} tokens a step; "
                f"expected a square grid whose side {self.space} divides"
            )
        n = side // self.space
        x = pad(x, (0, 0, 0, -t % self.time))
        steps = x.shape[-2] // self.time
        cut = x.reshape(*x.shape[:-2], steps, self.time, n, self.space, n, self.space)
        # Boxes first (time, row, column), then what each holds in the same order.
        order = [*range(cut.dim() - 6), -6, -4, -2, -5, -3, -1]
        cut = cut.permute([place % cut.dim() for place in order])
        return cut.reshape(*x.shape[:-2], steps, n * n, self.time * self.space**2)

    def _span(self, span: Tensor, mask: Tensor) -> Tensor:
        """Return the seconds of each group of steps, ``(B, T, 2)`` -> ``(B, W, 2)``."""
        missing = -span.shape[1] % self.time
        real = pad(mask.any(-1), (0, missing)).unflatten(1, (-1, self.time))  # (B, W, time)
        times = pad(span, (0, 0, 0, missing)).unflatten(1, (-1, self.time))  # (B, W, time, 2)
        return joint_span(times, real)
