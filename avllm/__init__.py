"""avllm: make a language model see and hear.

Importing this package loads nothing heavy; the public names are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.2.0.dev0"

_PUBLIC = {
    "AVConfig": "avllm.models.configuration_avllm",
    "AVLLM": "avllm.models.modeling_avllm",
    "AVProcessor": "avllm.models.processing_avllm",
    "Chat": "avllm.inference.chat",
    "Sample": "avllm.data.schema",
    "Tokens": "avllm.tokens",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        names = ", ".join(sorted(__all__))
        raise AttributeError(f"module 'avllm' has no attribute {name!r}; it has {names}")
    return getattr(import_module(_PUBLIC[name]), name)
