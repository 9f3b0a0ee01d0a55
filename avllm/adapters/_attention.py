"""Attend from queries to keys of which some are padding; several adapters read media with it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Attention(nn.Module):
    """Attend with several heads (arXiv 1706.03762, section 3.2.2), both sides normalised before.

    Args:
        dim: width of the queries and of the result.
        heads: number of heads; divides ``dim``.
        key_dim: width of the keys; None: that of the queries.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(self, dim: int, heads: int, key_dim: int | None = None) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads is {heads}; expected a number that divides the width {dim}")
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.norm_keys = nn.LayerNorm(key_dim or dim)
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(key_dim or dim, dim)
        self.v_proj = nn.Linear(key_dim or dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, keys: Tensor, real: Tensor) -> Tensor:
        """Return what the queries read, zero where a query sees no key.

        Args:
            x: ``(N, Q, D)``.
            keys: ``(N, K, D')``.
            real: ``(N, K)`` bool, the keys that every query sees, or ``(N, Q, K)``.

        Returns:
            ``(N, Q, D)``.
        """
        seen = real if real.dim() == 3 else real[:, None].expand(-1, x.shape[1], -1)  # (N, Q, K)
        sees = seen.any(-1, keepdim=True)  # (N, Q, 1)
        # A query that sees nothing attends to everything, since its softmax would be empty, and
        # its result is multiplied by 0.
        mask = (seen | ~sees)[:, None]  # (N, 1, Q, K)
        keys = self.norm_keys(keys)
        query = self._split(self.q_proj(self.norm(x)))
        key = self._split(self.k_proj(keys))
        value = self._split(self.v_proj(keys))
        read = scaled_dot_product_attention(query, key, value, attn_mask=mask)  # (N, H, Q, D / H)
        result: Tensor = self.out_proj(read.transpose(1, 2).flatten(2)) * sees
        return result

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, H, L, D / H)


class AttentionBlock(nn.Module):
    """Add what the queries read, then what a feed-forward makes of it.

    Args:
        dim, heads, key_dim: see :class:`Attention`.
        ff_mult: width of the feed-forward, in widths of the queries.
    """

    def __init__(
        self, dim: int, heads: int, key_dim: int | None = None, *, ff_mult: int = 4
    ) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, key_dim)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, ff_mult * dim),
            nn.GELU(),
            nn.Linear(ff_mult * dim, dim),
        )

    def forward(self, x: Tensor, keys: Tensor, real: Tensor) -> Tensor:
        """Return the queries ``(N, Q, D)`` after both steps; see :class:`Attention`."""
        x = x + self.attention(x, keys, real)
        result: Tensor = x + self.feed_forward(x)
        return result
