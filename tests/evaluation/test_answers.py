"""Answers in the wordings of models and the scripts of people: the choice, the time they name."""

from __future__ import annotations

import pytest

from avllm.evaluation.scoring.answers import pick_choice, read_seconds, time_error
from avllm.evaluation.scoring.words import normalise, words


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


@pytest.mark.parametrize(
    "seen, other",
    [
        ("cafe\u0301", "caf\u00e9"),  # composed or not
        ("STRASSE", "stra\u00dfe"),  # case folding
        ("don\u2019t", "don't"),
        ("x\u2010ray", "x-ray"),
        ("\u22123", "-3"),
        ("\uff11\uff12\uff0e\uff15", "12.5"),
        ("\u0663", "3"),  # Arabic digits
        ("\u096a", "4"),  # Devanagari digits
        ("\u7ea2\u8272\u3002", "\u7ea2\u8272"),
        ("\u300c\u8d64\u300d", "\u8d64"),
        ("\u061f\u0646\u0639\u0645\u060c", "\u0646\u0639\u0645"),  # Arabic question mark and comma
        ("\u0939\u093e\u0901\u0964", "\u0939\u093e\u0901"),  # danda
        ("re\u200bd\ufeff", "red"),  # invisible characters
        ("ﬁre", "fire"),  # a ligature
        ("twenty-five", "25"),
        ("yes\u2014it is", "yes it is"),
    ],
)
def test_forms_of_one_text_are_equal(seen: str, other: str) -> None:
    assert normalise(seen) == normalise(other)


def test_marks_belong_to_the_character_before() -> None:
    assert words("\u0e2a\u0e35\u0e41\u0e14\u0e07") == ("\u0e2a\u0e35", "\u0e41", "\u0e14", "\u0e07")
    assert words("3\u79d2") == ("3", "\u79d2")


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


ANIMALS = ["a cat", "a dog", "a bird"]


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("The answer is (B).", 1),
        ("The answer is B.", 1),
        ("the answer is b", 1),
        ("The correct answer is B because it barks.", 1),
        ("The answer is A because it meows.", 0),
        ("Answer: b", 1),
        ("Answer: **B**", 1),
        ("**B**", 1),
        ("**B.**", 1),
        ("**B: a dog**", 1),
        ("`B`", 1),
        ("B: a dog", 1),
        ("B) a dog", 1),
        ("(B) a dog", 1),
        ("b. a dog", 1),
        ("B - a dog", 1),
        ("B, a dog", 1),
        ("Option B", 1),
        ("Choice (C)", 2),
        ("I choose option C.", 2),
        ("My answer would be option (C)", 2),
        ("\\boxed{B}", 1),
        ("The final answer is $\\boxed{\\text{B}}$.", 1),
        ("<answer>B</answer>", 1),
        ("It barks.\nB", 1),
        ("I think it is (B), since it barks", 1),
        ("\uff22", 1),
        ("\uff08\uff22\uff09", 1),
        ("B\uff1aa dog", 1),
        ("B\u3002", 1),
        ("\u7b54\u6848\u662fB\u3002", 1),
        ("\u7b54\u6848\uff1a\uff22", 1),
        ("\u9009B", 1),
        ("\u7b54\u3048\u306fB\u3067\u3059", 1),
        ("La r\u00e9ponse est B.", 1),
        ("Die Antwort ist (B).", 1),
        ("The answer is a dog.", 1),  # an article, not the letter
        ("Answer: a dog", 1),
        ("A dog.", 1),
        ("a bird, I think", 2),
        ("A dog barks", 1),
        ("A: a dog", None),
        ("B: a cat", None),  # it contradicts itself
        ("A) a cat B) a dog C) a bird", None),  # it repeats the list
        ("(A) or (B)", None),
        ("A or B", None),
        ("The answer is A. No, the answer is B.", None),
        ("D", None),
        ("(D)", None),
        ("The answer is (E).", None),
        ("I cannot say.", None),
        ("", None),
    ],
)
def test_letters_in_the_usual_wordings(answer: str, expected: int | None) -> None:
    assert pick_choice(answer, ANIMALS) == expected


@pytest.mark.parametrize(
    "answer, expected", [("blue", 1), ("B", 1), ("B. blue", 1), ("(b)", 1), ("A. blue", None)]
)
def test_choices_that_bring_their_letters(answer: str, expected: int | None) -> None:
    assert pick_choice(answer, ["A. red", "B. blue"]) == expected


def test_choices_in_scripts_without_spaces() -> None:
    colours = ["\u7ea2\u8272", "\u84dd\u8272"]
    assert pick_choice("\u5b83\u662f\u84dd\u8272\u7684\u3002", colours) == 1
    assert pick_choice("\u7ea2\u8272\u548c\u84dd\u8272", colours) is None
    assert pick_choice("\u4e0d\u662f", ["\u662f", "\u4e0d\u662f"]) == 1


def test_letters_that_are_choices_are_choices() -> None:
    assert pick_choice("B", ["B", "A"]) == 0


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("0:05", 5.0),
        ("00:00:05", 5.0),
        ("1:02:03.5", 3723.5),
        ("at 0:05 (5 s)", 5.0),
        ("1,5 s", 1.5),
        ("1,5", 1.5),
        ("0,125 s", 0.125),
        ("1,500 s", 1500.0),
        ("two seconds", 2.0),
        ("Two.", 2.0),
        ("twenty-five seconds", 25.0),
        ("1 min 30 s", 90.0),
        ("1m30s", 90.0),
        ("1 minute and 5 seconds", 65.0),
        ("250 ms", 0.25),
        ("3\u79d2", 3.0),
        ("\uff11\uff0e\uff15 \u79d2", 1.5),
        ("\u0661\u066b\u0665", 1.5),
        ("clip 2, at 3 s", 3.0),
        ("the 1.5-second mark", 1.5),
        (".5 s", 0.5),
        ("1.5 s to 3 s", None),
        ("0:05 or 0:06", None),
    ],
)
def test_times_in_the_usual_forms(answer: str, expected: float | None) -> None:
    assert read_seconds(answer) == expected


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("1.3", 1.3),
        ("at 1.3 seconds.", 1.3),
        ("two", 2.0),
        ("1.3 s", 1.3),
        ("1.3s", 1.3),
        ("-0.5", -0.5),
    ]
    + [("none", None), ("between 1 and 2", None), ("2, that is 2", 2.0), ("", None)],
)
def test_read_seconds(answer: str, expected: float | None) -> None:
    assert read_seconds(answer) == expected


def test_a_time_that_is_no_number_costs_the_worst_case() -> None:
    assert time_error("1.5", 1.25, worst=4.0) == (0.25, True)
    assert time_error("unanswerable", 1.25, worst=4.0) == (4.0, False)
