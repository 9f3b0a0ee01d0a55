"""Test intervals: their limits and their words."""

from __future__ import annotations

import math

import pytest

from avllm.data.schema import RowError
from avllm.recipes.timespans import checked_span, say_events, say_span, say_spans


@pytest.mark.parametrize(
    ("start", "end", "duration", "overrun", "expected"),
    [
        (0.0, 6.9, 31.0, 0.0, (0.0, 6.9)),
        (24.3, 31.0, 31.0, 0.0, (24.3, 31.0)),
        (24.3, 31.6, 31.0, 1.0, (24.3, 31.0)),
        (24.3, 31.6, None, 0.0, (24.3, 31.6)),
    ],
)
def test_an_end_may_exceed_the_clip_a_little(
    start: float, end: float, duration: float | None, overrun: float, expected: tuple[float, float]
) -> None:
    assert checked_span(start, end, duration, overrun) == expected


@pytest.mark.parametrize(
    ("start", "end", "reason"),
    [
        (9.0, 4.0, "bad_interval"),
        (4.0, 4.04, "bad_interval"),
        (-0.5, 4.0, "bad_interval"),
        (math.nan, 4.0, "bad_interval"),
        (4.0, math.inf, "bad_interval"),
        (9.0, 10.6, "outside_clip"),
        (10.0, 10.4, "outside_clip"),
        (9.98, 10.4, "bad_interval"),
    ],
)
def test_what_is_no_interval_of_the_clip_has_its_reason(
    start: float, end: float, reason: str
) -> None:
    with pytest.raises(RowError) as caught:
        checked_span(start, end, 10.0, 0.5)
    assert caught.value.reason == reason


def test_times_are_said_one_way_in_order() -> None:
    first, second = (0.5, 3.04), (5.25, 8.06)
    assert say_span(first) == "from 0.5 to 3.0 seconds"
    assert say_spans([second, first]) == "From 0.5 to 3.0 seconds, from 5.2 to 8.1 seconds."
    events = [(second, "a dog barks."), (first, "a man speaks")]
    assert (
        say_events(events)
        == "From 0.5 to 3.0 seconds: a man speaks.\nFrom 5.2 to 8.1 seconds: a dog barks."
    )
