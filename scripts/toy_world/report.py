"""Write summary.json and report.md of a quickstart, and print the table.

python scripts/toy_world/report.py RUN
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
from figures import remarks, summarise, table, turn_table
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = 10
WIDTH = 170  # of the table, in characters


def examples(run: Path) -> list[dict[str, Any]]:
    """Return ten answers on the test split, each of another kind and clip, with their samples."""
    with (run / "world" / "test.jsonl").open(encoding="utf-8") as file:
        samples = {row["id"]: row for row in map(json.loads, file)}
    with (run / "evaluation" / "answers.jsonl").open(encoding="utf-8") as file:
        answers = [row for row in map(json.loads, file) if row["condition"] == "as_is"]
    chosen: list[dict[str, Any]] = []
    used: set[str] = set()
    for row in answers:
        meta = samples[row["id"]]["meta"]
        is_new = not used & {row["kind"], meta["clip"]}
        if len(chosen) < EXAMPLES and meta["form"] == "av" and is_new:
            used |= {row["kind"], meta["clip"]}
            chosen.append({**row, "sample": samples[row["id"]]})
    return chosen


def draw(run: Path, example: dict[str, Any], picture: Path) -> None:
    """Return frames in a row above the waveform of one clip."""
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
    """Write report.md with the figures, the loss curves and ten example clips as pictures."""
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    phases = [f"| {name} | {spent:.0f} |" for name, spent in summary["seconds"].items()]
    curves = [f"![{stage}]({stage}/loss.png)" for stage in ("stage1", "stage2", "stage3")]
    tables = [table_text(table(summary)), "", table_text(turn_table(summary))]
    lines = ["# Quickstart", "", "```", *tables, *remarks(summary), "```", ""]
    lines += ["| phase | seconds |", "|---|---|", *phases, ""]
    lines += ["## Loss curves", "", *curves, "", "## Ten clips"]
    for number, example in enumerate(examples(run)):
        draw(run, example, folder / f"{number}.png")
        question = example["sample"]["messages"][0]["content"][-1]["text"]
        answers = f"answer: *{example['answer']}*, truth: *{example['truth']}*"
        lines += ["", f"![clip](report/{number}.png)", "", f"**{question}** {answers}"]
    (run / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def table_text(figures: Table) -> str:
    """Return a table as text."""
    with Path("/dev/null").open("w", encoding="utf-8") as nowhere:
        console = Console(width=WIDTH, record=True, file=nowhere)
        console.print(figures)
        return console.export_text().rstrip()


def finish(run: Path) -> None:
    """Write summary.json and report.md, print the table and how to go on."""
    summary = summarise(run)
    (run / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    write_report(run, summary)
    console = Console(width=WIDTH)
    console.print(table(summary))
    console.print(turn_table(summary))
    for line in remarks(summary):
        console.print(line, highlight=False)
    chat = [sys.executable, str(ROOT / "serve" / "chat_demo.py"), str((run / "stage3").resolve())]
    console.print(f"\nreport: {(run / 'report.md').resolve()}", soft_wrap=True)
    console.print(f"chat:   {shlex.join(chat)}", soft_wrap=True)


def main() -> None:
    """Report on the run that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    finish(parser.parse_args().run)


if __name__ == "__main__":
    main()
