"""Run a causal LM of transformers with a chat template as a text model, on this machine."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avllm.data.store.storage import sha256
from avllm.text_models.base import Answer, ModelPrompt, TextModelError, spoken

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class HFModel:
    """Any causal LM with a chat template, greedy, in batches padded on the left.

    In float32 an answer does not depend on its batch; in bfloat16 close calls may.

    Args:
        name: a folder or a hub name.
        revision: of the hub.
        max_new_tokens: longest answer, in tokens; a longer one counts as ``cut_off``.
        batch_size: prompts in a batch.
        dtype: of the weights; ``auto`` = as they were saved.
        device: ``cuda`` when there is one, else ``cpu``.
    """

    def __init__(
        self,
        name: str,
        revision: str | None = None,
        max_new_tokens: int = 128,
        batch_size: int = 8,
        dtype: str = "auto",
        device: str | None = None,
    ) -> None:
        self.name = name
        self.revision = revision
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.dtype = dtype
        self.device = device

    @property
    def identity(self) -> dict[str, Any]:
        """Name, revision, and for a folder the hash of its files."""
        return {
            "type": "hf",
            "name": self.name,
            "revision": self.revision,
            "sha256": folder_digest(self.name),
            "dtype": self.dtype,
            "max_new_tokens": self.max_new_tokens,
        }

    @functools.cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.name, revision=self.revision, trust_remote_code=False
            )
            model = AutoModelForCausalLM.from_pretrained(
                self.name, revision=self.revision, dtype=self.dtype, trust_remote_code=False
            )
        except OSError as error:
            raise TextModelError(
                f"no text model {self.name!r}; expected a folder or a hub name: {error}",
                reason="no_model",
            ) from error
        if not tokenizer.chat_template:
            raise TextModelError(
                f"{self.name} has no chat template; expected an instruction-tuned model",
                reason="no_chat_template",
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return model.eval().to(device), tokenizer

    def answer(self, prompts: Sequence[ModelPrompt]) -> list[Answer]:
        """Answer each prompt; prompts of similar length share a batch."""
        texts = [self._render(prompt) for prompt in prompts]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        answers: dict[int, Answer] = {}
        for first in range(0, len(order), self.batch_size):
            group = order[first : first + self.batch_size]
            answers |= zip(group, self._generate([texts[i] for i in group]), strict=True)
        return [answers[i] for i in range(len(texts))]

    def _render(self, prompt: ModelPrompt) -> str:
        _, tokenizer = self._loaded
        return str(
            tokenizer.apply_chat_template(
                prompt.messages, tokenize=False, add_generation_prompt=True
            )
        )

    def _generate(self, texts: list[str]) -> list[Answer]:
        import torch

        model, tokenizer = self._loaded
        batch = tokenizer(
            texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        )
        length = batch["input_ids"].shape[1]
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and length + self.max_new_tokens > longest:
            return self._answer_long(texts, length, longest)
        ends = self._ends()
        with torch.inference_mode():
            y = model.generate(  # type: ignore[operator]
                **batch.to(model.device),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                repetition_penalty=1.0,
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
            )  # (B, L)
        return [self._answer(ids, ends) for ids in y[:, length:].tolist()]

    def _answer_long(self, texts: list[str], length: int, longest: int) -> list[Answer]:
        """Answer the texts of a batch whose longest does not fit, one by one."""
        if len(texts) > 1:
            return [answer for text in texts for answer in self._generate([text])]
        need = f"{length} tokens and {self.max_new_tokens} for the answer"
        detail = f"{need}; {self.name} has {longest} positions"
        return [Answer(reason="prompt_too_long", detail=detail)]

    def _ends(self) -> list[int]:
        """Return the ids of tokens that end an answer."""
        model, tokenizer = self._loaded
        ends = model.generation_config.eos_token_id  # type: ignore[union-attr]
        if not isinstance(ends, list):
            ends = [ends]
        return sorted({tokenizer.eos_token_id, *ends} - {None})

    def _answer(self, ids: list[int], ends: list[int]) -> Answer:
        if not set(ids) & set(ends):
            return Answer(reason="cut_off", detail=f"no end within {self.max_new_tokens} tokens")
        _, tokenizer = self._loaded
        return Answer(spoken(str(tokenizer.decode(ids, skip_special_tokens=True))))


@functools.lru_cache(maxsize=8)
def folder_digest(name: str) -> str | None:
    """Return the SHA-256 over the files of a local folder; None for a hub name."""
    if not Path(name).is_dir():
        return None
    total = hashlib.sha256()
    for path in sorted(Path(name).iterdir()):
        if path.is_file() and not path.name.startswith("."):
            total.update(f"{path.name}:{sha256(path)}\n".encode())
    return total.hexdigest()
