"""Figures and report of the quickstart. Called by scripts/toy_world/quickstart.py.

    python scripts/toy_world/report.py RUN ask [--cores 2]   ask the test split, as it is and with streams removed or
                                                              exchanged, and the unseen combinations; retrieval
    python scripts/toy_world/report.py RUN report            write summary.json and report.md, print the table

All figures come from generated answers about decoded files; hyper-parameters were chosen on other worlds and splits.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
ASKED = {"seen": "video", "heard": "audio"}  # the stream that a kind of question is about
BARS: dict[str, float] = {  # share of right answers, or seconds of mean absolute error
    "seen.colour": 0.98, "seen.shape": 0.98, "seen.size": 0.98, "seen.number": 0.98,
    "seen.named_colour": 0.90, "seen.direction": 0.85, "seen.bounces": 0.85,
    "heard.kind": 0.97, "heard.pitch": 0.97, "heard.pulses": 0.90,
    "both.first": 0.92, "both.sync": 0.85, "both.silent": 0.85,
    "when.sound": 0.15, "when.thing": 0.25, "unanswerable": 0.97,
}  # fmt: skip
EXAMPLES = 10
STREAMS = ("audio", "video")
PARTS = 4  # of the test split: shared out over processes, so that no core waits for long


# ---- asking --------------------------------------------------------------------------------------------------------


def ask(run: Path, cores: int) -> None:
    """Evaluate the last stage, shared out over processes by clips, and keep figures and answers."""
    from avllm.evaluation.command import write_predictions
    from avllm.evaluation.environment import environment
    from avllm.evaluation.results import Result
    from avllm.log import hush_libraries

    hush_libraries()
    folder = run / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    parts = [share_out(run, "test", part, PARTS) for part in range(PARTS)]
    unseen = share_out(run, "unseen", 0, 1)
    with ProcessPoolExecutor(cores) as pool:  # forked: what is imported above is not loaded again
        asked = [pool.submit(ask_part, run, part, True) for part in parts]
        others = pool.submit(ask_part, run, unseen, False)
        found = pool.submit(retrieve, run)
        results = [job.result() for job in asked]
        merged = {
            name: Result(first.condition, [p for r in results for p in r[name].predictions], first.seed)
            for name, first in results[0].items()
        }
        every = {**{n: r.to_dict() for n, r in merged.items()}, "unseen": others.result()["as_is"].to_dict()}
        figures = {"conditions": every, "retrieval": found.result(), "environment": environment()}
    (folder / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    write_predictions(folder / "answers.jsonl", merged.values())


def share_out(run: Path, split: str, part: int, parts: int) -> Path:
    """A manifest with the questions on each `parts`-th clip of a split."""
    chosen = run / "evaluation" / f"{split}-{part}.jsonl"
    clips: dict[str, int] = {}
    with (run / "world" / f"{split}.jsonl").open(encoding="utf-8") as rows, chosen.open("w", encoding="utf-8") as out:
        for row in map(json.loads, rows):
            if clips.setdefault(row["meta"]["clip"], len(clips)) % parts != part:
                continue
            media = row["messages"][0]["content"][0]
            media[media["type"]] = f"../world/{media[media['type']]}"
            out.write(json.dumps(row) + "\n")
    return chosen


def ask_part(run: Path, manifest: Path, changed: bool) -> dict[str, Any]:
    """Ask the last stage the rows of a manifest: results by condition."""
    from avllm.evaluation.conditions import AS_IS, Condition
    from avllm.evaluation.runner import evaluate_all

    model, processor = load(run / "stage3")
    conditions = [AS_IS]
    if changed:
        conditions += [Condition(without=s) for s in STREAMS] + [Condition(swap=s) for s in STREAMS]  # type: ignore[arg-type]
    return evaluate_all(model, processor, manifest, conditions, precision="auto")  # as it was trained


@lru_cache(maxsize=1)
def load(folder: Path) -> tuple[Any, Any]:
    """A checkpoint, once in each process."""
    from avllm.models.modeling_avllm import AVLLM
    from avllm.models.processing_avllm import AVProcessor

    model = AVLLM.from_pretrained(str(folder))
    model.llm.merge_adapter()  # the same within rounding, and a third faster
    return model, AVProcessor.from_pretrained(folder)


def retrieve(run: Path) -> dict[str, Any]:
    """Text-to-clip retrieval with what stage 1 learned."""
    from avllm.evaluation.retrieval import retrieval

    return retrieval(run / "stage1", run / "world" / "captions_test.jsonl", limit=200, precision="auto")


# ---- figures -------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """A JSON file."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def main_figure(row: dict[str, Any] | None) -> float | None:
    """Accuracy, or the mean absolute error of times."""
    if row is None:
        return None
    value = row.get("accuracy", row.get("mae_s"))
    return None if value is None else round(float(value), 4)


