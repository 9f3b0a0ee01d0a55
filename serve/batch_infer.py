"""Answer a file of requests.

    python serve/batch_infer.py CHECKPOINT --input requests.jsonl --output answers.jsonl

Requests are samples (one JSON object a line: id and messages; a last answer, if there is one, is
left out). Answers come in the same order, {"id", "answer"} or {"id", "error"}, and each names its
request by a digest ("request"). Killed and started again, the same command continues after the last
answer; requests may be added at the end of the file. With --strict the exit code is 1 if a row
failed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from avllm.errors import exit_on_user_error
from avllm.inference.command_line import add_model_options, load_chat


def main() -> None:
    """Run the command; it succeeds when every row has its line, with --strict when none fails."""
    arguments = parser().parse_args()
    from avllm.log import hush_libraries

    hush_libraries()
    from avllm.data.store.access import allow
    from avllm.inference.batch import answer_file
    from avllm.inference.generation import Generation, read_decoding

    def load() -> tuple[Any, Any]:
        chat = load_chat(arguments)
        return chat.model, chat.processor

    with exit_on_user_error():
        allow(arguments.media_root, arguments.allow_url)
        generation = Generation(
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            decoding=read_decoding(arguments.decoding),
        )
        summary = answer_file(
            load,
            arguments.checkpoint,
            arguments.input,
            arguments.output,
            generation,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            loaded={"quantize": arguments.quantize, "strict": arguments.strict},
        )
    counts = f"{summary.before} rows were there, {summary.added} added"
    print(f"{arguments.output}: {counts}; of all {summary.errors} are errors")
    if summary.errors:
        failed = f"{summary.errors} of {summary.before + summary.added} rows failed"
        advice = "they are not asked again: give them in another --input"
        print(f"{arguments.output}: {failed}; {advice}", file=sys.stderr)
        if arguments.strict:
            raise SystemExit(1)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    command_line = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(command_line)
    add = command_line.add_argument
    add("--input", type=Path, required=True, help="requests, JSONL")
    add(
        "--output",
        type=Path,
        required=True,
        help="answers, JSONL; <output>.run.json is written beside it",
    )
    add("--batch-size", type=positive, default=8)
    add("--workers", type=positive, default=2, help="threads that decode ahead")
    add("--max-new-tokens", type=positive, default=256)
    add("--temperature", type=float, default=0.0, help="0 = greedy")
    add("--top-p", type=float, default=1.0)
    add("--decoding", help="a decoder, as YAML: '{type: contrastive, alpha: 1}'")
    add("--media-root", action="append", default=[], help="rows may name files below it alone")
    add("--allow-url", action="append", default=[], help="rows may name this URL: https://host/")
    return command_line


def positive(text: str) -> int:
    """Read a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


if __name__ == "__main__":
    main()
