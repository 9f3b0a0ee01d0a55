"""Bring texts of any script into the form in which they are compared."""

from __future__ import annotations

import re
import string
import unicodedata
from functools import lru_cache

ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
TEENS = "fifteen sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
ARTICLES = {"a", "an", "the"}
# Characters of Han, Kana, Thai, Lao, Burmese and Khmer: scripts without spaces between words.
SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005\u3007\u3041-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
SIGN = "\0"  # replaces the minus of -3, which is no punctuation to strip
INNER = "'-"  # what remains inside of words: don't, x-ray
# Quotes, hyphens and minus signs of Unicode that have an ASCII form, and Arabic separators.
PLAIN = str.maketrans({"’": "'", "‐": "-", "‑": "-", "−": "-", "٫": ".", "٬": None})


def _numerals() -> dict[str, str]:
    """Return the English numerals to 99, with hyphens, as digits."""
    small = [*ONES.split(), *TEENS.split()]
    numerals = {word: str(number) for number, word in enumerate(small)}
    for ten, word in enumerate(TENS.split(), start=2):
        numerals[word] = str(10 * ten)
        for one in range(1, 10):
            numerals[f"{word}-{small[one]}"] = str(10 * ten + one)
    return numerals


NUMERALS = _numerals()


@lru_cache(maxsize=100_000)  # answers and choices are the same few texts again and again
def plain(text: str) -> str:
    """Return a text in Unicode's compatibility form with its case kept.

    Full-width forms become ASCII, decimal digits of all scripts become 0 to 9, typographic
    apostrophes and hyphens plain ones; invisible format characters are dropped.
    """
    characters: list[str] = []
    for character in unicodedata.normalize("NFKC", text).translate(PLAIN):
        category = unicodedata.category(character)
        if category == "Nd":
            characters.append(str(unicodedata.decimal(character)))
        elif category != "Cf":
            characters.append(character)
    return "".join(characters)


@lru_cache(maxsize=100_000)
def words(text: str) -> tuple[str, ...]:
    """Return the words of a text in the form in which they are compared.

    That is: :func:`plain` with case folded, no punctuation at their edges, no articles, ``2`` for
    ``two``. Punctuation inside a word stays, so that ``1.5`` is not ``15`` and ``x-ray`` is one
    word; punctuation of other scripts than the Latin one separates words. Scripts without spaces
    are compared by characters: their words are not marked.
    """
    folded = unicodedata.normalize("NFKC", plain(text).casefold())
    pieces = [piece.strip(string.punctuation) for piece in _separated(folded).split()]
    units: list[str] = []
    for piece in pieces:
        units += _units(NUMERALS.get(piece, piece))
    without_articles = [unit for unit in units if unit not in ARTICLES]
    chosen = without_articles or units  # the answer "a" keeps its word
    return tuple(unit.replace(SIGN, "-") for unit in chosen)


def normalise(text: str) -> str:
    """Return the :func:`words` of a text in one string."""
    return " ".join(words(text))


def _separated(text: str) -> str:
    """Replace punctuation that is not ASCII by spaces, and a minus before a digit by a sign."""
    characters = []
    for character in text:
        is_ascii = character in string.punctuation
        is_punctuation = unicodedata.category(character).startswith("P")
        characters.append(" " if is_punctuation and not is_ascii else character)
    return re.sub(r"(^|\s)-(?=\.?\d)", rf"\1{SIGN}", "".join(characters))


def _units(piece: str) -> list[str]:
    """Cut a word into what is compared: characters of scripts without spaces, and the rest.

    A combining mark belongs to the character before it.
    """
    units: list[str] = []
    is_open = False  # the last unit is a word that goes on
    for character in piece:
        is_mark = unicodedata.category(character).startswith("M")
        if units and is_mark:
            units[-1] += character
        elif SPACELESS.match(character):
            units.append(character)
            is_open = False
        elif is_open:
            units[-1] += character
        else:
            units.append(character)
            is_open = True
    stripped = [unit.strip(string.punctuation) for unit in units]
    return [unit for unit in stripped if unit]