def summarise(run: Path) -> dict[str, Any]:
    """The content of summary.json: seconds, memory, retrieval and the figures of each kind."""
    figures, journal = read(run / "evaluation" / "figures.json"), read(run / "journal.json")
    conditions, found = figures["conditions"], figures["retrieval"]
    unseen = conditions["unseen"]["kinds"]
    balance = read(run / "world" / "world.json")["balance"]
    kinds = {
        kind: {**figures_of(kind, conditions), "unseen": main_figure(unseen.get(kind)), **blind(balance.get(kind, {}))}
        for kind in conditions["as_is"]["kinds"]
    }
    seconds = {name: float(phase["seconds"]) for name, phase in journal.items() if "seconds" in phase}
    stages = read(run / "stage_seconds.json")
    seconds["training_start"] = round(seconds.pop("training") - sum(stages.values()), 1)  # loading the libraries
    seconds |= stages
    return {
        "seconds": seconds, "peak_memory_mb": journal["memory"]["peak_mb"],
        "retrieval_r1": round(float(found["r1"]), 4), "retrieval": found, "kinds": kinds,
        "environment": figures["environment"],
    }  # fmt: skip


def figures_of(kind: str, conditions: dict[str, Any]) -> dict[str, Any]:
    """One kind under all conditions; ``refused`` are shares of "unanswerable"."""
    as_is = conditions["as_is"]["kinds"][kind]
    names = ("n", "accuracy", "low", "high", "chance", "mae_s", "mae_low", "mae_high", "mae_chance", "refused")
    row = {name: as_is[name] if name == "n" else round(float(as_is[name]), 4) for name in names if name in as_is}
    for condition in ("without_audio", "without_video", "swapped_audio", "swapped_video"):
        changed = conditions[condition]["kinds"].get(kind)
        row[condition] = main_figure(changed)
        row[f"{condition}_low"], row[f"{condition}_high"] = (
            None if changed is None else changed.get(end, changed.get(f"mae_{end}")) for end in ("low", "high")
        )
        row[f"{condition}_refused"] = None if changed is None else round(float(changed["refused"]), 4)
    return row


def blind(balance: dict[str, Any]) -> dict[str, Any]:
    """What the best guesser without any media reaches on the test split, as the world's own check found."""
    return {"blind": balance.get("blind_mae_s", balance.get("blind", {}).get("accuracy"))}


def holds(kind: str, row: dict[str, Any]) -> bool | None:
    """Whether the bar on the test split is reached; None where there is none."""
    if kind not in BARS:
        return None
    return row["mae_s"] <= BARS[kind] if "mae_s" in row else row["accuracy"] >= BARS[kind]


CHANGES = {
    "without_audio": "no audio", "without_video": "no video",
    "swapped_audio": "audio swapped", "swapped_video": "video swapped", "unseen": "unseen",
}  # fmt: skip


def percent(value: float | None) -> str:
    """A share for people."""
    return "" if value is None else f"{100 * value:.1f}"


def seconds(value: float | None) -> str:
    """A time for people."""
    return "" if value is None else f"{value:.2f} s"


