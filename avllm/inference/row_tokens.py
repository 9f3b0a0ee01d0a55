"""Count the tokens of a row from the token counts of its media, without reading the media."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from avllm.data.schema import RowError, Sample
from avllm.models.rows.control_text import ControlTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from avllm.models.processing_avllm import AVProcessor


class ProcessorTokens:
    """Counts as training does: the chat template, the media runs, the longest row."""

    def __init__(self, processor: AVProcessor) -> None:
        self.processor = processor

    def __call__(
        self,
        sample: Sample,
        media: Sequence[dict[str, int]],
        durations: Sequence[float | None],
    ) -> int:
        """Return the tokens of a training row.

        Args:
            sample: the row.
            media: tokens by stream that each media part takes.
            durations: seconds of each media part.

        Raises:
            RowError: as in training: an empty answer, reserved text, too long, nothing to train on.
        """
        runs = [_run(counts) for counts in media]
        row = self.processor.row(sample, [{}] * len(runs), runs=runs, durations=durations)
        if row.num_targets == 0:
            raise RowError("no_answer", "no token of this row is trained on")
        return len(row.input_ids)

    def control_words(self, sample: Sample) -> list[str]:
        """Return the LLM's control tokens that the row's texts hold; they are read as text."""
        return written_in(self.processor.chat_text.control, sample)


def _run(counts: dict[str, int]) -> list[str]:
    """Return the stream of each token of a media part, one stream after the other."""
    run: list[str] = []
    for stream, count in counts.items():
        run += [stream] * count
    return run


class TextTokens:
    """Counts text alone, for a tokenizer without a model: media can only make a row longer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.control = ControlTokens(tokenizer, str(tokenizer.chat_template or ""), "")

    def __call__(
        self,
        sample: Sample,
        media: Sequence[dict[str, int]],
        durations: Sequence[float | None],
    ) -> int:
        """Return the tokens of all turns' text.

        Raises:
            RowError: there are more than ``max_length``.
        """
        texts = [message.text for message in sample.messages]
        token_ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        count = sum(len(ids) for ids in token_ids)
        if count > self.max_length:
            raise RowError(
                "too_long", f"{count} tokens of text alone; the longest row is {self.max_length}"
            )
        return count

    def control_words(self, sample: Sample) -> list[str]:
        """Return the tokenizer's control tokens that the row's texts hold."""
        return written_in(self.control, sample)


def written_in(control: ControlTokens, sample: Sample) -> list[str]:
    """Return the control tokens in the texts of a row, in order."""
    words: list[str] = []
    for message in sample.messages:
        words += control.written_in(message.text, message.role)
    return words


def reading(processor: AVProcessor) -> str:
    """Return a name that is equal for processors that make the same tokens of a file."""
    config = processor.config
    preprocessors = {
        stream: preprocessor.settings() for stream, preprocessor in processor.preprocessors.items()
    }
    model = [config.sampling, config.connector, config.layout, config.fusion, processor.widths]
    settings = json.dumps([preprocessors, model], sort_keys=True, default=str)
    return hashlib.sha256(settings.encode()).hexdigest()[:16]
