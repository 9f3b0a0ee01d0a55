"""Make preferences of a model's own answers: rejected is its answer without a stream.

    avllm eval CHECKPOINT SOURCE/train.jsonl --without audio --swap audio --predictions SOURCE/predictions.jsonl
    python data_recipes/own_answers.py SOURCE --output DIR

SOURCE is a folder with a manifest of questions and answers, and with the answers that a model gave
to them when a stream was removed or exchanged. The row's answer is the chosen one; what the model
says although it does not see or hear what it is asked about is rejected: it comes from the text and
from the other streams alone. Answers that are right all the same prefer nothing and are left out.

Procedure: Y. Zhou et al., POVID (arXiv 2402.11411): answers of the model itself to distorted
pictures are the ones that are not preferred.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from avllm.recipes import frame as recipe
from avllm.recipes import making
from avllm.recipes.frame import Dataset, Drop, RecipeError, RecipeRow, Record, read_jsonl, rows_of
from avllm.text_models.judging import bare

ABOUT = Dataset(
    title="Preferences of own answers (made of your own rows)",
    licence="that of the rows; each row names it where the source does",
    size="a row a question that is answered wrongly without a stream",
    where="make a manifest first, and answers: avllm eval CHECKPOINT MANIFEST --without audio "
    "--predictions predictions.jsonl",
    layout="""
        train.jsonl | *.jsonl  a manifest of questions and answers
        predictions.jsonl | *.jsonl  the answers without a stream
    """,
    citation="POVID, arXiv 2402.11411",
)
AS_IS = "as_is"
"""The condition in which nothing was changed."""


def rejected_answers(predictions: Path) -> dict[str, dict[str, str]]:
    """Return the wrong answers under changed media, by row and then by condition.

    A row that was asked and was always right has none.
    """
    by_row: dict[str, dict[str, str]] = {}
    for record in read_jsonl(predictions):
        if record.text("condition") == AS_IS or record["failed"]:
            continue
        wrong = by_row.setdefault(record.text("id"), {})
        answer = record.text("answer")
        if answer and not record["correct"]:
            wrong[record.text("condition")] = answer
    return by_row


def preference(record: Record, by_row: dict[str, dict[str, str]]) -> RecipeRow | Drop:
    """Return the row with its rejected answers, or the reason why it has none."""
    name = record.text("id")
    if name not in by_row:
        return Drop("not_asked", record.where, f"{name} was not asked with changed media")
    chosen = answer_of(record)
    rejected: dict[str, str] = {}  # by answer: the conditions in which it was given
    for condition, answer in by_row[name].items():
        if bare(answer) != bare(chosen):
            rejected[answer] = (
                f"{rejected[answer]},{condition}" if answer in rejected else condition
            )
    if not rejected:
        return Drop("right_without", record.where, f"{name}: {chosen!r} also with changed media")
    meta = {**record.get("meta", {}), "of": name, "rejected_in": list(rejected.values())}
    sample: dict[str, Any] = {**record, "id": f"{name}-own", "meta": meta}
    return RecipeRow(sample | {"rejected": list(rejected)})


def answer_of(record: Record) -> str:
    """Return the text of a row's last turn.

    Raises:
        RecipeError: it is no assistant's.
    """
    last = record.array("messages")[-1]
    if last.get("role") != "assistant":
        raise RecipeError(f"{record.where}: the last turn is no answer; expected the right one")
    content = last["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def rows(
    source: Path,
    *,
    manifest: making.ManifestName = "train.jsonl",
    predictions: Annotated[
        str, typer.Option(help="The answers in SOURCE, of avllm eval --predictions.")
    ] = "predictions.jsonl",
) -> Iterator[RecipeRow | Drop]:
    """Yield a row for each question that is answered wrongly with changed media."""
    by_row = rejected_answers(source / predictions)
    yield from rows_of(read_jsonl(source / manifest), lambda record: preference(record, by_row))


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
