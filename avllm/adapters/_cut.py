"""Cut a stream into the units that queries read at a time: frames, windows of time, or clips."""

from __future__ import annotations

from torch import Tensor

from avllm.adapters.base import gather_steps, time_windows, whole_span, window_grid
from avllm.tokens import Grid, Tokens


class UnitCut:
    """Cut streams into frames, windows or whole clips.

    Args:
        owner: the adapter and its stream, for messages.
        per: ``frame`` (each time step by itself), ``window`` or ``clip``.
        seconds: length and distance of the windows; None where there are none.
        context: seconds around a window's centre that belong to it; more than ``seconds`` lets
            windows overlap.

    Raises:
        ValueError: an unknown unit, or settings of windows that contradict each other.
    """

    def __init__(
        self, owner: str, per: str, seconds: float | None = None, context: float | None = None
    ) -> None:
        if per not in ("frame", "window", "clip"):
            raise ValueError(f"{owner} has per {per!r}; expected 'frame', 'window' or 'clip'")
        if (per == "window") != (seconds is not None):
            raise ValueError(
                f"{owner} has per {per!r} and seconds {seconds}; a window needs seconds"
            )
        if seconds is not None and seconds <= 0:
            raise ValueError(f"{owner} has seconds {seconds}; expected more than 0")
        if context is not None and (seconds is None or context < seconds):
            raise ValueError(
                f"{owner} has context {context}; expected at least the window's seconds "
                f"({seconds}), for what lies between narrower ones would not be read"
            )
        self.per = per
        self.seconds = float(seconds or 0)
        self.context = context

    def of(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Return the units of a batch of clips.

        Args:
            tokens: ``(B, T, P, D)``.

        Returns:
            G units a clip of M tokens: features ``(B, G, M, D)``, mask ``(B, G, M)``, and the
            seconds of each unit ``(B, G, 2)``.
        """
        if self.per == "frame":
            return tokens.x, tokens.mask, tokens.span
        real = tokens.mask.any(-1)  # (B, T)
        if self.per == "clip":
            x, mask = tokens.flat()
            return x.unsqueeze(1), mask.unsqueeze(1), whole_span(tokens.span, real)
        windows = time_windows(tokens.span, real, self.seconds, self.context)
        x, keep = gather_steps(tokens, windows)  # (B, W, K, P, D)
        return x.flatten(2, 3), keep.flatten(2, 3), windows.span

    def grid(self, grid: Grid, tokens: int) -> Grid:
        """Return the grid of one clip whose units become ``tokens`` tokens each."""
        real = grid.mask.any(-1)  # (T,)
        if self.per == "frame":
            span = grid.span
        elif self.per == "clip":
            span = whole_span(grid.span[None], real[None])[0]
            real = real.any()[None]
        else:
            windows, keep = window_grid(grid, self.seconds, self.context)
            span, real = windows.span[0], keep.flatten(1).any(1)
        return Grid(span, real[:, None].expand(-1, tokens))
