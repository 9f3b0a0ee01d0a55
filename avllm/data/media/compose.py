"""Cut, level and join sounds: one after the other, or one over the other."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

PEAK = 0.98
"""Largest sample of a joined sound, full scale 1."""
GATE_SECONDS = 0.01
"""Length of the pieces in which silence is looked for."""


@dataclass(frozen=True)
class ComposedSound:
    """A sound of two events.

    Attributes:
        tag: ``ab``, ``ba`` or ``on``.
        x: float32 ``(S,)``.
        order: which of the two clips is heard first; of an overlay, which one is in front.
        spans: seconds (start, end) of the first and the second of ``order``.
        snr: of an overlay, decibels of the front over the other.
    """

    tag: str
    x: np.ndarray
    order: tuple[int, ...]
    spans: list[tuple[float, float]]
    snr: float | None = None


def audible(x: np.ndarray, rate: int, decibels: float) -> np.ndarray:
    """Return a sound without its silent beginning and end.

    Silence is ``decibels`` below the loudest piece of 10 ms.
    """
    size = max(1, round(GATE_SECONDS * rate))
    whole = len(x) // size * size
    power = np.square(x[:whole].reshape(-1, size)).mean(1)  # (pieces,)
    if not whole or power.max() <= 0:
        return x[:0]
    loud = np.flatnonzero(power >= power.max() * 10 ** (decibels / 10))
    return x[loud[0] * size : (loud[-1] + 1) * size]


def level(x: np.ndarray, rms: float) -> np.ndarray:
    """Return a sound scaled to a root mean square."""
    return (x * (rms / math.sqrt(float(np.square(x, dtype=np.float64).mean())))).astype(np.float32)


def below_peak(x: np.ndarray) -> np.ndarray:
    """Return a sound, softer as a whole where it would clip: its parts keep their ratio."""
    return x * min(1.0, PEAK / max(1e-9, float(np.abs(x).max())))


def in_a_row(
    events: list[np.ndarray], order: tuple[int, ...], gap: int, rate: int, tag: str
) -> ComposedSound:
    """Join two sounds with silence between them.

    The silence has ``gap`` samples, and so many more that the second sound begins on a tenth of a
    second.
    """
    first, second = events
    start = math.ceil((len(first) + gap) * 10 / rate) * rate // 10
    x = np.concatenate([first, np.zeros(start - len(first), np.float32), second])
    return ComposedSound(
        tag, below_peak(x), order, [(0.0, len(first) / rate), (start / rate, len(x) / rate)]
    )


def overlaid(events: list[np.ndarray], snr: float, place: float, rate: int) -> ComposedSound:
    """Add the shorter sound somewhere to the longer one, ``snr`` decibels louder.

    The loudness of each is measured over its own length.
    """
    front, back = sorted((0, 1), key=lambda i: (len(events[i]), i))
    voice = events[front]
    ground = events[back]
    start = round(place * (len(ground) - len(voice)))
    x = ground.copy()
    x[start : start + len(voice)] += voice * 10 ** (snr / 20)
    spans = [(start / rate, (start + len(voice)) / rate), (0.0, len(ground) / rate)]
    return ComposedSound("on", below_peak(x), (front, back), spans, snr)
