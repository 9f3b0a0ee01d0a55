"""Train and test on every fold of ESC-10.

    python scripts/esc10/folds.py SOURCE --out runs/esc10 [--folds 1 2 3 4] [--seed 0] [--json]

Nothing is pretrained: the language model is made from the text of the training manifests, the audio
encoder from random weights. What counts is the generated answer to "What do you hear?". Settings
are to be chosen on clips held out of the training folds (`--on validation --validation 0.25`),
never on the fold left out.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from avllm.evaluation.environment import environment
from avllm.evaluation.runner import evaluate
from avllm.evaluation.scoring.metrics import wilson
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor

ROOT = Path(__file__).resolve().parents[2]
STAGES = {"stage1": "align", "stage2": "caption", "stage3": "instruct"}
PHASES = ("data", "llm", *STAGES, "answers")


@dataclass
class Fold:
    """One fold left out: its folder, and the progress bar that its phases move."""

    number: int
    folder: Path
    args: argparse.Namespace
    bar: tqdm

    def run(self) -> dict[str, Any]:
        """Manifests, language model, three stages, answers; returns the fold's figures."""
        seconds = {}
        work = {
            "data": self.make_data,
            "llm": self.make_llm,
            **dict.fromkeys(STAGES),
            "answers": self.answer,
        }
        figures: dict[str, Any] = {}
        for phase in PHASES:
            self.bar.set_postfix_str(f"fold {self.number}: {phase}")
            began = time.perf_counter()
            step = work[phase]
            figures = (step() if step else self.train(phase)) or figures
            seconds[phase] = round(time.perf_counter() - began, 1)
            self.bar.update()
        return {"fold": self.number, "seed": self.args.seed, **figures, "seconds": seconds}

    def make_data(self) -> None:
        """Manifests of this fold."""
        output = ["--output", self.folder / "data"]
        options = [
            "--test-fold",
            self.number,
            "--validation",
            self.args.validation,
            "--seed",
            self.args.seed,
        ]
        self.python(
            "data_recipes/esc50.py", self.args.source.resolve(), *output, "--esc10", *options
        )

    def make_llm(self) -> None:
        """Return the language model, from the training manifests' text alone."""
        texts = [
            "--captions",
            self.manifest("captions_train"),
            "--questions",
            self.manifest("train"),
        ]
        self.python(
            "scripts/esc10/small_llm.py", self.folder / "llm", *texts, "--seed", self.args.seed
        )

    def train(self, stage: str) -> None:
        """Return one stage of the preset, on this fold's manifests."""
        name = f"{stage}_{STAGES[stage]}"
        before = {
            "stage1": f"model.llm.name={self.folder / 'llm'}",
            "stage2": self.init(1),
            "stage3": self.init(2),
        }
        manifest = self.manifest("captions_train" if stage == "stage2" else "train")
        own = [
            f"output={self.folder / stage}",
            before[stage],
            f"data.train={manifest}",
            f"seed={self.args.seed}",
        ]
        self.python(
            f"train/{name}.py", f"train/presets/esc10/{name}.yaml", *own, *getattr(self.args, stage)
        )

    def init(self, stage: int) -> str:
        """Return the override that names the stage before."""
        return f"init={self.folder / f'stage{stage}'}"

    def manifest(self, name: str) -> Path:
        """Return a manifest of this fold."""
        return self.folder / "data" / f"{name}.jsonl"

    def answer(self) -> dict[str, Any]:
        """Ask about each clip left out, greedily, and count the answers that name its class."""
        folder = str(self.folder / "stage3")
        model = AVLLM.from_pretrained(folder).eval()
        processor = AVProcessor.from_pretrained(folder)
        result = evaluate(model, processor, self.manifest(self.args.on), max_skip_rate=0.0)
        rows = [prediction.to_dict("as is") for prediction in result.predictions]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (self.folder / f"answers_{self.args.on}.jsonl").write_text(lines, encoding="utf-8")
        hits = sum(bool(row["correct"]) for row in rows)
        return {"n": len(rows), "hits": hits, "accuracy": hits / len(rows)}

    def python(self, script: str, *arguments: object) -> None:
        """Run one of the project's scripts on one thread; its output goes to the fold's log."""
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        log = self.folder / "log.txt"
        with log.open("a", encoding="utf-8") as out:
            out.write("$ " + " ".join(command) + "\n")
            out.flush()
            environ = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                command, cwd=ROOT, env=environ, stdout=out, stderr=subprocess.STDOUT
            )
        if done.returncode:
            last = "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-8:])
            raise SystemExit(
                f"fold {self.number}: {script} ended with {done.returncode}; see {log}\n{last}"
            )


