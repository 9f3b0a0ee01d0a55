"""Check the names of streams and resolve the medium of each: what its encoder takes in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from avllm.errors import UserError

MEDIA = ("video", "audio")
"""Media that encoders take in: frames or sound. A stream of that name has that medium."""
RESERVED = ("text", "image", "both")


def check_stream(stream: str, spec: Mapping[str, Any]) -> None:
    """Check a stream's name and medium, as the section ``encoders`` gives them.

    Raises:
        UserError: the name is reserved or holds other characters, or the medium is missing or
            unknown.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", stream) or stream in RESERVED:
        raise UserError(
            f"a stream is called {stream!r}; expected small letters, digits and _, and none of "
            f"{', '.join(RESERVED)}. Rename it"
        )
    medium_of(stream, spec)


def medium_of(stream: str, spec: Mapping[str, Any]) -> str:
    """Return ``video`` or ``audio``: the medium of a stream by its section of ``encoders``.

    Raises:
        UserError: it is not given and not the stream's name either.
    """
    medium = str(spec.get("medium", stream))
    if medium not in MEDIA:
        seen = f"medium is {medium!r}" if "medium" in spec else "it has no medium"
        action = "write `medium: audio` or `medium: video` beside its type"
        raise UserError(f"stream {stream!r}: {seen}; {action}")
    return medium
