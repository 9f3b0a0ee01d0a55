"""Ask the quickstart's model the questions of the world, and keep figures and answers.

    python scripts/toy_world/asking.py RUN [--cores 2]

Asked are the questions of the test split, with all streams and with streams removed or exchanged,
and those of the unseen combinations; some of the test split also as second and third turn of a
conversation, after true answers. Retrieval is measured, too. All figures come from generated
answers about decoded files.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

STREAMS = ("audio", "video")
PARTS = 4  # of the test split: shared out over processes, so that no core waits for long


def ask(run: Path, cores: int) -> None:
    """Evaluate the last stage, shared out over processes by clips, and keep figures and answers."""
    from avllm.evaluation.command import write_predictions
    from avllm.evaluation.environment import environment
    from avllm.log import hush_libraries

    hush_libraries()
    folder = run / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    parts = [share_out(run, "test", part, PARTS) for part in range(PARTS)]
    unseen_part = share_out(run, "unseen", 0, 1)
    with ProcessPoolExecutor(cores) as pool:  # forked: what is imported above is not loaded again
        tests = [pool.submit(ask_part, run, part, True) for part in parts]
        unseen = pool.submit(ask_part, run, unseen_part, False)
        chats = pool.submit(ask_part, run, share_out(run, "chats_test", 0, 1), False)
        retrieved = pool.submit(retrieve, run)
        results = merge([test.result() for test in tests])
        conditions = {name: result.to_dict() for name, result in results.items()}
        conditions["unseen"] = unseen.result()["as_is"].to_dict()
        figures = {
            "conditions": conditions,
            "turns": figures_by_turn(results["as_is"], chats.result()["as_is"]),
            "retrieval": retrieved.result(),
            "environment": environment(),
        }
    (folder / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    write_predictions(folder / "answers.jsonl", results.values())


def merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one result a condition, with the predictions of all parts."""
    from avllm.evaluation.results import Result

    merged = {}
    for name, first in parts[0].items():
        predictions = [prediction for part in parts for prediction in part[name].predictions]
        failed = [row for part in parts for row in part[name].failed]
        merged[name] = Result(first.condition, predictions, first.seed, failed, first.corpus)
    return merged


def figures_by_turn(single: Any, chats: Any) -> dict[str, dict[str, Any]]:
    """Return the figures of the same questions as first, second and third turn.

    Args:
        single: result of all questions of the test split, each asked alone.
        chats: result of the conversations.
    """
    from avllm.evaluation.results import figures

    by_turn: dict[int, list[Any]] = {1: []}
    asked_again = set()
    for prediction in chats.predictions:
        meta = prediction.sample.meta
        by_turn.setdefault(meta["turn"], []).append(prediction)
        asked_again.add(meta["last"])
    by_turn[1] = [p for p in single.predictions if p.sample.id in asked_again]
    return {str(turn): figures(by_turn[turn]) for turn in sorted(by_turn)}


def share_out(run: Path, split: str, part: int, parts: int) -> Path:
    """Write a manifest of the questions on each `parts`-th clip of a split; return its path."""
    path = run / "evaluation" / f"{split}-{part}.jsonl"
    number_of_clip: dict[str, int] = {}
    with (
        (run / "world" / f"{split}.jsonl").open(encoding="utf-8") as rows,
        path.open("w", encoding="utf-8") as out,
    ):
        for row in map(json.loads, rows):
            number = number_of_clip.setdefault(row["meta"]["clip"], len(number_of_clip))
            if number % parts != part:
                continue
            media = row["messages"][0]["content"][0]
            media[media["type"]] = f"../world/{media[media['type']]}"
            out.write(json.dumps(row) + "\n")
    return path


def ask_part(run: Path, manifest: Path, changed: bool) -> dict[str, Any]:
    """Ask the last stage the rows of a manifest, and return results by condition.

    Args:
        run: folder of the quickstart.
        manifest: of rows of the world.
        changed: whether to ask with streams removed and exchanged, too.
    """
    from avllm.evaluation.conditions import AS_IS, Condition
    from avllm.evaluation.runner import evaluate_all

    model, processor = load(run / "stage3")
    conditions = [AS_IS]
    if changed:
        conditions += [Condition(without=stream) for stream in STREAMS]  # type: ignore[arg-type]
        conditions += [Condition(swap=stream) for stream in STREAMS]  # type: ignore[arg-type]
    # The precision in which it was trained.
    return evaluate_all(model, processor, manifest, conditions, precision="auto")


@lru_cache(maxsize=1)
def load(folder: Path) -> tuple[Any, Any]:
    """Return model and processor of a checkpoint, read once in each process."""
    from avllm.models.modeling_avllm import AVLLM
    from avllm.models.processing_avllm import AVProcessor

    model = AVLLM.from_pretrained(str(folder))
    model.llm.merge_adapter()  # the same within rounding, and a third faster
    return model, AVProcessor.from_pretrained(folder)


def retrieve(run: Path) -> dict[str, Any]:
    """Return the figures of text-to-clip retrieval with the model of stage 1."""
    from avllm.evaluation.retrieval import retrieval

    manifest = run / "world" / "captions_test.jsonl"
    return retrieval(run / "stage1", manifest, limit=200, precision="auto")


def main() -> None:
    """Ask, with the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--cores", type=int, default=1, help="processes that answer")
    args = parser.parse_args()
    ask(args.run, args.cores)


if __name__ == "__main__":
    main()
