"""Try an LLM before a run: does it read embeddings as it reads token ids, padded and in answers?

Media reach the LLM as embeddings. An architecture that needs token ids beside them, or that cannot
generate from them, fails after hours of training, or answers without media and without an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from avllm.data.collate import Batch, collate
from avllm.data.row import text_row
from avllm.errors import UserError

LENGTHS = (6, 4)  # tokens of the two texts that are read together; the shorter one is padded
NEW_TOKENS = 3
# Largest difference, as a share of the largest number: for float32, for the rest.
EXACT, ROUNDED = 1e-4, 5e-2
FAILURES = (
    ValueError,
    TypeError,
    RuntimeError,
    LookupError,
    AttributeError,
    NotImplementedError,
    AssertionError,
)


class LLMError(UserError):
    """The LLM cannot be given media as embeddings."""


def check_llm(model: Any) -> None:
    """Refuse an LLM that reads embeddings otherwise than token ids, or cannot answer from them.

    Args:
        model: an AVLLM.

    Raises:
        LLMError: with the reason ``embeddings``, ``padding`` or ``generation``.
    """
    trial = _Trial(model)
    training = model.llm.training
    model.llm.eval()
    try:
        with torch.no_grad(), model.beside_llm(None):
            trial.compare_embeddings()
            trial.compare_padding()
            trial.compare_generation()
    finally:
        model.llm.train(training)


class _Trial:
    """The comparisons, each with one text or two."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.llm = model.llm
        self.table = model.llm.get_input_embeddings()
        weight = self.table.weight
        self.device = weight.device
        self.tolerance = EXACT if weight.dtype == torch.float32 else ROUNDED
        numbers = torch.arange(3, 3 + sum(LENGTHS)).remainder(weight.shape[0])
        self.texts = numbers.split(LENGTHS)  # (L,) each

    def compare_embeddings(self) -> None:
        """Read a text as ids and as embeddings."""
        ids = self.texts[0][None].to(self.device)  # (1, L)
        by_ids = self._run("embeddings", lambda: self.llm(input_ids=ids, use_cache=False).logits)
        batch = self._batch(self.texts[:1])
        by_embeds = self._run("embeddings", lambda: self._logits(batch))
        self._compare("embeddings", "reads embeddings otherwise than token ids", by_ids, by_embeds)

    def compare_padding(self) -> None:
        """Read two texts in one batch, padded as in training, and each by itself."""
        together = self._run("padding", lambda: self._logits(self._batch(self.texts)))
        for row, text in enumerate(self.texts):
            alone = self._logits(self._batch([text]))
            padded = together[row : row + 1, : len(text)]
            self._compare("padding", "reads padded rows otherwise than single ones", alone, padded)

    def compare_generation(self) -> None:
        """Generate from embeddings, padded on the left; each step has to see the whole text."""
        batch = self._batch(self.texts, "left")
        answer = self._run("generation", lambda: self._generate(batch))
        for row, text in enumerate(self.texts):
            new = answer.sequences[row].cpu()  # (NEW_TOKENS,)
            whole = torch.cat([text, new[:-1]])
            expected = self._logits(self._batch([whole]))[0, -NEW_TOKENS:]  # (NEW_TOKENS, V)
            steps = torch.stack([logits[row] for logits in answer.logits])
            self._compare(
                "generation", "generates from embeddings otherwise than it reads", expected, steps
            )

    def _generate(self, batch: Batch) -> Any:
        return self.llm.generate(
            inputs_embeds=self.table(batch.input_ids),
            attention_mask=batch.attention_mask.long(),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )

    def _logits(self, batch: Batch) -> Tensor:
        """Return the logits ``(R, L, V)`` of embedded rows."""
        logits: Tensor = self.model.run_llm(self.table(batch.input_ids), batch).logits
        return logits

    def _batch(self, texts: Any, side: str = "right") -> Batch:
        rows = [text_row(text) for text in texts]
        return collate(rows, pad_id=0, padding_side=side).to(self.device)

    def _run(self, reason: str, call: Any) -> Any:
        """Call the LLM; what it raises is why it is refused."""
        try:
            return call()
        except FAILURES as error:
            raise self._error(reason, f"cannot: {type(error).__name__}: {error}") from error

    def _compare(self, reason: str, what: str, expected: Tensor, seen: Tensor) -> None:
        width = min(expected.shape[-1], seen.shape[-1])
        expected, seen = expected[..., :width].float(), seen[..., :width].float()
        difference = float((expected - seen).abs().max())
        largest = float(expected.abs().max())
        if not difference <= largest * self.tolerance:
            raise self._error(
                reason,
                f"{what}: logits differ by {difference:.2g}, with {largest:.2g} as the largest",
            )

    def _error(self, reason: str, seen: str) -> LLMError:
        kind = self.llm.config.model_type
        return LLMError(
            f"model.llm ({kind}) {seen}. Media reach an LLM as embeddings; take an LLM of another "
            "architecture",
            reason=reason,
        )
