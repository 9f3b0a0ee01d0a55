"""Draw a histogram as inline SVG, for pages that load nothing."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

BINS = 30
WIDTH = 460  # of all bars, in units of the SVG
HEIGHT = 120
LEFT = 18  # margins around the bars
TOP = 16
BOTTOM = 18
# A range this many times that of 99 % of the values is cut, so that one odd file hides no others.
FAR = 5.0


def histogram(name: str, unit: str, values: Sequence[float]) -> str:
    """Return bars, an axis with round numbers, and the median as a dashed line."""
    x = np.asarray(values, np.float64)
    edges = bin_edges(x)
    counts = np.histogram(np.minimum(x, edges[-1]), edges)[0]
    beyond = int((x > edges[-1]).sum())
    median = float(np.median(x))
    extent = f"{len(x):,} values from {x.min():.4g} to {x.max():.4g}"
    caption = f"{name} ({unit}): {extent}, median {median:.4g}"
    if beyond:
        caption += f"; the last bar holds all from {edges[-2]:.4g} on"
    marks = [*_bars(counts, edges), *_axis(edges), _median_line(median, edges, int(counts.max()))]
    box = f"0 0 {WIDTH + 2 * LEFT} {HEIGHT + TOP + BOTTOM}"
    return (
        f'<figure><svg viewBox="{box}" role=img>{"".join(marks)}</svg>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def bin_edges(x: np.ndarray) -> np.ndarray:
    """Return the edges of equal bins over all values but a few that lie far above.

    Whole numbers get a bin each when ``BINS`` are enough.
    """
    low = float(x.min())
    high = float(x.max())
    usual = float(np.percentile(x, 99))
    if usual > low and high - low > FAR * (usual - low):
        high = usual
    if np.array_equal(x, np.floor(x)) and high - low < BINS:
        return np.arange(low, math.ceil(high) + 2) - 0.5
    if high == low:
        high = low + 1.0
    return np.linspace(low, high, BINS + 1)


def _x_of(value: float, edges: np.ndarray) -> float:
    """Return the horizontal position of a value in the SVG."""
    share = (value - edges[0]) / (edges[-1] - edges[0])
    return LEFT + WIDTH * min(1.0, max(0.0, float(share)))


def _bars(counts: np.ndarray, edges: np.ndarray) -> list[str]:
    most = max(1, int(counts.max()))
    gap = 1.0
    bars = []
    for count, (low, high) in zip(counts.tolist(), pairwise(edges.tolist()), strict=True):
        height = max(1.0, HEIGHT * count / most) if count else 0.0  # a small count is visible too
        left = _x_of(low, edges)
        width = _x_of(high, edges) - left - gap
        title = f"<title>{low:.4g} to {high:.4g}: {count:,}</title>"
        bars.append(
            f'<rect x="{left:.1f}" y="{TOP + HEIGHT - height:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}" fill="var(--bar)">{title}</rect>'
        )
    return bars


def _axis(edges: np.ndarray) -> list[str]:
    y = TOP + HEIGHT
    line = f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y}" y2="{y}" stroke="var(--soft)"/>'
    # With a bin for each whole number, the edges lie halfway between numbers and get no text.
    whole = edges[0] % 1 == 0.5 and edges[1] - edges[0] == 1
    marks = [line]
    for value in ticks(float(edges[0]), float(edges[-1])):
        if not whole or value.is_integer():
            x = _x_of(value, edges)
            text = f"{value:,.6g}"
            marks.append(f'<text x="{x:.1f}" y="{y + 14}" text-anchor="middle">{text}</text>')
    return marks


def ticks(low: float, high: float) -> list[float]:
    """Return three to eight round numbers between two numbers.

    They are 1, 2 or 5 times a power of ten apart.
    """
    widest = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(widest))
    step = next(factor * power for factor in (5, 2, 1) if factor * power <= widest)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(k * step, 10) for k in range(first, last + 1)]


def _median_line(median: float, edges: np.ndarray, most: int) -> str:
    x = _x_of(median, edges)
    anchor = "end" if x > WIDTH * 0.7 else "start"  # the text stays inside the SVG
    text_x = x - 4 if anchor == "end" else x + 4
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 4}" y2="{TOP + HEIGHT}" '
        'stroke="var(--soft)" stroke-dasharray="3 3"/>'
        f'<text x="{text_x:.1f}" y="{TOP - 5}" text-anchor="{anchor}">'
        f"median {median:.4g}, highest bar {most:,}</text>"
    )
