"""Define a layout: the order of a clip's tokens in the LLM's sequence; it has no parameters."""

from __future__ import annotations

from avllm.tokens import Grid


class Layout:
    """Order the real tokens of one clip; the tokens of a stream always stay in order of time."""

    def order(self, grids: dict[str, Grid]) -> list[str]:
        """Return the name of each token's stream, in the order of the LLM's sequence.

        Args:
            grids: the grid of each stream that the connector makes of the clip; absent streams are
                missing.

        Returns:
            one name a token, for example ``["video", "audio", "video", ...]``.
        """
        raise NotImplementedError(f"{type(self).__name__}.order")


def stream_order(first: list[str], grids: dict[str, Grid]) -> list[str]:
    """Return the streams of a clip: the named ones first, the others in the connector's order.

    Args:
        first: names in their order; those that the clip lacks are passed over.
        grids: by stream, in the connector's order.
    """
    named = [stream for stream in first if stream in grids]
    others = [stream for stream in grids if stream not in first]
    return named + others
