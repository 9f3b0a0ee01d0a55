"""Make the toy world: small real files (mp4, wav, jpg), questions, captions, ground truth.

    python scripts/toy_world/make.py OUT --clips 3000 --seed 0 --workers 2

Made on the spot from a seed, so there is nothing to download. The bytes depend on the seed and the
number of clips alone. At the end it measures what can be guessed without looking or listening,
prints it, and fails above the limits.
"""

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from balance import balance_report, balance_table, over_limits
from chat_balance import add_later_turns
from chats import count_turns, held_out_chats, training_chats
from questions import caption_rows, question_rows
from rendering import render_clip
from rich.console import Console
from scripting import SPLITS, script_split, split_sizes
from tqdm import tqdm

VERSION = 6  # raise it when the same settings give another world
CHATS = ("train", "test")  # splits that have conversations, too
UNFINISHED = "unfinished.json"


def settings_of(args: argparse.Namespace) -> dict:
    """Return all that the bytes of the world depend on."""
    return {"recipe": "toy_world", "version": VERSION, "clips": args.clips, "seed": args.seed}


def read_json(path: Path) -> dict | None:
    """Return the file's content, None when there is no file."""
    return json.loads(path.read_text()) if path.exists() else None


def read_jsonl(path: Path) -> list[dict]:
    """Return the JSON objects of a file, one a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write one JSON object a line."""
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    )


def prepare(out: Path, settings: dict, remake: bool) -> bool:
    """Make `out` ready for these settings; True when the finished world is there already."""
    world = read_json(out / "world.json") or read_json(out / UNFINISHED)
    if world is not None and world["settings"] != settings and not remake:
        raise SystemExit(
            f"{out} holds a world of other settings: {world['settings']}, asked for {settings}. "
            "Choose another folder, or add --remake to replace it."
        )
    if world is None and out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty and holds no toy world. Choose another folder.")
    if remake and world is not None:
        shutil.rmtree(out / "clips", ignore_errors=True)
        (out / "world.json").unlink(missing_ok=True)
    if (out / "world.json").exists():
        if all((out / s["file"]).exists() for s in read_jsonl(out / "script.jsonl")):
            return True
        (out / "world.json").unlink()
    (out / "clips").mkdir(parents=True, exist_ok=True)
    (out / UNFINISHED).write_text(json.dumps({"settings": settings}))
    return False


def render_all(scripts: list[dict], seed: int, out: Path, workers: int) -> None:
    """Write the files that are not there yet; a file is there whole or not at all."""
    todo = [s for s in scripts if not (out / s["file"]).exists()]
    work = partial(render_clip, seed=seed, folder=out)
    with tqdm(
        total=len(scripts), initial=len(scripts) - len(todo), desc="clips", unit="clip"
    ) as bar:
        if workers <= 1:
            for script in todo:
                work(script)
                bar.update()
            return
        with ProcessPoolExecutor(workers) as pool:
            for _ in pool.map(work, todo, chunksize=8):
                bar.update()


def write_manifests(out: Path, scripts: dict[str, list[dict]], seed: int) -> dict[str, list[dict]]:
    """Write the manifests and the ground truth, and return the question rows of each split.

    The questions of the training split are in two manifests: one by one, and in conversations.
    """
    questions = {}
    taken: set[str] = set()
    for split in SPLITS:
        questions[split] = question_rows(scripts[split], split, seed)
        captions = caption_rows(scripts[split], split, seed, taken)
        taken |= {row["messages"][1]["content"][0]["text"] for row in captions}
        write_jsonl(out / f"{split}.jsonl", questions[split])
        write_jsonl(out / f"captions_{split}.jsonl", captions)
    write_jsonl(out / "chats_train.jsonl", training_chats(questions["train"], "train", seed))
    write_jsonl(out / "chats_test.jsonl", held_out_chats(questions["test"], "test", seed))
    write_jsonl(out / "script.jsonl", [script for split in SPLITS for script in scripts[split]])
    return questions


def make_world(out: Path, settings: dict, workers: int) -> dict:
    """Render, write the manifests, measure, and return the content of world.json."""
    seed = settings["seed"]
    start = time.perf_counter()
    scripts = {s: script_split(seed, s, n) for s, n in split_sizes(settings["clips"]).items()}
    render_all([s for split in SPLITS for s in scripts[split]], seed, out, workers)
    questions = write_manifests(out, scripts, seed)
    report = balance_report(scripts, questions)
    add_later_turns(report, {split: questions[split] for split in CHATS})
    counts = {}
    for split in SPLITS:
        kinds = Counter(row["kind"] for row in questions[split])
        counts[split] = dict(sorted(kinds.items()))
    world = {
        "settings": settings,
        "clips": {s: len(v) for s, v in scripts.items()},
        "rows": counts,
        "turns": {name: count_turns(read_jsonl(out / f"chats_{name}.jsonl")) for name in CHATS},
        "balance": report,
    }
    (out / "world.json").write_text(json.dumps(world, indent=1))
    (out / UNFINISHED).unlink()
    print(f"{settings['clips']} clips in {time.perf_counter() - start:.0f} s: {out}")
    return world


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "out", type=Path, help="folder to write: clips/, manifests, script.jsonl, world.json"
    )
    parser.add_argument(
        "--clips", type=int, default=3000, help="clips in all four splits together (default 3000)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the whole world follows from it (default 0)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="processes; changes the time, not the world (default 2)",
    )
    parser.add_argument(
        "--remake", action="store_true", help="replace a world of other settings in OUT"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Make the world, or recognise it; 0 when it is balanced."""
    args = parse(argv)
    settings = settings_of(args)
    if prepare(args.out, settings, args.remake):
        print(f"{args.out} holds this world already")
        world = read_json(args.out / "world.json") or {}
    else:
        world = make_world(args.out, settings, args.workers)
    Console(width=96).print(balance_table(world["balance"]))
    problems = over_limits(world["balance"])
    for problem in problems:
        print(f"not balanced: {problem.text}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
