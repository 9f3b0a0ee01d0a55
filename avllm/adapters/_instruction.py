"""Embed the instruction that a Q-Former reads beside the media.

InstructBLIP (Dai et al. 2023, arXiv 2305.06500, 3.2): queries and instruction tokens share the
self-attention, so what the queries take from the media depends on the question. The outputs at the
instruction's places are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import cached_file

from avllm.adapters._qformer_text import Text
from avllm.adapters.base import Prompt
from avllm.errors import loading

QFORMER_TOKENIZER = "qformer_tokenizer"


class Instruction(nn.Module):
    """Embeds questions for a Q-Former.

    Args:
        dim: the Q-Former's width.
        llm_dim: width of the LLM's embeddings.
        source: ``llm``: the question's tokens as the LLM embeds them, through a linear layer.
            Else the hub name or folder of a tokenizer (InstructBLIP's is BERT's), whose words
            are learned.
        longest: positions; what a question has more is cut.
        std: of the embeddings at the start.
    """

    def __init__(self, dim: int, llm_dim: int, *, source: str, longest: int, std: float) -> None:
        super().__init__()
        self.longest = longest
        # In a tuple, since a tokenizer is no module. Loaded here: its size is that of the table.
        self._tokenizer: tuple[Any, ...] = () if source == "llm" else (_load_tokenizer(source),)
        self.words: nn.Module
        if self._tokenizer:
            self.words = nn.Embedding(len(self._tokenizer[0]), dim)
            nn.init.normal_(self.words.weight, std=std)
        else:
            into = nn.Linear(llm_dim, dim)
            # As large as positions and queries are, however large the LLM's embeddings are.
            nn.init.normal_(into.weight, std=std / llm_dim**0.5)
            nn.init.zeros_(into.bias)
            self.words = nn.Sequential(nn.LayerNorm(llm_dim), into)
        self.positions = nn.Embedding(longest, dim)
        nn.init.normal_(self.positions.weight, std=std)

    def forward(self, prompt: Prompt) -> Text:
        """Embed the question about each clip.

        Args:
            prompt: of B clips.

        Returns:
            ``(B, A, dim)``; where nothing is asked, the mask is all False.
        """
        if self._tokenizer:
            words, mask = self._tokenize(prompt)
        else:
            words = prompt.x[:, : self.longest].to(self.positions.weight.dtype)  # (B, A, D_llm)
            mask = prompt.mask[:, : self.longest]  # (B, A)
        places = torch.arange(mask.shape[1], device=mask.device)
        return Text(self.words(words) + self.positions(places), mask)

    def load_instructblip(self, source: Mapping[str, Tensor]) -> None:
        """Start from InstructBLIP's embeddings of words and positions.

        The LLM's words are not InstructBLIP's, so that an instruction of the LLM's tokens leaves
        both.

        Args:
            source: ``words.weight`` and ``positions.weight``; empty for a checkpoint without them.

        Raises:
            ValueError: the checkpoint's vocabulary or its longest text is another.
        """
        if not source or not self._tokenizer:
            return
        own = self.state_dict()
        for name, x in own.items():
            seen = tuple(source[name].shape) if name in source else "nothing"
            if seen != tuple(x.shape):
                raise ValueError(
                    f"the checkpoint's instruction has {name} {seen}, this Q-Former's "
                    f"{tuple(x.shape)}; give instruction the checkpoint's name, which has its "
                    "tokenizer"
                )
        self.load_state_dict(dict(source))

    def _tokenize(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Return ids ``(B, A)`` of the own vocabulary and which are real, ``(B, A)`` bool."""
        (tokenizer,) = self._tokenizer
        settings = {"padding": True, "truncation": True, "max_length": self.longest}
        texts = [text or " " for text in prompt.texts]
        # A special token in a question is read as text.
        encoded = tokenizer(texts, return_tensors="pt", split_special_tokens=True, **settings)
        mask = encoded["attention_mask"].bool().to(prompt.mask.device)
        asks = torch.tensor([bool(text) for text in prompt.texts], device=mask.device)  # (B,)
        return encoded["input_ids"].to(prompt.mask.device), mask & asks[:, None]


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    with loading("the tokenizer of qformer's instruction", name):
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=False, subfolder=_subfolder(name)
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _subfolder(name: str) -> str:
    """Return the folder of a checkpoint in which InstructBLIP has the Q-Former's tokenizer."""
    path = cached_file(
        name,
        f"{QFORMER_TOKENIZER}/tokenizer_config.json",
        _raise_exceptions_for_missing_entries=False,
    )
    return "" if path is None else QFORMER_TOKENIZER
