"""Text models that recipes ask: any HF causal LM, any OpenAI-compatible server, or rules (for tests and plain edits).

All answer greedily, so that the same prompt gets the same answer. ``load_text_model`` makes one of a short name::

    hf:Qwen/Qwen3-4B-Instruct-2507        a hub name or a local folder
    http://127.0.0.1:8000/v1#Qwen3-4B     a server's address, and behind # the name of the model there
    rules:rules.yaml                      rules in a file
    model.yaml                            any of them with all its options: {type: hf, name: ..., batch_size: 16}
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avllm.text_models.base import TextModel, TextModelError
from avllm.text_models.local import HFModel
from avllm.text_models.rules import RuleModel
from avllm.text_models.server import ServerModel
from avllm.yaml_files import read_mapping

if TYPE_CHECKING:
    pass


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
