"""Read what an answer means: a choice, by its letter or its words, or a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from avllm.evaluation.scoring.words import NUMERALS, plain, words

# ---- choices ------------------------------------------------------------------------------------

NOT_AFTER = r"(?<![A-Za-z0-9'])"  # no letter of a word; \b is none between Latin and Han
NOT_BEFORE = r"(?![A-Za-z0-9'])"
LETTER = rf"{NOT_AFTER}([A-Za-z]){NOT_BEFORE}"
MARKED = re.compile(r"(\*\*|__|`)\s*\(?([A-Za-z])[).:]?\s*\1")  # **B**
BOXED = re.compile(r"\\boxed\s*\{\s*(?:\\(?:text|mathrm|textbf)\s*\{)?\s*\(?([A-Za-z])\)?\s*\}+")
MARKUP = re.compile(r"\*\*|__|`|</?answer>|^\s*#+\s", re.IGNORECASE | re.MULTILINE)
WHOLE = re.compile(rf"[(\[]?{LETTER}[)\]]?[.:。、]?")  # B   (b)   B.
LEADING = re.compile(rf"[(\[]?{LETTER}(?:\s*[)\]:、]+\s*|\.\s+|\s+[-–—]\s+|,\s+)(?=\S)")  # B: a dog
LISTED = re.compile(rf"[(\[]?{LETTER}[)\]:](?=\s|$)")  # each of "A) red B) blue"
SAID = (
    r"answer|choice|option|antwort|r[ée]ponse|respuesta|risposta|resposta|ответ|"
    r"答案|答え|正解|选项|選項|选择|選擇|选|選|정답|답"
)
IS = r"(?:is|would be|should be|must be|ist|est|es|è|é|是|应该是|应选|为|為|は|은|는|:|=|-|\s)*"
STATED = re.compile(
    rf"(?:{SAID})\s*(?:choice|option|letter)?\s*{IS}\s*(?:option|choice|letter|选项)?\s*"
    rf"[(\[\"']?{LETTER}([)\].:,;!\"'。,、]?)",
    re.IGNORECASE,
)
BRACKETED = re.compile(r"(?<!\w)[(\[]([A-Za-z])[)\]]")


def pick_choice(answer: str, choices: Sequence[str]) -> int | None:
    """Return the choice that an answer means; None when it means none or several.

    Tried in this order: it is a choice; it says a letter of the list in one of the usual ways
    (``B``, ``(b)``, ``B: a dog``, ``The answer is (B).``, ``**B**``, ``答案是B``); it contains
    exactly one choice as whole words (where a choice is part of a longer one, the longer counts).
    A letter before the words of another choice means neither.
    """
    bare = _without_letters(choices)
    phrases = [words(choice) for choice in bare]
    text = BOXED.sub(r" (\1) ", plain(answer))
    text = MARKED.sub(r" (\2) ", text)
    text = MARKUP.sub(" ", text).strip()
    said = words(text)
    leading = LEADING.match(text)
    contradicts = leading and said in phrases and _place(leading[1]) != phrases.index(said)
    if said in phrases and not contradicts:
        return phrases.index(said)
    contained = _contained(said, phrases)
    letters = _letters(text, len(choices), contained)
    if letters is None:
        letters = contained
    return letters.pop() if len(letters) == 1 else None


def _without_letters(choices: Sequence[str]) -> list[str]:
    """Return the choices without letters in front, where every choice has its own."""
    bare: list[str] = []
    for place, choice in enumerate(choices):
        match = LEADING.match(plain(choice).strip())
        if match is None or _place(match[1]) != place:
            return list(choices)
        bare.append(plain(choice).strip()[match.end() :])
    return bare


def _letters(text: str, count: int, contained: set[int]) -> set[int] | None:
    """Return the choices whose letters an answer says; None if it says none.

    Args:
        text: the answer, without markup.
        count: of the choices.
        contained: choices whose words the answer contains.
    """
    if WHOLE.fullmatch(text):
        return _places([text.strip("()[].:。、 ")], count)
    leading = LEADING.match(text)
    if leading and _place(leading[1]) < count:
        letters = _places([leading[1], *LISTED.findall(text)], count)
        return letters | contained if contained else letters
    lines = text.splitlines()
    last_line = lines[-1].strip() if lines else ""
    groups = [
        [m[1] for m in STATED.finditer(text) if not _is_article(m, text, contained)],
        BRACKETED.findall(text),
        [last_line.strip("()[].: ")] if WHOLE.fullmatch(last_line) else [],
    ]
    for letters_of_group in groups:
        places = _places(letters_of_group, count)
        if places:
            return places
    return None


def _is_article(match: re.Match[str], text: str, contained: set[int]) -> bool:
    """Return whether a letter that ends a wording begins a phrase: "the answer is a dog"."""
    if match[2] or not re.match(r"\s+\w", text[match.end() :]):
        return False
    if match[1] in "aI":
        return True
    return match[1].islower() or (match[1] == "A" and len(contained) == 1)


def _places(letters: Sequence[str], count: int) -> set[int]:
    return {_place(letter) for letter in letters if _place(letter) < count}


def _place(letter: str) -> int:
    return ord(letter.lower()) - ord("a")


def _contained(said: Sequence[str], phrases: Sequence[Sequence[str]]) -> set[int]:
    """Return the choices that an answer contains as whole words; the longest are cut out first."""
    contained: set[int] = set()
    for place in sorted(range(len(phrases)), key=lambda i: -len(phrases[i])):
        without = _cut_out(said, phrases[place])
        if without != tuple(said):
            contained.add(place)
        said = without
    return contained


def _cut_out(text: Sequence[str], phrase: Sequence[str]) -> tuple[str, ...]:
    """Return the text with a gap (a zero character) in the place of each such phrase."""
    size = len(phrase)
    if size == 0:
        return tuple(text)
    rest: list[str] = []
    place = 0
    while place < len(text):
        if tuple(text[place : place + size]) == tuple(phrase):
            rest.append("\0")
            place += size
        else:
            rest.append(text[place])
            place += 1
    return tuple(rest)


# ---- times --------------------------------------------------------------------------------------

UNITS = {"h": 3600.0, "min": 60.0, "s": 1.0, "ms": 0.001}
UNIT = (
    r"(?P<ms>ms|msecs?|milliseconds?|毫秒)|(?P<h>h|hrs?|hours?|小时|時間)|"
    r"(?P<min>mins?|minutes?|minuten?|分钟|分|m(?=\s*\d))|"
    r"(?P<s>s|secs?|seconds?|sekunden?|secondes?|segundos?|secondi|秒钟|秒)"
)
CLOCK = r"(?:(?P<hours>\d+):)?(?P<minutes>\d{1,3}):(?P<seconds>[0-5]\d(?:[.,]\d+)?)(?![:\d])"
NUMBER = r"(?P<number>[+-]?(?:\d+(?:[.,]\d+)*|\.\d+))"
QUANTITY = re.compile(rf"(?<![\w.]){CLOCK}|(?<![\d.,]){NUMBER}(?:[\s-]?\s*(?:{UNIT})(?![a-z]))?")
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")
NUMERAL = re.compile(rf"\b({'|'.join(sorted(NUMERALS, key=len, reverse=True))})\b")


@dataclass
class _Quantity:
    """A number of a text, with the size of its unit in seconds (None without one) and its end."""

    value: float
    unit: float | None
    end: int


def read_seconds(answer: str) -> float | None:
    """Return the one time that an answer names, in seconds; None if it names none or several.

    Read are ``1.3``, ``1,5 s``, ``two seconds``, ``0:05``, ``1:02:03.5``, ``1 min 30 s``,
    ``250 ms``. Numbers without a unit count only where no number has one: "clip 2, at 3 s".
    """
    text = NUMERAL.sub(lambda match: NUMERALS[match[1]], plain(answer).casefold())
    quantities = list(_quantities(text))
    with_unit = {quantity.value for quantity in quantities if quantity.unit is not None}
    values = with_unit or {quantity.value for quantity in quantities}
    return values.pop() if len(values) == 1 else None


def _quantities(text: str) -> Iterator[_Quantity]:
    """Yield the numbers of a text in seconds; "1 min 30 s" is one."""
    last: _Quantity | None = None
    for match in QUANTITY.finditer(text):
        quantity = _quantity(match)
        goes_on = False
        if last is not None and last.unit is not None and quantity.unit is not None:
            between = text[last.end : match.start()].strip()
            goes_on = quantity.unit < last.unit and between in ("", "and", ",", "und", "et")
        if last is not None and goes_on:
            last = _Quantity(last.value + quantity.value, quantity.unit, quantity.end)
            continue
        if last is not None:
            yield last
        last = quantity
    if last is not None:
        yield last


def _quantity(match: re.Match[str]) -> _Quantity:
    if match["seconds"] is not None:
        seconds = float(match["seconds"].replace(",", "."))
        seconds += 60 * int(match["minutes"]) + 3600 * int(match["hours"] or 0)
        return _Quantity(seconds, 1.0, match.end())
    unit = next((size for name, size in UNITS.items() if match[name]), None)
    value = _number(match["number"]) * (unit or 1.0)
    return _Quantity(value, unit, match.end())


def _number(text: str) -> float:
    """Read a number with a decimal point or comma; ``1,500`` is a thousand and a half."""
    if THOUSANDS.fullmatch(text):
        return float(text.replace(",", ""))
    whole, _, decimals = text.replace(",", ".").rpartition(".")
    if "." not in whole:
        return float(f"{whole}.{decimals}" if whole or "." in text else decimals)
    return float(whole.replace(".", "") + "." + decimals)


class TimeDeviation(NamedTuple):
    """An answer's error in seconds; ``is_number`` is False where it named no time."""

    seconds: float
    is_number: bool


def time_error(answer: str, seconds: float, worst: float) -> TimeDeviation:
    """Return the absolute error of an answer that should be a time.

    Args:
        answer: what the model said.
        seconds: the true time.
        worst: the error of an answer that names no time.
    """
    value = read_seconds(answer)
    if value is None:
        return TimeDeviation(worst, is_number=False)
    return TimeDeviation(abs(value - seconds), is_number=True)
