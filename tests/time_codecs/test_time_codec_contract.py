"""Every time codec keeps its promise: written times are read back, in order, within the clip."""

from __future__ import annotations

from typing import Any

import pytest

from avllm.registry import build, choices
from avllm.time_codecs.base import OVERRUN, Mixture, TimeCodec, TimeError
from avllm.times import Time

CASES: dict[str, list[dict[str, Any]]] = {
    "seconds": [{}, {"decimals": 0}, {"decimals": 3}],
    "percent": [{}, {"mark": ""}],
    "time_tokens": [{}, {"number": 61, "word": "[t{}]"}],
    "anchors": [{}, {"number": 61}],
}
"""Options under which a codec is tested; one without a line is tested with its defaults."""
ALL = [(name, options) for name in choices("time_codecs") for options in CASES.get(name, [{}])]
CASE = pytest.mark.parametrize(
    ("name", "options"), ALL, ids=[f"{name} {options}" for name, options in ALL]
)
DURATIONS = [0.7, 10.0, 61.7, 3600.0]


def made(name: str, options: dict[str, Any]) -> TimeCodec:
    codec: TimeCodec = build("time_codecs", {"type": name, **options})
    return codec


def shown(codec: TimeCodec, time: Time, duration: float) -> str:
    pieces = codec.write(time, duration)
    return "".join(piece.word if isinstance(piece, Mixture) else piece for piece in pieces)


@CASE
@pytest.mark.parametrize("duration", DURATIONS)
def test_what_is_written_is_read_back(name: str, options: dict[str, Any], duration: float) -> None:
    codec = made(name, options)
    close = codec.resolution(duration) + 1e-6
    for share in (0.0, 0.1, 0.333, 0.5, 0.998, 1.0):
        moment = share * duration
        (seen,) = codec.read(f"It is at {shown(codec, Time(moment), duration)}, I think.", duration)
        assert seen.end is None
        assert abs(seen.start - moment) <= close
        start, end = 0.3 * moment, moment
        if end - start <= 2 * close:
            continue
        (seen,) = codec.read(f"from {shown(codec, Time(start, end), duration)}.", duration)
        assert seen.end is not None
        assert abs(seen.start - start) <= close
        assert abs(seen.end - end) <= close


@CASE
def test_several_times_are_read_in_order(name: str, options: dict[str, Any]) -> None:
    codec, duration = made(name, options), 60.0
    times = [Time(3.0), Time(12.0, 30.0), Time(6.0), Time(40.0, 59.0)]
    text = ", then ".join(shown(codec, time, duration) for time in times)
    seen = codec.read(text, duration)
    assert [time.end is None for time in seen] == [True, False, True, False]
    assert [time.start for time in seen] == pytest.approx(
        [3, 12, 6, 40], abs=codec.resolution(duration)
    )


@CASE
def test_later_times_are_not_read_as_earlier(name: str, options: dict[str, Any]) -> None:
    codec = made(name, options)
    moments = [codec.read(shown(codec, Time(i / 7), 20.0), 20.0)[0].start for i in range(141)]
    assert moments == sorted(moments)


@CASE
def test_an_answer_says_seconds(name: str, options: dict[str, Any]) -> None:
    codec, duration = made(name, options), 100.0
    bell, dog = Time(12.0, 34.0), Time(56.0)
    text = f"A bell, {shown(codec, bell, duration)}, and a dog at {shown(codec, dog, duration)}."
    said = made("seconds", {}).read(codec.to_seconds(text, duration), duration)
    assert said[0].start == pytest.approx(12, abs=1.01)
    assert said[0].end == pytest.approx(34, abs=1.01)
    assert said[1].end is None
    assert said[1].start == pytest.approx(56, abs=1.01)
    assert codec.to_seconds("a bell and a dog", duration) == "a bell and a dog"


@CASE
def test_times_outside_the_clip_are_refused(name: str, options: dict[str, Any]) -> None:
    codec = made(name, options)
    for time in (Time(11.0), Time(3.0, 10.0 + 2 * OVERRUN)):
        with pytest.raises(TimeError) as error:
            codec.write(time, 10.0)
        assert error.value.reason == "outside_clip"
    assert shown(codec, Time(10.0 + OVERRUN / 2), 10.0) == shown(codec, Time(10.0), 10.0)


@CASE
def test_a_duration_is_asked_for_where_it_is_needed(name: str, options: dict[str, Any]) -> None:
    codec = made(name, options)
    if codec.needs_duration:
        with pytest.raises(TimeError) as error:
            codec.write(Time(1.0), None)
        assert error.value.reason == "no_duration"
    else:
        assert codec.write(Time(1.0), None) == codec.write(Time(1.0), 10.0)


@CASE
def test_its_words_are_distinct_and_written_whole(name: str, options: dict[str, Any]) -> None:
    words = made(name, options).words()
    assert len(set(words)) == len(words)
    assert not any(word.strip() != word or not word for word in words)


@pytest.mark.parametrize(
    ("text", "times"),
    [
        ("1.5 s", [Time(1.5)]),
        ("at 2 seconds", [Time(2.0)]),
        (
            "From 0.5 to 3 seconds: dog. From 5.0 s to 8.1 s: bell.",
            [Time(0.5, 3.0), Time(5.0, 8.1)],
        ),
        ("4.5 - 6 sec", [Time(4.5, 6.0)]),
        ("3 dogs, 2 stars, mp3 s", []),
        ("", []),
    ],
)
def test_seconds_as_people_write_them(text: str, times: list[Time]) -> None:
    assert made("seconds", {}).read(text, 10.0) == times


def test_percent_by_hand() -> None:
    percent, bare = made("percent", {}), made("percent", {"mark": ""})
    assert percent.write(Time(2.0, 6.0), 8.0) == ["25%", " to ", "75%"]
    assert percent.write(Time(0.0, 8.0), 8.0) == ["00%", " to ", "99%"]
    assert (
        percent.to_seconds("from 25% to 75%, 3 dogs in 100% sun", 8.0)
        == "from 2.0 s to 6.0 s, 3 dogs in 100% sun"
    )
    assert (
        bare.to_seconds("from 25 to 75, in 1999, 12.5", 8.0) == "from 2.0 s to 6.0 s, in 1999, 12.5"
    )


def test_a_mixture_has_weights_that_sum_to_one() -> None:
    assert Mixture({"<1>": 0.3, "<2>": 0.7}).word == "<2>"
    for weights in ({}, {"a": 0.5}, {"a": 1.5, "b": -0.5}):
        with pytest.raises(ValueError, match="sum to 1"):
            Mixture(weights)


def test_a_time_token_is_the_nearest_of_those_spread_over_the_clip() -> None:
    codec = made("time_tokens", {"number": 100})
    assert codec.moment(0.0, 20.0) == ["<time_0>"]
    assert codec.moment(20.0, 20.0) == ["<time_99>"]
    assert codec.moment(5.0, 20.0) == ["<time_25>"]  # 99 * 5 / 20 = 24.75
    assert codec.find("<time_100>", 20.0) == []


@pytest.mark.parametrize("moment", [0.0, 3.3, 5.0, 19.99, 20.0])
def test_the_mean_of_two_anchors_is_the_moment(moment: float) -> None:
    codec = made("anchors", {"number": 11})
    (mixture,) = codec.moment(moment, 20.0)
    assert isinstance(mixture, Mixture)
    assert len(mixture.weights) <= 2
    mean = 0.0
    for word, weight in mixture.weights.items():
        (mention,) = codec.find(word, 20.0)
        mean += weight * mention.seconds
    assert mean == pytest.approx(moment)
