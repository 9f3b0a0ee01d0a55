"""A histogram as inline SVG, for pages that load nothing."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np

BINS = 30
WIDTH, HEIGHT = 460, 120  # of the bars
LEFT, TOP, BOTTOM = 18, 16, 18  # around them
FAR = 5.0  # a range so much wider than that of 99 of 100 values is cut there: one odd file would hide all others


def histogram(name: str, unit: str, values: Sequence[float]) -> str:
    """Bars, an axis with round numbers, the median as a dashed line."""
    x = np.asarray(values, np.float64)
    edges = bin_edges(x)
    counts = np.histogram(np.minimum(x, edges[-1]), edges)[0]
    beyond = int((x > edges[-1]).sum())
    median = float(np.median(x))
    caption = f"{name} ({unit}): {len(x):,} values from {x.min():.4g} to {x.max():.4g}, median {median:.4g}"
    if beyond:
        caption += f"; the last bar holds all from {edges[-2]:.4g} on"
    marks = "".join([*_bars(counts, edges), *_axis(edges), _line(median, edges, int(counts.max()))])
    return (
        f'<figure><svg viewBox="0 0 {WIDTH + 2 * LEFT} {HEIGHT + TOP + BOTTOM}" role=img>{marks}</svg>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def bin_edges(x: np.ndarray) -> np.ndarray:
    """Edges of equal bins over all values but a few that lie far above; whole numbers get a bin each where they fit."""
    low, high = float(x.min()), float(x.max())
    usual = float(np.percentile(x, 99))
    if usual > low and high - low > FAR * (usual - low):
        high = usual
    if np.array_equal(x, np.floor(x)) and high - low < BINS:
        return np.arange(low, math.ceil(high) + 2) - 0.5
    return np.linspace(low, high if high > low else low + 1.0, BINS + 1)


def _place(value: float, edges: np.ndarray) -> float:
    share = (value - edges[0]) / (edges[-1] - edges[0])
    return LEFT + WIDTH * min(1.0, max(0.0, float(share)))


def _bars(counts: np.ndarray, edges: np.ndarray) -> list[str]:
    most, gap = max(1, int(counts.max())), 1.0
    found = []
    for count, low, high in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        height = max(1.0, HEIGHT * count / most) if count else 0.0  # what is there is seen
        left, right = _place(low, edges), _place(high, edges)
        found.append(
            f'<rect x="{left:.1f}" y="{TOP + HEIGHT - height:.1f}" width="{right - left - gap:.1f}" '
            f'height="{height:.1f}" fill="var(--bar)"><title>{low:.4g} to {high:.4g}: {count:,}</title></rect>'
        )
    return found


def _axis(edges: np.ndarray) -> list[str]:
    y = TOP + HEIGHT
    line = f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y}" y2="{y}" stroke="var(--soft)"/>'
    whole = edges[0] % 1 == 0.5 and edges[1] - edges[0] == 1  # a bin for each number: none stands at their borders
    texts = [
        f'<text x="{_place(value, edges):.1f}" y="{y + 14}" text-anchor="middle">{value:,.6g}</text>'
        for value in ticks(float(edges[0]), float(edges[-1]))
        if not whole or value.is_integer()
    ]
    return [line, *texts]


def ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers (1, 2 or 5 times a power of ten apart) between two numbers."""
    power = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(m * power for m in (5, 2, 1) if m * power <= (high - low) / 3)
    return [round(k * step, 10) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _line(median: float, edges: np.ndarray, most: int) -> str:
    x = _place(median, edges)
    anchor = "end" if x > WIDTH * 0.7 else "start"
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 4}" y2="{TOP + HEIGHT}" stroke="var(--soft)" '
        f'stroke-dasharray="3 3"/><text x="{x + (-4 if anchor == "end" else 4):.1f}" y="{TOP - 5}" '
        f'text-anchor="{anchor}">median {median:.4g}, highest bar {most:,}</text>'
    )
