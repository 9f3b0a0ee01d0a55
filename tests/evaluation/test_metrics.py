"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from avllm.evaluation.scoring.metrics import (
    bootstrap_mean,
    constant_accuracy,
    constant_error,
    exact_match,
    ranks,
    token_f1,
    wilson,
)


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


def test_scripts_without_spaces_are_compared_by_characters() -> None:
    # 3 of 4 characters right, 3 of 3 found
    assert token_f1("小红色球", ["红色球"]) == pytest.approx(2 * 3 / 7)
    assert exact_match("红 色", ["红色。"])
    assert token_f1("สีแดง", ["สีแดง"]) == 1.0
    # s (with its vowel), and "red" in three: 2 of 4 are the same
    assert 0.0 < token_f1("สีแดง", ["สีดำ"]) < 1.0
    assert token_f1("빨간 공", ["빨간 원"]) == 0.5  # Korean has spaces


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
    own = np.array(
        [[0, 1, 1], [1, 1, 0], [0, 0, 1]], dtype=bool
    )  # several: the best counts, and none is a rival
    assert ranks(scores, own).tolist() == [2, 1, 3]
