"""Settings in YAML files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def read_mapping(path: Path, what: str, refusal: type[Exception]) -> dict[str, Any]:
    """Keys and values of a YAML file.

    Args:
        path: the file.
        what: it should be, for the message.
        refusal: the error of the caller.

    Raises:
        refusal: there is no such file, it is no YAML, or no mapping.
    """
    if not path.is_file():
        raise refusal(f"{path} is not a file; expected {what} (YAML)")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise refusal(f"{path} is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise refusal(f"{path} holds {type(found).__name__}; expected a mapping of settings")
    return found