def table(summary: dict[str, Any]) -> Table:
    """The figures for the terminal."""
    made = Table(title="Test split, generated answers", title_justify="left", header_style="bold")
    for column in ("", "n", "figure", "95%", "bar", "", "chance", "blind", *CHANGES.values()):
        made.add_column(column, justify="right" if column else "left")
    for kind, row in summary["kinds"].items():
        timed = "mae_s" in row
        show, figure, ends = (seconds, "mae_s", "mae_") if timed else (percent, "accuracy", "")
        mark = {True: "[green]yes", False: "[red]no", None: ""}[holds(kind, row)]
        bar = ("<= " if timed else ">= ") + show(BARS[kind]) if kind in BARS else ""
        between = f"{show(row[ends + 'low'])}-{show(row[ends + 'high'])}"
        rest = [row.get("mae_chance" if timed else "chance"), row["blind"], *(row[name] for name in CHANGES)]
        made.add_row(kind, str(row["n"]), show(row[figure]), between, bar, mark, *map(show, rest))
    return made


def bars(summary: dict[str, Any]) -> list[tuple[bool, str]]:
    """The bars that are no single cell of the table: whether each is reached, and in words."""
    kinds = summary["kinds"]
    answerable = {k: r for k, r in kinds.items() if k != "unanswerable"}
    refused = sum(r["refused"] * r["n"] for r in answerable.values()) / sum(r["n"] for r in answerable.values())
    found = [(refused <= 0.01, f"answerable questions refused: {refused:.2%} (bar: <= 1%)")]
    for kind, row in answerable.items():
        stream = ASKED.get(kind.split(".")[0])
        if stream is not None:
            swapped, without, chance = row[f"swapped_{stream}"], row[f"without_{stream}_refused"], row["chance"]
            text = f"{kind}, {stream} swapped: {percent(swapped)} (chance {percent(chance)}, bar: within 5 points)"
            text += f"; removed: {percent(without)} refused (bar: >= 95)"
            found.append((abs(swapped - chance) <= 0.05 and without >= 0.95, text))
    found += [needs_both(kind, kinds[kind]) for kind in ("both.sync", "both.silent") if kind in kinds]
    lost = {k: r["accuracy"] - r["unseen"] for k, r in kinds.items() if "accuracy" in r and r["unseen"] is not None}
    if lost:
        most = ", ".join(f"{k} {percent(lost[k])}" for k in sorted(lost, key=lost.__getitem__)[:-4:-1])
        text = f"never-seen combinations, points below the test figure: {most} (bar: <= 8 in every kind)"
        found.append((max(lost.values()) <= 0.08, text))
    r1, spent = summary["retrieval"], sum(v for k, v in summary["seconds"].items() if k != "install")
    found.append((r1["r1"] >= 0.6, f"text-to-clip retrieval, R@1 among {r1['n']}: {percent(r1['r1'])} (bar: >= 60)"))
    found.append((spent <= 600, f"{spent:.0f} s after the installation (bar: <= 600)"))
    memory = summary["peak_memory_mb"]
    return [*found, (memory <= 6144, f"{memory} MB of memory (bar: <= 6144)")]


def remarks(summary: dict[str, Any]) -> list[str]:
    """What the columns are, the bars outside of the table, and which are missed."""
    others = bars(summary)
    missed = [kind for kind, row in summary["kinds"].items() if holds(kind, row) is False]
    missed += [text for reached, text in others if not reached]
    return [
        "bar: what it should reach; chance: guessing among the answers; blind: the best guess without the clip; "
        "swapped: with that stream of another clip; unseen: combinations that training never showed",
        *(f"{'yes' if reached else 'no '}  {text}" for reached, text in others),
        f"bars that are missed: {'; '.join(missed) or 'none'}",
    ]


