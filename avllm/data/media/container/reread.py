"""Read a file, and read it again with a rising clock where its times turn out to step back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from avllm.data.media.open import OpenMedia, TimeStepsBack

T = TypeVar("T")


def reading(media: OpenMedia, read: Callable[[OpenMedia], T]) -> T:
    """Return what ``read`` returns of an open file.

    Most containers have an index, and most files times that rise. So a step back is noticed when it
    is read; then all packets are looked at, and the reading begins again.
    """
    try:
        return read(media)
    except TimeStepsBack:
        media.open()
        media.make_clock_rise()
        return read(media)
