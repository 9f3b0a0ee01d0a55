"""Check the intervals of a clip and put them into words, to a tenth of a second."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from avllm.data.schema import RowError

Span = tuple[float, float]
"""Start and end in seconds of the clip."""


def checked_span(
    start: float, end: float, duration: float | None = None, overrun: float = 0.0
) -> Span:
    """Return an interval that lies in the clip.

    Args:
        start: seconds of the clip, as annotated.
        end: seconds of the clip, as annotated.
        duration: seconds of the clip; None where the set does not give it.
        overrun: an end that exceeds the clip's by no more than this is the clip's end. Annotators'
            players round lengths up, so that events which last to the end often end a little later.

    Raises:
        RowError: ``bad_interval`` (no numbers, begins before the clip, or shorter than can be said)
            or ``outside_clip``.
    """
    event = f"an event from {start} to {end} s"
    finite = math.isfinite(start) and math.isfinite(end)
    if not finite or not 0 <= start < end:
        raise RowError("bad_interval", f"{event}; expected 0 <= start < end")
    if duration is not None:
        if start >= duration or end > duration + overrun:
            raise RowError("outside_clip", f"{event} in a clip of {duration} s")
        end = min(end, duration)
    if say_time(start) == say_time(end):
        raise RowError("bad_interval", f"{event}: to a tenth of a second, it has no length")
    return start, end


def say_time(seconds: float) -> str:
    """Return a time in words, with one decimal: ``24.3``."""
    return f"{seconds:.1f}"


def say_span(span: Span) -> str:
    """Return an interval in words: ``from 24.3 to 30.4 seconds``."""
    start, end = span
    return f"from {say_time(start)} to {say_time(end)} seconds"


def say_spans(spans: Iterable[Span]) -> str:
    """Return intervals in order of time, as a sentence.

    ``From 0.5 to 3.0 seconds, from 5.0 to 8.1 seconds.``
    """
    return _sentence(", ".join(say_span(span) for span in sorted(spans)))


def say_events(events: Sequence[tuple[Span, str]]) -> str:
    """Return events in order of time, one a line: ``From 0.5 to 3.0 seconds: dog barking.``.

    Args:
        events: (interval, name) each.
    """
    return "\n".join(_sentence(f"{say_span(span)}: {name}") for span, name in sorted(events))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."
