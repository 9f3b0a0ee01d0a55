"""Put the results of many runs side by side: a table for people, one for programs, a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Z = 1.96


def write(results: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write compare.json, compare.md and compare.png of all results so far."""
    systems = summarize(results)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(systems, indent=1), encoding="utf-8")
    (folder / "compare.md").write_text(markdown(systems), encoding="utf-8")
    draw(systems, folder / "compare.png")


def summarize(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the figures of each system over its seeds.

    Returns:
        by system: `seeds`, `kinds` (by kind: mean, low, high, chance, and with streams exchanged),
        and the means of tokens, parameters, seconds and memory.
    """
    by_system: dict[str, list[dict[str, Any]]] = {}
    for result in sorted(results, key=lambda r: (r["system"], r["seed"])):
        by_system.setdefault(result["system"], []).append(result)
    summary: dict[str, dict[str, Any]] = {}
    for system, runs in by_system.items():
        kinds: dict[str, dict[str, float]] = {}
        for kind in sorted(runs[0]["figures"]["as_is"]["kinds"]):
            found = of_kind(runs, kind)
            if found is not None:
                kinds[kind] = found
        summary[system] = {
            "seeds": [run["seed"] for run in runs],
            "kinds": kinds,
            "media_tokens": mean([run["media_tokens"] for run in runs]),
            "trained_parameters": runs[0]["trained_parameters"],
            "step_seconds": mean([run["step_seconds"].get("instruct", 0.0) for run in runs]),
            "seconds": mean([sum(run["seconds"].values()) for run in runs]),
            "memory_mb": mean([run["memory_mb"] for run in runs]),
        }
    return summary


def of_kind(runs: Sequence[dict[str, Any]], kind: str) -> dict[str, float] | None:
    """Return accuracy over seeds of one kind of question, with its interval; None if not judged.

    The interval adds the spread between seeds to that of the questions: each seed's right answers
    are a share of the same questions, so that the larger of the two standard errors is taken.
    """
    shares: list[float] = []
    chances: list[float] = []
    asked = 0
    swapped: dict[str, list[float]] = {}
    for run in runs:
        figures = run["figures"]["as_is"]["kinds"][kind]
        if "accuracy" not in figures:
            return None
        shares.append(figures["accuracy"])
        chances.append(figures["chance"])
        asked = figures["n_judged"]
        for name, condition in run["figures"].items():
            if name != "as_is" and kind in condition["kinds"]:
                swapped.setdefault(name, []).append(condition["kinds"][kind].get("accuracy", 0.0))
    share = mean(shares)
    low, high = wilson(share, asked)
    if len(shares) > 1:
        error = Z * deviation(shares) / math.sqrt(len(shares))
        low, high = min(low, share - error), max(high, share + error)
    found = {"mean": share, "low": max(0.0, low), "high": min(1.0, high), "chance": mean(chances)}
    found["n"] = asked
    found |= {name: mean(values) for name, values in swapped.items()}
    return found


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the Wilson interval of a share of n questions (Wilson 1927)."""
    if not n:
        return 0.0, 1.0
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return middle - half, middle + half


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return sum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """Return the sample's standard deviation."""
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1))


def markdown(systems: dict[str, dict[str, Any]]) -> str:
    """Return the table as Markdown: a row a system, a column a kind of question."""
    kinds = sorted({kind for found in systems.values() for kind in found["kinds"]})
    head = ["system", "seeds", "tokens a clip", "trained", "step (s)", "run (s)", "MB", *kinds]
    lines = [_line(head), _line(["---"] * len(head))]
    for system, found in systems.items():
        cells = [
            system,
            str(len(found["seeds"])),
            f"{found['media_tokens']:.0f}",
            f"{found['trained_parameters'] / 1e6:.2f} M",
            f"{found['step_seconds']:.2f}",
            f"{found['seconds']:.0f}",
            f"{found['memory_mb']:.0f}",
        ]
        cells += [_cell(found["kinds"].get(kind)) for kind in kinds]
        lines.append(_line(cells))
    chance = ["chance", "", "", "", "", "", ""]
    for kind in kinds:
        chances = [f["kinds"][kind]["chance"] for f in systems.values() if kind in f["kinds"]]
        chance.append(f"{100 * mean(chances):.0f}")
    lines.append(_line(chance))
    about = (
        "Accuracy in per cent with its 95 % interval, over seeds and questions; "
        "* = above chance, intervals apart.\n"
    )
    return about + "\n" + "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    star = "*" if found["low"] > found["chance"] else ""
    interval = f"{100 * found['low']:.0f}-{100 * found['high']:.0f}"
    return f"{100 * found['mean']:.0f}{star} ({interval})"


def draw(systems: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw a panel a kind of question: each system's accuracy, its interval, and chance."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = sorted({kind for found in systems.values() for kind in found["kinds"]})
    if not kinds:
        return
    columns = 4
    rows = math.ceil(len(kinds) / columns)
    height = 0.6 + 0.22 * len(systems)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.6 * columns, rows * height + 0.5), squeeze=False, sharey=True
    )
    names = list(systems)[::-1]
    for number, axis in enumerate(axes.flat):
        if number >= len(kinds):
            axis.axis("off")
            continue
        kind = kinds[number]
        for place, name in enumerate(names):
            found = systems[name]["kinds"].get(kind)
            if found is None:
                continue
            share = 100 * found["mean"]
            below, above = share - 100 * found["low"], 100 * found["high"] - share
            colour = "tab:blue" if found["low"] > found["chance"] else "tab:gray"
            axis.errorbar(
                share, place, xerr=[[max(0, below)], [max(0, above)]], fmt="o", color=colour, ms=4
            )
            axis.axvline(100 * found["chance"], color="tab:red", linewidth=0.7, linestyle=":")
        axis.set_title(kind, fontsize=9)
        axis.set_xlim(0, 101)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
        axis.grid(axis="y", linewidth=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
