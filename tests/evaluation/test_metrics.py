"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from avllm.evaluation.metrics import (
    bootstrap_mean,
    constant_accuracy,
    constant_error,
    exact_match,
    normalise,
    pick_choice,
    ranks,
    read_number,
    time_error,
    token_f1,
    wilson,
)


@pytest.mark.parametrize(
    "seen, expected",
    [
        ("  The Red  circle. ", "red circle"),
        ("Two!", "2"),
        ("1.5", "1.5"),
        ("-3", "-3"),
        ("a", "a"),  # the only word stays, even if it is an article
        ("ＲＥＤ", "red"),  # full-width letters
        ("x-ray", "x-ray"),
        ("«yes»", "yes"),
        ("", ""),
    ],
)
def test_normalise(seen: str, expected: str) -> None:
    assert normalise(seen) == expected


def test_exact_match_takes_any_reference() -> None:
    assert exact_match("The crimson.", ["red", "crimson"])
    assert not exact_match("dark red", ["red"])
    assert not exact_match("1.5", ["15"])


def test_token_f1() -> None:
    # 2 of 3 words right, 2 of 2 found: P = 2/3, R = 1, F1 = 0.8
    assert token_f1("big red circle", ["red circle"]) == pytest.approx(0.8)
    assert token_f1("red", ["blue", "red"]) == 1.0
    assert token_f1("", ["red"]) == 0.0
    assert token_f1("red red", ["red"]) == pytest.approx(2 / 3)  # the second one is no second hit


@pytest.mark.parametrize(
    "answer, choices, expected",
    [
        ("Red", ["green", "red"], 1),
        ("It is red.", ["green", "red"], 1),
        ("red or green", ["green", "red"], None),
        ("(b)", ["green", "red"], 1),
        ("B.", ["green", "red"], 1),
        ("E", ["green", "red"], None),
        ("dark red", ["red", "dark red"], 1),  # the longer choice is meant
        ("no, it does not", ["yes", "no"], 1),
        ("nothing", ["yes", "no"], None),  # "no" inside of a word is no answer
        ("two", ["1", "2", "3"], 1),
        ("12", ["1", "2"], None),
        ("", ["1", "2"], None),
        ("unanswerable", ["yes", "no"], None),
    ],
)
def test_pick_choice(answer: str, choices: list[str], expected: int | None) -> None:
    assert pick_choice(answer, choices) == expected


@pytest.mark.parametrize(
    "answer, expected",
    [("1.3", 1.3), ("at 1.3 seconds.", 1.3), ("two", 2.0), ("1.3 s", 1.3), ("1.3s", 1.3), ("-0.5", -0.5)]
    + [("none", None), ("between 1 and 2", None), ("2, that is 2", 2.0), ("", None)],
)
def test_read_number(answer: str, expected: float | None) -> None:
    assert read_number(answer) == expected


def test_a_time_that_is_no_number_costs_the_worst_case() -> None:
    assert time_error("1.5", 1.25, worst=4.0) == (0.25, True)
    assert time_error("unanswerable", 1.25, worst=4.0) == (4.0, False)


def test_wilson() -> None:
    # textbook: 8 of 10 -> (0.8 + 0.19207 -+ 1.96 * sqrt(0.016 + 0.0096036)) / 1.38415
    low, high = wilson(8, 10)
    assert low == pytest.approx(0.49016, abs=1e-4)
    assert high == pytest.approx(0.94332, abs=1e-4)
    assert wilson(0, 10) == (pytest.approx(0.0, abs=1e-12), pytest.approx(0.27753, abs=1e-4))
    assert wilson(10, 10).high == pytest.approx(1.0)
    with pytest.raises(ValueError, match="3 hits of 2"):
        wilson(3, 2)


def test_bootstrap_is_seeded_and_holds_the_mean() -> None:
    values = [0.1, 0.2, 0.3, 0.9, 0.0, 0.4]
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)
    low, high = bootstrap_mean(values, seed=1)
    assert 0.0 <= low < np.mean(values) < high <= 0.9
    assert bootstrap_mean([0.5] * 4) == (0.5, 0.5)


def test_chance() -> None:
    assert constant_accuracy(["red", "Red.", "blue", "green"]) == 0.5
    assert constant_error([1.0, 2.0, 6.0]) == pytest.approx(5 / 3)  # median 2: 1 + 0 + 4


def test_ranks_count_ties_against_the_clip() -> None:
    scores = np.array([[0.9, 0.1, 0.2], [0.5, 0.5, 0.1], [0.7, 0.8, 0.3]])
    assert ranks(scores, np.eye(3, dtype=bool)).tolist() == [1, 2, 3]
    own = np.array([[0, 1, 1], [1, 1, 0], [0, 0, 1]], dtype=bool)  # several: the best counts, and none is a rival
    assert ranks(scores, own).tolist() == [2, 1, 3]