def run_folds(args: argparse.Namespace) -> dict[str, Any]:
    """Run all folds, some at a time, and return the summary over them."""
    began = time.perf_counter()
    folders = {number: args.out.resolve() / f"fold{number}" for number in args.folds}
    for folder in folders.values():
        if folder.exists():
            raise SystemExit(
                f"{folder} is there already; "
                "choose another --out, or delete it to train that fold again"
            )
        folder.mkdir(parents=True)
    with tqdm(total=len(PHASES) * len(folders), desc="phases", disable=None) as bar:
        tqdm.set_lock(threading.RLock())
        with ThreadPoolExecutor(args.parallel) as pool:
            work = [Fold(number, folder, args, bar) for number, folder in folders.items()]
            folds = list(pool.map(Fold.run, work))
    hits = sum(fold["hits"] for fold in folds)
    n = sum(fold["n"] for fold in folds)
    interval = wilson(hits, n)
    return {
        "on": args.on,
        "seed": args.seed,
        "folds": folds,
        "mean_accuracy": sum(f["accuracy"] for f in folds) / len(folds),
        "n": n,
        "low": interval.low,
        "high": interval.high,
        "chance": 0.1,
        "seconds": round(time.perf_counter() - began, 1),
        "environment": environment(),
    }


def table(summary: dict[str, Any]) -> Table:
    """Return the folds' accuracies for people."""
    clips = "fold left out" if summary["on"] == "test" else "validation clips"
    figures = Table(title=f"generated answers on the {clips}")
    for name in ("fold", "seed", "clips", "right", "accuracy", "seconds"):
        figures.add_column(name, justify="right")
    for fold in summary["folds"]:
        took = sum(fold["seconds"].values())
        cells = (
            fold["fold"],
            fold["seed"],
            fold["n"],
            fold["hits"],
            f"{fold['accuracy']:.1%}",
            f"{took:.0f}",
        )
        figures.add_row(*map(str, cells))
    interval = f"{summary['mean_accuracy']:.1%} ({summary['low']:.1%}-{summary['high']:.1%})"
    figures.add_row(
        "mean", str(summary["seed"]), str(summary["n"]), "", interval, f"{summary['seconds']:.0f}"
    )
    return figures


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", type=Path, help="the folder of ESC-10 or ESC-50, see data_recipes/esc50.py")
    add(
        "--out",
        type=Path,
        default=Path("runs/esc10"),
        help="gets a folder a fold (default runs/esc10)",
    )
    add(
        "--folds",
        type=int,
        nargs="+",
        default=[1, 2, 3, 4],
        help="the folds to leave out, one at a time",
    )
    add("--seed", type=int, default=0, help="of everything, the same for all folds (default 0)")
    add(
        "--parallel",
        type=int,
        default=2,
        help="folds trained at a time, one thread each (default 2)",
    )
    add(
        "--on",
        choices=("test", "validation"),
        default="test",
        help="what is asked about (default: the fold left out)",
    )
    add(
        "--validation",
        type=float,
        default=0.0,
        help="share of the training folds' clips held out (default 0)",
    )
    for stage in STAGES:
        add(
            f"--{stage}",
            nargs="*",
            default=[],
            metavar="key=value",
            help=f"settings of {stage} to change",
        )
    add("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args(argv)
    if args.on == "validation" and not args.validation:
        parser.error(
            "--on validation needs --validation SHARE, the clips held out of the training folds"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    """Train and ask; print the table, write OUT/summary.json."""
    args = parse(argv)
    torch.set_num_threads(1)
    summary = run_folds(args)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    Console(stderr=args.json).print(table(summary))
    if args.json:
        print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
