"""How many tokens a row has, when its media are not at hand but their numbers of tokens are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from avllm.data.schema import RowError, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from avllm.models.processing_avllm import AVProcessor


class ProcessorTokens:
    """Counts as training does: the chat template, the media runs, the longest row."""

    def __init__(self, processor: AVProcessor) -> None:
        self.processor = processor

    def __call__(self, sample: Sample, media: Sequence[dict[str, int]]) -> int:
        """Tokens of a training row whose media parts take ``media`` tokens by stream.

        Raises:
            RowError: as in training: an empty answer, reserved text, too long, nothing to train on.
        """
        runs = [[stream for stream, count in part.items() for _ in range(count)] for part in media]
        row = self.processor.row(sample, [{}] * len(runs), runs=runs)
        if row.num_targets == 0:
            raise RowError("no_answer", "no token of this row is trained on")
        return len(row.input_ids)


class TextTokens:
    """Counts text alone, for a tokenizer without a model: a row that is too long by its text is too long."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, sample: Sample, media: Sequence[dict[str, int]]) -> int:
        """Tokens of all turns' text.

        Raises:
            RowError: they are more than ``max_length``.
        """
        texts = [message.text for message in sample.messages]
        count = sum(len(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"])
        if count > self.max_length:
            raise RowError("too_long", f"{count} tokens of text alone; the longest row is {self.max_length}")
        return count


def reading(processor: AVProcessor) -> str:
    """A name for how a processor reads media: equal for processors that make the same tokens of a file."""
    config = processor.config
    how = [
        {s: p.settings() for s, p in processor.preprocessors.items()},
        [config.sampling, config.connector, config.layout, config.fusion, processor.widths],
    ]
    return hashlib.sha256(json.dumps(how, sort_keys=True, default=str).encode()).hexdigest()[:16]
