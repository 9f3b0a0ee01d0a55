"""Define a decoder: change the LLM's logits before the next token of an answer is chosen."""

from __future__ import annotations

from typing import Any

from transformers import LogitsProcessor


class Decoder:
    """Change the logits of each step of an answer."""

    def processors(self, model: Any, batch: Any) -> list[LogitsProcessor]:
        """Return the processors of one call of ``AVLLM.generate``, in order.

        They may keep a state between steps.
        They come before temperature and top-p. The first step calls them with ``input_ids (R, 0)``,
        since prompts are embedded; each further one with the tokens answered so far, ``(R, n)``,
        and all with ``scores (R, V)`` float32. What they do to a row must not depend on the batch's
        other rows or on padding, so that answers in a batch are those of single rows.

        Args:
            model: an :class:`~avllm.models.modeling_avllm.AVLLM`. Its ``media_steps(batch)`` cost
                nothing here, and ``prefill`` reads other rows into a cache that is extended by a
                token a step.
            batch: the prompts, an :class:`~avllm.data.collate.Batch` padded on the left.

        Raises:
            ValueError: a batch that this decoder cannot answer.
        """
        raise NotImplementedError(f"{type(self).__name__}.processors")