def needs_both(kind: str, row: dict[str, Any]) -> tuple[bool, str]:
    """How far a kind that needs both streams lies above the better of the two exchanges."""
    best = max(("swapped_audio", "swapped_video"), key=lambda c: row[c])
    gain, apart = row["accuracy"] - row[best], row["low"] > row[f"{best}_high"]
    above = f"{kind}: {percent(gain)} points above {CHANGES[best]} (bar: >= 20)"
    return gain >= 0.2 and apart, f"{above}, intervals {'apart' if apart else 'overlap'}"


# ---- report --------------------------------------------------------------------------------------------------------


def examples(run: Path) -> list[dict[str, Any]]:
    """Ten answers on the test split, each of another kind and clip, with their samples."""
    with (run / "world" / "test.jsonl").open(encoding="utf-8") as file:
        samples = {row["id"]: row for row in map(json.loads, file)}
    with (run / "evaluation" / "answers.jsonl").open(encoding="utf-8") as file:
        answers = [row for row in map(json.loads, file) if row["condition"] == "as_is"]
    chosen: list[dict[str, Any]] = []
    used: set[str] = set()
    for row in answers:
        meta = samples[row["id"]]["meta"]
        if len(chosen) < EXAMPLES and meta["form"] == "av" and not used & {row["kind"], meta["clip"]}:
            used |= {row["kind"], meta["clip"]}
            chosen.append({**row, "sample": samples[row["id"]]})
    return chosen


def draw(run: Path, example: dict[str, Any], picture: Path) -> None:
    """Frames in a row above the waveform of one clip."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from avllm.data.media.load import Sampling, load_video

    path = run / "world" / example["sample"]["messages"][0]["content"][0]["video"]
    clip = load_video(path, sampling=Sampling(num_frames=10), rate=16_000)
    assert clip.frames is not None
    assert clip.sound is not None
    figure = Figure(figsize=(10, 2.4), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, height_ratios=[1, 0.8])
    above.imshow(np.concatenate(list(clip.frames.x.numpy()), axis=1))
    above.set_axis_off()
    x = clip.sound.x.numpy()
    below.plot(np.arange(len(x)) / clip.sound.rate + clip.sound.start, x, linewidth=0.4)
    below.set(xlim=(0, clip.duration), ylim=(-1, 1), yticks=[], xlabel="seconds")
    figure.savefig(picture, dpi=80)


def write_report(run: Path, summary: dict[str, Any]) -> None:
    """report.md with the figures, the loss curves and ten example clips as pictures."""
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    console = Console(width=170, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    console.print(table(summary))
    lines = ["# Quickstart", "", "```", console.export_text().rstrip(), *remarks(summary), "```", ""]
    lines += ["| phase | seconds |", "|---|---|", *(f"| {k} | {v:.0f} |" for k, v in summary["seconds"].items()), ""]
    lines += [
        "## Loss curves",
        "",
        *(f"![{s}]({s}/loss.png)" for s in ("stage1", "stage2", "stage3")),
        "",
        "## Ten clips",
    ]
    for number, example in enumerate(examples(run)):
        draw(run, example, folder / f"{number}.png")
        question = example["sample"]["messages"][0]["content"][-1]["text"]
        said = f"**{question}** answer: *{example['answer']}*, truth: *{example['truth']}*"
        lines += ["", f"![clip](report/{number}.png)", "", said]
    (run / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def finish(run: Path) -> None:
    """Write summary.json and report.md, print the table and how to go on."""
    summary = summarise(run)
    (run / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    write_report(run, summary)
    console = Console(width=170)
    console.print(table(summary))
    for line in remarks(summary):
        console.print(line, highlight=False)
    chat = [sys.executable, str(ROOT / "serve" / "chat_demo.py"), str((run / "stage3").resolve())]
    console.print(f"\nreport: {(run / 'report.md').resolve()}\nchat:   {shlex.join(chat)}", soft_wrap=True)


def main() -> None:
    """One of the three jobs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("job", choices=("ask", "report"))
    parser.add_argument("--cores", type=int, default=1, help="processes that answer")
    args = parser.parse_args()
    if args.job == "ask":
        ask(args.run, args.cores)
    else:
        finish(args.run)


if __name__ == "__main__":
    main()
