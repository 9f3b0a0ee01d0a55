"""Make preferences with a text model: rejected is the right answer, rewritten vaguely or wrongly.

    python data_recipes/rewrite_answers.py SOURCE --output DIR --model MODEL [--kinds vague,wrong]

MODEL is, for example, http://127.0.0.1:8000/v1#Qwen3-8B or hf:Qwen/Qwen3-4B-Instruct-2507.

SOURCE is a folder with a manifest of questions and answers. The row's answer is the chosen one. A
text model, which neither sees nor hears, rewrites it: into a vague answer, or into one that is wrong
in one thing; those are rejected. Answers are kept by their hash: a second run asks only what is
new. The prompts are data: prompts/rewrite_answers.yaml, or a file of your own.

Procedures: Q. Ye et al., CAT (arXiv 2403.04640): ambiguous answers are the ones that are not
preferred; Y. Zhou et al., POVID (arXiv 2402.11411): plausible hallucinations, written into right
answers by a language model. The prompts are our own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from avllm.data.manifest import ManifestError, iterate
from avllm.data.schema import Sample
from avllm.recipes import frame as recipe
from avllm.recipes import making
from avllm.recipes.captioned import file_digest
from avllm.recipes.frame import Dataset, Drop, RecipeError, RecipeRow
from avllm.recipes.media import lacking
from avllm.text_models.answers import answers_of
from avllm.text_models.base import Answer, ModelPrompt
from avllm.text_models.judging import REFUSALS, bare
from avllm.text_models.load import load_text_model
from avllm.yaml_files import parse_yaml

ABOUT = Dataset(
    title="Preferences of rewritten answers (made of your own rows)",
    licence="that of the rows; each row names it where the source does",
    size="a row a question",
    where="any manifest of questions and answers, as the other recipes write it",
    layout="*.jsonl  a manifest of questions and answers",
    citation="CAT, arXiv 2403.04640; POVID, arXiv 2402.11411",
    command="python data_recipes/rewrite_answers.py SOURCE --output DIR --model MODEL",
)
PROMPTS = Path(__file__).parent / "prompts" / "rewrite_answers.yaml"
KINDS = ("vague", "wrong")


@dataclass(frozen=True)
class RewriteAnswers:
    """The job; see `rows` for the options. ``prompts`` is the text of the file of prompts."""

    manifest: Path
    model: str
    kinds: tuple[str, ...]
    prompts: str
    split: str
    answers: Path | None
    name: str = "rewritten"
    source: str = "rewrite_answers"

    @property
    def settings(self) -> dict[str, Any]:
        """All options, the manifest's hash, and the text model's identity in place of its name."""
        identity = load_text_model(self.model).identity
        settings = making.settings_of(self, self.manifest)
        return settings | {"answers": None, "model": None, "asked": identity}

    def plan(self) -> Iterator[dict[str, Any] | Drop]:
        """Yield one task a row with a question and an answer.

        Raises:
            RecipeError: a line of the manifest is no sample.
        """
        try:
            for line, sample in iterate(self.manifest):
                where = f"{self.manifest.name}:{line}"
                if sample.answer and sample.answer.strip():
                    yield {"where": where, "sample": self._whole(sample)}
                else:
                    yield Drop("no_answer", where, sample.id)
        except ManifestError as error:
            raise RecipeError(str(error), reason=error.reason) from error

    def _whole(self, sample: Sample) -> dict[str, Any]:
        """Return the fields of a sample; its media have absolute paths."""
        fields = sample.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        for message in fields["messages"]:
            for part in message["content"]:
                kind = part["type"]
                if kind in ("video", "audio", "image"):
                    part[kind] = str(self.manifest.parent / part[kind])
        return fields

    def make(
        self, tasks: Sequence[dict[str, Any]], shard: making.Shard
    ) -> Iterator[RecipeRow | Drop]:
        """Ask for the rewritten answers, judge them, and yield a row with those that can be used."""
        usable: list[tuple[str, Sample]] = []
        for task in tasks:  # before anything is asked, since answers may have to be paid for
            sample = Sample.model_validate(task["sample"])
            drop = lacking_media(sample, task["where"])
            if drop is None:
                usable.append((task["where"], sample))
            else:
                yield drop
        prompts = []
        for _, sample in usable:
            prompts += [self._prompt(kind, sample) for kind in self.kinds]
        written = iter(self._ask(prompts, shard))
        for where, sample in usable:
            rejected: dict[str, str] = {}
            for kind in self.kinds:
                answer = next(written)
                fault = fault_of(answer, [sample.answer or "", *rejected.values()])
                if fault is None:
                    rejected[kind] = answer.text.strip()
                else:
                    yield Drop(f"{kind}_{fault}", where, answer.detail or answer.text)
            if rejected:
                yield self._row(sample, rejected)

    def _prompt(self, kind: str, sample: Sample) -> ModelPrompt:
        data = prompts_of(self.prompts)
        text = data[kind].replace("{question}", sample.last_question)
        return ModelPrompt(text.replace("{answer}", sample.answer or ""), data["system"])

    def _ask(self, prompts: list[ModelPrompt], shard: making.Shard) -> list[Answer]:
        if not prompts:
            return []
        answers = answers_of(self.answers or shard.answers)
        return answers.ask(load_text_model(self.model), prompts, shard.name)

    def _row(self, sample: Sample, rejected: dict[str, str]) -> RecipeRow:
        fields = sample.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        meta = {**sample.meta, "of": sample.id, "rejected_as": list(rejected)}
        own = {"id": f"{self.name}-{sample.id}", "source": self.source, "meta": meta}
        return RecipeRow(fields | own | {"rejected": list(rejected.values())}, self.split)


def lacking_media(sample: Sample, where: str) -> Drop | None:
    """Return the drop of a row of which a file is missing or empty, None if all are there."""
    for part in sample.media:
        reason = lacking(part.path)
        if reason is not None:
            return Drop(reason, where, part.path)
    return None


def fault_of(answer: Answer, others: Sequence[str]) -> str | None:
    """Return the fault of a rewritten answer in one word, None when it can be used.

    Args:
        answer: of the text model.
        others: answers that it must differ from.
    """
    text = answer.text.strip()
    if answer.reason:
        return answer.reason
    if not text:
        return "empty"
    if text.lower().startswith(REFUSALS):
        return "refused"
    if text in others or bare(text) in {bare(other) for other in others} - {""}:
        return "same_answer"
    return None


def prompts_of(text: str) -> dict[str, str]:
    """Return the prompts of a file by name.

    Raises:
        RecipeError: ``bad_prompts``.
    """
    data = parse_yaml(text)
    expected = {"system", *KINDS}
    if not isinstance(data, dict) or set(data) != expected:
        raise RecipeError(
            f"the file of prompts holds {sorted(data) if isinstance(data, dict) else data!r}; "
            f"expected {sorted(expected)}",
            reason="bad_prompts",
        )
    return data


def kinds_of(text: str) -> tuple[str, ...]:
    """Return the kinds of ``vague,wrong``.

    Raises:
        RecipeError: ``bad_kinds``.
    """
    kinds = tuple(text.split(","))
    if not set(kinds) <= set(KINDS) or len(set(kinds)) < len(kinds):
        raise RecipeError(
            f"--kinds {text!r}; expected some of {', '.join(KINDS)}, with commas between them",
            reason="bad_kinds",
        )
    return kinds


def rows(
    source: Path,
    *,
    output: Path,
    model: Annotated[
        str, typer.Option(help="hf:NAME, http://HOST:PORT/v1#MODEL, rules:FILE.yaml or MODEL.yaml.")
    ] = "",
    kinds: Annotated[str, typer.Option(help="Of rejected answers: vague, wrong.")] = "vague,wrong",
    manifest: making.ManifestName = "train.jsonl",
    prompts: Annotated[
        str, typer.Option(help="A file of prompts instead of prompts/rewrite_answers.yaml.")
    ] = "",
    split: making.SplitName = "train",
    set_name: making.SetName = "",
    answers: making.AnswersFolder = "",
    engine: making.Engine = "local",
    workers: making.Workers = 1,
    shard_size: making.ShardSize = 64,
    gpus: making.Gpus = 0.0,
) -> Iterator[RecipeRow | Drop]:
    """Ask for the rewritten answers, and yield the rows."""
    if not model:
        raise RecipeError(
            "no text model; expected --model hf:NAME, http://HOST:PORT/v1#MODEL or rules:FILE.yaml",
            reason="no_model",
        )
    path = Path(prompts) if prompts else PROMPTS
    file_digest(path)  # a clear error where there is no such file
    text = path.read_text(encoding="utf-8")
    prompts_of(text)
    job = RewriteAnswers(
        manifest=(source / manifest).resolve(),
        model=model,
        kinds=kinds_of(kinds),
        prompts=text,
        split=split,
        answers=Path(answers).resolve() if answers else None,
    )
    job = making.named(job, set_name, "rewritten")
    yield from making.make(
        job, output, engine=engine, workers=workers, shard_size=shard_size, gpus=gpus
    )


if __name__ == "__main__":
    recipe.main(ABOUT, rows)
