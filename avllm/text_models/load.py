"""Text models that recipes ask: any HF causal LM, any OpenAI-compatible server, or rules (for tests and plain edits).

All answer greedily, so that the same prompt gets the same answer. ``load_text_model`` makes one of a short name::

    hf:Qwen/Qwen3-4B-Instruct-2507        a hub name or a local folder
    http://127.0.0.1:8000/v1#Qwen3-4B     a server's address, and behind # the name of the model there
    rules:rules.yaml                      rules in a file
    model.yaml                            any of them with all its options: {type: hf, name: ..., batch_size: 16}
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from avllm.recipes.readers import RecipeError
from avllm.data.store.storage import sha256
from avllm.yaml_files import read_mapping

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

THOUGHTS = re.compile(r"\A.*?</think>", re.DOTALL)  # many templates write the opening mark into the prompt


class TextModelError(RecipeError):
    """A text model that cannot be reached or used. A job goes on when it is started again: all batches are kept but
    the one that failed."""


@dataclass(frozen=True)
class Prompt:
    """What a text model is asked."""

    user: str
    system: str = ""

    @property
    def messages(self) -> list[dict[str, str]]:
        """In the form of chat templates and of the OpenAI API."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.user}]


@dataclass(frozen=True)
class Answer:
    """A text, or why there is none (``reason`` is one word: ``refused``, ``cut_off``, ``prompt_too_long``)."""

    text: str = ""
    reason: str = ""
    detail: str = ""


