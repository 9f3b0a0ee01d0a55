"""What a layout is: the order in which a clip's streams stand in the LLM's sequence. It has no parameters."""

from __future__ import annotations

from avllm.tokens import Grid


class Layout:
    """Order the real tokens of one clip; within a stream the order of time is never changed."""

    def order(self, grids: dict[str, Grid]) -> list[str]:
        """The streams' names, one entry a token, in the order of the LLM's sequence.

        Args:
            grids: what the connector makes of the clip; absent streams are missing.

        Returns:
            for each place in the clip's run the stream that stands there: ``["video", "audio", "video", ...]``.
        """
        raise NotImplementedError(f"{type(self).__name__}.order")
