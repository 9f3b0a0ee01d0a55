"""Place the tokens of all streams in order of time, as AVicuna (arXiv 2403.16276) does."""

from __future__ import annotations

from avllm.errors import UserError
from avllm.layouts.base import Layout, stream_order
from avllm.tokens import Grid


class Interleave(Layout):
    """Sort steps by their start second; at the same second the streams follow in the order given.

    Args:
        streams: the order at equal times; streams that are not named follow in the connector's
            order.
    """

    def __init__(self, *, streams: list[str] | None = None) -> None:
        self.streams = streams or ["video", "audio"]

    def order(self, grids: dict[str, Grid]) -> list[str]:
        """Return the name of each token's stream in order of time.

        Raises:
            UserError: the content of a clip decides how many tokens a stream has, and when.
        """
        names = stream_order(self.streams, grids)
        bounded = [name for name in names if grids[name].at_most]
        if bounded:
            raise UserError(
                "layout interleave sorts tokens by time, but content decides how many tokens "
                f"stream {bounded[0]!r} has and when they happen; take layout concat"
            )
        steps: list[tuple[float, int, int]] = []
        for rank, name in enumerate(names):
            for step, start in enumerate(grids[name].span[:, 0].tolist()):
                second = round(start, 4)  # 0.1 + 0.2 is the same second as 0.3
                steps.append((second, rank, step))
        order: list[str] = []
        for _, rank, step in sorted(steps):
            tokens = int(grids[names[rank]].mask[step].sum())
            order += [names[rank]] * tokens
        return order