class TextModel(Protocol):
    """Answers prompts.

    Attributes:
        identity: all that decides an answer, besides the prompt; JSON-able.
        batch_size: prompts that are best asked at once.
    """

    @property
    def identity(self) -> dict[str, Any]: ...

    @property
    def batch_size(self) -> int: ...

    def answer(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """One answer a prompt, in order.

        Raises:
            TextModelError: the model cannot be reached or used.
        """
        ...


def spoken(text: str) -> str:
    """An answer without what a reasoning model thought before it, and without space around it."""
    return THOUGHTS.sub("", text).strip()


class RuleModel:
    """Answers by the first rule whose pattern is found in the prompt.

    Args:
        rules: (regular expression, answer); the answer may name groups: ``\\1``.
        otherwise: the answer when no rule fits.
    """

    batch_size = 64

    def __init__(self, rules: Sequence[tuple[str, str]], otherwise: str = "") -> None:
        self.rules = [(re.compile(pattern, re.DOTALL), template) for pattern, template in rules]
        for pattern, template in self.rules:
            pattern.sub(template, "")  # an answer that names a group which its pattern lacks is refused now
        self.otherwise = otherwise

    @property
    def identity(self) -> dict[str, Any]:
        """The rules themselves."""
        rules = [[pattern.pattern, template] for pattern, template in self.rules]
        return {"type": "rules", "rules": rules, "otherwise": self.otherwise}

    def answer(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """See :class:`TextModel`."""
        return [Answer(self._answer(prompt.user)) for prompt in prompts]

    def _answer(self, text: str) -> str:
        for pattern, template in self.rules:
            if found := pattern.search(text):
                return found.expand(template)
        return self.otherwise


class HFModel:
    """Any causal LM with a chat template, greedy, in batches padded on the left.

    In float32 an answer does not depend on the batch that it was made in; in bfloat16 close calls may.

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
        self.name, self.revision, self.max_new_tokens = name, revision, max_new_tokens
        self.batch_size, self.dtype, self.device = batch_size, dtype, device

    @property
    def identity(self) -> dict[str, Any]:
        """Name, revision, and for a folder the hash of what is in it."""
        found = {"name": self.name, "revision": self.revision, "sha256": folder_digest(self.name)}
        return {"type": "hf", **found, "dtype": self.dtype, "max_new_tokens": self.max_new_tokens}

    @functools.cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.name, revision=self.revision)
            model = AutoModelForCausalLM.from_pretrained(self.name, revision=self.revision, dtype=self.dtype)
        except OSError as error:
            raise TextModelError(f"no text model {self.name!r}; expected a folder or a hub name: {error}") from error
        if not tokenizer.chat_template:
            raise TextModelError(f"{self.name} has no chat template; expected an instruction-tuned model")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return model.eval().to(device), tokenizer

    def answer(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """See :class:`TextModel`; prompts of similar length share a batch."""
        _, tokenizer = self._loaded
        texts = [
            str(tokenizer.apply_chat_template(p.messages, tokenize=False, add_generation_prompt=True)) for p in prompts
        ]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: dict[int, Answer] = {}
        for first in range(0, len(order), self.batch_size):
            group = order[first : first + self.batch_size]
            found |= zip(group, self._generate([texts[i] for i in group]), strict=True)
        return [found[i] for i in range(len(texts))]

    def _generate(self, texts: list[str]) -> list[Answer]:
        import torch

        model, tokenizer = self._loaded
        batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        length = batch["input_ids"].shape[1]
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and length + self.max_new_tokens > longest:
            detail = f"{length} tokens and {self.max_new_tokens} for the answer; {self.name} has {longest} positions"
            if len(texts) == 1:
                return [Answer(reason="prompt_too_long", detail=detail)]
            return [answer for text in texts for answer in self._generate([text])]
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

    def _ends(self) -> list[int]:
        model, tokenizer = self._loaded
        own = model.generation_config.eos_token_id  # type: ignore[union-attr]
        return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})

    def _answer(self, ids: list[int], ends: list[int]) -> Answer:
        if not set(ids) & set(ends):
            return Answer(reason="cut_off", detail=f"no end within {self.max_new_tokens} tokens")
        return Answer(spoken(str(self._loaded[1].decode(ids, skip_special_tokens=True))))


@functools.lru_cache(maxsize=8)
def folder_digest(name: str) -> str | None:
    """SHA-256 over the files of a local folder; None for a hub name."""
    if not Path(name).is_dir():
        return None
    total = hashlib.sha256()
    for path in sorted(p for p in Path(name).iterdir() if p.is_file() and not p.name.startswith(".")):
        total.update(f"{path.name}:{sha256(path)}\n".encode())
    return total.hexdigest()


@functools.lru_cache(maxsize=4)
def load_text_model(name: str) -> TextModel:
    """A text model by its short name, made once a process; see the head of this file.

    Raises:
        TextModelError: no such kind of model, no such file, or an option that the model does not have.
    """
    if name.startswith("rules:"):
        return _made({"type": "rules", **_settings(Path(name.removeprefix("rules:")))}, name)
    if name.startswith("hf:"):
        return HFModel(name.removeprefix("hf:"))
    if name.startswith(("http://", "https://")):
        url, _, model = name.partition("#")
        return _made({"type": "server", "url": url, "model": model}, name)
    if name.endswith((".yaml", ".yml")):
        return _made(_settings(Path(name)), name)
    raise TextModelError(f"text model {name!r}; expected hf:NAME, http://HOST:PORT/v1#MODEL, rules:FILE or FILE.yaml")


def _settings(path: Path) -> dict[str, Any]:
    return read_mapping(path, "a text model's settings", TextModelError)


def _made(settings: Mapping[str, Any], name: str) -> TextModel:
    from avllm.text_models.server import ServerModel

    kinds: dict[str, Callable[..., TextModel]] = {"rules": RuleModel, "hf": HFModel, "server": ServerModel}
    kind = settings.get("type")
    if kind not in kinds:
        raise TextModelError(f"{name}: type is {kind!r}; expected one of {', '.join(kinds)}")
    try:
        model = kinds[kind](**{k: v for k, v in settings.items() if k != "type"})
    except (TypeError, ValueError, IndexError, re.error) as error:  # an unknown option, rules that are no pairs, ...
        raise TextModelError(f"{name}: {error}") from error
    if not isinstance(model.batch_size, int) or model.batch_size < 1:
        raise TextModelError(f"{name}: batch_size is {model.batch_size!r}; expected a whole number from 1 on")
    return model
