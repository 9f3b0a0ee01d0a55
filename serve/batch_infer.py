"""Answer a file of requests: python serve/batch_infer.py CHECKPOINT --input requests.jsonl --output answers.jsonl

Requests are samples (one JSON object a line: id and messages; a last answer, if there is one, is left out). Answers
come in the same order, {"id", "answer"} or {"id", "error"}. Killed and started again, the same command goes on where
it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from avllm.errors import exit_on_user_error


def main() -> None:
    """Run the command; it succeeds when every row has its line, also if some are errors."""
    arguments = parser().parse_args()
    from avllm.log import hush_libraries

    hush_libraries()
    from avllm.inference.batch import answer_file
    from avllm.inference.generation import Generation, read_decoding

    def load() -> tuple[Any, Any]:
        from avllm.inference.chat import Chat

        chat = Chat.load(
            arguments.checkpoint, device=arguments.device, quantize=arguments.quantize, allow_parts=arguments.allow_part
        )
        return chat.model, chat.processor

    with exit_on_user_error():
        decoding = read_decoding(arguments.decoding)
        generation = Generation(arguments.max_new_tokens, arguments.temperature, arguments.top_p, decoding)
        done = answer_file(
            load,
            arguments.checkpoint,
            arguments.input,
            arguments.output,
            generation,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            loaded={"quantize": arguments.quantize},
        )
    again = "; those are not asked again: give them in another --input" if done.errors else ""
    print(
        f"{arguments.output}: {done.before} rows were there, {done.added} added; of all {done.errors} are "
        f"errors{again}",
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("checkpoint", type=Path, help="folder of a trained model")
    found.add_argument("--input", type=Path, required=True, help="requests, JSONL")
    found.add_argument(
        "--output",
        type=Path,
        required=True,
        help="answers, JSONL; <output>.run.json lies beside it",
    )
    found.add_argument("--batch-size", type=positive, default=8)
    found.add_argument("--workers", type=positive, default=2, help="threads that decode ahead")
    found.add_argument("--max-new-tokens", type=positive, default=256)
    found.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    found.add_argument("--top-p", type=float, default=1.0)
    found.add_argument("--decoding", help="a decoder, as YAML: '{type: contrastive, alpha: 1}'")
    found.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    found.add_argument(
        "--allow-part", action="append", default=[], help="pkg.module:Class that the checkpoint may name"
    )
    found.add_argument("--quantize", choices=["4bit", "8bit"], help="load the LLM in 4 or 8 bit")
    return found


def positive(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


if __name__ == "__main__":
    main()
