"""Load the text models that recipes ask: an HF causal LM, an OpenAI-compatible server, or rules.

All answer greedily, so that the same prompt gets the same answer. ``load_text_model`` makes one of
a short name::

    hf:Qwen/Qwen3-4B-Instruct-2507        a hub name or a local folder
    http://127.0.0.1:8000/v1#Qwen3-4B     a server's address, # and the name of the model there
    rules:rules.yaml                      rules in a file
    model.yaml                            any of them with its options: {type: hf, name: ...}
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from avllm.registry import suggest
from avllm.text_models.base import TextModel, TextModelError
from avllm.text_models.local import HFModel
from avllm.text_models.rules import RuleModel
from avllm.text_models.server import ServerModel
from avllm.yaml_files import read_mapping

KINDS: dict[str, Callable[..., TextModel]] = {
    "rules": RuleModel,
    "hf": HFModel,
    "server": ServerModel,
}


@functools.lru_cache(maxsize=4)
def load_text_model(name: str) -> TextModel:
    """Return a text model by its short name, made once a process; see the head of this file.

    Raises:
        TextModelError: ``unknown_kind``, ``bad_options``, or the file cannot be read.
    """
    if name.startswith("rules:"):
        settings = _read_settings(Path(name.removeprefix("rules:")))
        return _build({"type": "rules", **settings}, name)
    if name.startswith("hf:"):
        return HFModel(name.removeprefix("hf:"))
    if name.startswith(("http://", "https://")):
        url, _, model = name.partition("#")
        return _build({"type": "server", "url": url, "model": model}, name)
    if name.endswith((".yaml", ".yml")):
        return _build(_read_settings(Path(name)), name)
    raise TextModelError(
        f"text model {name!r}; expected hf:NAME, http://HOST:PORT/v1#MODEL, rules:FILE, FILE.yaml",
        reason="unknown_kind",
    )


def _read_settings(path: Path) -> dict[str, Any]:
    return read_mapping(path, "a text model's settings", TextModelError)


def _build(settings: Mapping[str, Any], name: str) -> TextModel:
    kind = settings.get("type")
    if kind not in KINDS:
        raise TextModelError(
            f"{name}: type is {kind!r}; expected one of {', '.join(KINDS)}", reason="unknown_kind"
        )
    options = {key: value for key, value in settings.items() if key != "type"}
    accepted = list(inspect.signature(KINDS[kind]).parameters)
    for option in options:
        if option not in accepted:
            raise TextModelError(
                f"{name}: {kind} has no option {option!r}; {suggest(option, accepted)}",
                reason="bad_options",
            )
    try:
        model = KINDS[kind](**options)
    except TextModelError:
        raise
    # A missing option, rules that are no pairs, ...
    except (TypeError, ValueError, IndexError, re.error) as error:
        raise TextModelError(f"{name}: {error}", reason="bad_options") from error
    if not isinstance(model.batch_size, int) or model.batch_size < 1:
        raise TextModelError(
            f"{name}: batch_size is {model.batch_size!r}; expected a whole number from 1 on",
            reason="bad_options",
        )
    return model
