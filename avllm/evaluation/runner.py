"""Ask a model the rows of a benchmark, also with a stream removed or exchanged, and score it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from avllm.data.cache.fill import FeatureCache, recipe
from avllm.data.row import Row
from avllm.data.schema import MediaPart, RowError, Sample
from avllm.errors import UserError
from avllm.evaluation.answering import answer_rows
from avllm.evaluation.benchmarks.base import Benchmark, Prediction, benchmark_of, spread, truths
from avllm.evaluation.clips import EncodedClip, Failure, encode_clips, in_chunks
from avllm.evaluation.conditions import (
    AS_IS,
    Condition,
    Partners,
    partners,
)
from avllm.evaluation.metrics import normalise
from avllm.evaluation.results import Result
from avllm.evaluation.variants import Variants
from avllm.inference.generation import Generation
from avllm.log import logger
from avllm.precision import choose_precision

LOG = logger(__name__)


class SkippedRowsError(UserError):
    """More rows than allowed could not be asked: the figures would be of another test set."""


@dataclass(frozen=True)
class Settings:
    """Choose how an evaluation runs.

    Attributes:
        batch_size: rows generated at a time.
        seed: of partners and of the bootstrap.
        max_new_tokens: of an answer; None takes twice the longest reference and four more.
        num_workers: processes that decode.
        clips_at_once: distinct clips whose features are held at a time; partners are among them.
        max_skip_rate: share of rows that may fail (missing file, too long) before it stops.
        cache: folder of features that a run left behind, or None.
        decoding: ``{"type", **options}`` of a decoder, or None.
        precision: ``fp32``, ``bf16`` for autocast, or ``auto``, as in ``train.precision``.
    """

    batch_size: int = 128
    seed: int = 0
    max_new_tokens: int | None = None
    num_workers: int = 0
    clips_at_once: int = 256
    max_skip_rate: float = 0.01
    cache: str | Path | None = None
    precision: str = "fp32"
    decoding: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        Generation(decoding=self.decoding)
        choose_precision(self.precision, "cpu")  # raises for an unknown one


def evaluate(
    model: Any,
    processor: Any,
    rows: str | Path | Benchmark,
    *,
    without: str | None = None,
    swap: str | None = None,
    limit: int | None = None,
    refusal: str = "unanswerable",
    **settings: Any,
) -> Result:
    """Ask all rows under one condition.

    Args:
        model, processor: of one checkpoint.
        rows: a manifest, or a benchmark (:func:`~avllm.evaluation.benchmarks.base.benchmark_of`).
        without: ``audio``, ``video`` or ``both``: no token of that stream is left.
        swap: ``audio`` or ``video``: that stream comes from another clip.
        limit: at most so many rows, spread over them all.
        refusal: the answer that refuses a question; a row's ``meta.refusal`` goes before it.
        settings: see :class:`Settings`.

    Returns:
        the figures; under a changed condition also how often the answer changed (the rows are
        then asked without the change, too).
    """
    condition = Condition(without, swap)  # type: ignore[arg-type]
    conditions = [AS_IS] if condition == AS_IS else [AS_IS, condition]
    return evaluate_all(
        model,
        processor,
        rows,
        conditions,
        limit=limit,
        refusal=refusal,
        **settings,
    )[condition.name]


def evaluate_all(
    model: Any,
    processor: Any,
    rows: str | Path | Benchmark,
    conditions: Sequence[Condition] = (AS_IS,),
    *,
    limit: int | None = None,
    refusal: str = "unanswerable",
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> dict[str, Result]:
    """Ask all rows under several conditions; each clip is decoded and encoded once for all of them.

    Args:
        model, processor, rows, limit, refusal, settings: see :func:`evaluate`.
        conditions: with ``AS_IS`` among them, results also show how often answers change.
        progress: called with (rows answered, rows in all).

    Returns:
        results by the conditions' names.

    Raises:
        SkippedRowsError: too many rows could not be asked. ManifestError: a malformed manifest.
        ValueError: a swap for which no clip has a partner.
    """
    chosen = Settings(**settings)
    benchmark = rows
    if not isinstance(benchmark, Benchmark):
        benchmark = benchmark_of("manifest", path=str(rows), refusal=refusal)
    was_training = model.training
    model.eval()
    try:
        precision = choose_precision(chosen.precision, model.device.type)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return _Run(
                model,
                processor,
                benchmark,
                list(conditions),
                chosen,
                progress,
                limit,
            ).results()
    finally:
        model.train(was_training)


class _Run:
    """Ask all rows of a benchmark under all conditions, once."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        benchmark: Benchmark,
        conditions: list[Condition],
        settings: Settings,
        progress: Callable[[int, int], None] | None,
        limit: int | None = None,
    ) -> None:
        self.model, self.processor, self.benchmark = model, processor, benchmark
        self.conditions = sorted(
            conditions,
            key=lambda c: c != AS_IS,
        )  # first, so that the others can be compared
        self.settings = settings
        self.samples = spread(benchmark.samples(), limit)
        if not self.samples:
            raise UserError("the benchmark has no rows; expected at least one to ask")
        self.prompts = [benchmark.prompt(sample) for sample in self.samples]
        self.max_new_tokens = settings.max_new_tokens or _longest_answer(processor, self.samples)
        # By condition, then by the row's number.
        self.predictions: dict[str, dict[int, Prediction]] = {c.name: {} for c in conditions}
        self.skipped: dict[int, dict[str, str]] = {}
        self.progress, self.done = progress, 0
        self.cache = _open_cache(settings, model, processor)

    def results(self) -> dict[str, Result]:
        """Return the results by the conditions' names."""
        media = [tuple(dict.fromkeys(prompt.media)) for prompt in self.prompts]
        for numbers in in_chunks(media, self.settings.clips_at_once):
            parts: dict[MediaPart, None] = {}  # as an ordered set
            for number in numbers:
                parts |= dict.fromkeys(media[number])
            self._chunk(numbers, list(parts))
        skipped = [self.skipped[number] for number in sorted(self.skipped)]
        results: dict[str, Result] = {}
        for condition in self.conditions:
            by_number = self.predictions[condition.name]
            predictions = [by_number[number] for number in sorted(by_number)]
            if condition.swap and not any(prediction.touched for prediction in predictions):
                raise UserError(
                    f"swap {condition.swap}: no row has a clip with {condition.swap} "
                    "and another file to take it from"
                )
            results[condition.name] = Result(
                condition,
                predictions,
                self.settings.seed,
                skipped,
                self.benchmark.figures,
            )
        return results

    def _chunk(self, numbers: list[int], parts: list[MediaPart]) -> None:
        """Encode some clips, and ask the rows about them under all conditions."""
        encoded = encode_clips(
            self.model,
            self.processor,
            parts,
            self.benchmark.root,
            num_workers=self.settings.num_workers,
            cache=self.cache,
        )
        clips = {part: clip for part, clip in encoded.items() if isinstance(clip, EncodedClip)}
        for number in numbers:
            outcomes = [encoded[part] for part in self.prompts[number].media]
            failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
            if failures:
                self._skip(number, failures[0].reason, failures[0].detail)
        for condition in self.conditions:
            self._ask(condition, [n for n in numbers if n not in self.skipped], clips)

    def _ask(
        self,
        condition: Condition,
        numbers: list[int],
        clips: dict[MediaPart, EncodedClip],
    ) -> None:
        """Ask rows under a condition, and record their answers."""
        partners = self._partners(condition, numbers, clips)
        variants = Variants(self.processor, condition, clips, partners)
        questions: list[_Question] = []
        for number in numbers:
            try:
                questions.append(self._question(number, variants))
            except RowError as error:
                self._skip(number, error.reason, str(error))
        self._warn_of_own(condition, [q.number for q in questions if not q.touched], clips)
        self._answer(questions)
        for question in questions:
            parts = self.prompts[question.number].media
            seconds = max((clips[part].unit.seconds for part in parts), default=0.0)
            self._note(condition, question, seconds)

    def _question(self, number: int, variants: Variants) -> _Question:
        """Return a row's question under a condition.

        A row that the condition does not change has its answer from the unchanged condition.

        Raises:
            RowError: the row cannot be asked.
        """
        prompt = self.prompts[number]
        media = [variants.of(part, prompt.kind or "") for part in prompt.media]
        touched = any(variant.touched for variant in media)
        unchanged = self.predictions.get(AS_IS.name, {}).get(number)
        if not touched and unchanged is not None:
            return _Question(number, touched, answer=unchanged.answer)
        streams = [variant.streams for variant in media]
        runs = [variant.run for variant in media]
        row = self.processor.row(prompt, streams, answer=False, runs=runs)
        return _Question(number, touched, row=row)

    def _answer(self, questions: list[_Question]) -> None:
        """Generate the answers of the questions that have none."""
        open_questions: list[_Question] = []
        rows: list[Row] = []
        for question in questions:
            if question.row is not None:
                open_questions.append(question)
                rows.append(question.row)
        if len(questions) > len(rows):
            self._advance(len(questions) - len(rows))
        answers = answer_rows(
            self.model,
            self.processor,
            rows,
            batch_size=self.settings.batch_size,
            max_new_tokens=self.max_new_tokens,
            decoding=self.settings.decoding,
            progress=self._advance,
        )
        for question, answer in zip(open_questions, answers, strict=True):
            question.answer = answer

    def _warn_of_own(
        self,
        condition: Condition,
        unchanged: list[int],
        clips: dict[MediaPart, EncodedClip],
    ) -> None:
        """Warn of rows that a swap does not change, since no other clip is asked their kind."""

        def could_change(number: int) -> bool:
            return any(self._swapped(condition, clips[p]) for p in self.prompts[number].media)

        own = [number for number in unchanged if could_change(number)]
        if condition.swap and own:
            kinds = sorted({self.prompts[number].kind or "none" for number in own})
            LOG.warning(
                "%s: %d rows keep their own %s, "
                "no other clip is asked their kind (%s); see `touched`",
                condition.name,
                len(own),
                condition.swap,
                ", ".join(kinds),
            )

    def _swapped(self, condition: Condition, clip: EncodedClip) -> bool:
        """Return whether a clip has streams of the medium that the condition exchanges."""
        return condition.swap is not None and any(
            stream in clip.streams for stream in self.processor.streams_of(condition.swap)
        )

    def _partners(
        self,
        condition: Condition,
        numbers: list[int],
        clips: dict[MediaPart, EncodedClip],
    ) -> Partners:
        """Return the clips that streams are taken from, under a swap."""
        if condition.swap is None:
            return {}
        asked: dict[MediaPart, list[tuple[str, str]]] = {}
        for number in numbers:
            sample = self.samples[number]
            # Times are almost never equal, so they have no part in the choice of partners.
            truth = "" if sample.seconds is not None else normalise(truths(sample)[0])
            for part in self.prompts[number].media:
                asked.setdefault(part, []).append((self.prompts[number].kind or "", truth))
        units = []
        for part, questions in asked.items():
            if self._swapped(condition, clips[part]):
                units.append(replace(clips[part].unit, asked=tuple(sorted(questions))))
        return partners(units, self.settings.seed)

    def _note(self, condition: Condition, question: _Question, seconds: float) -> None:
        """Score an answer and compare it with the answer of the unchanged condition."""
        sample = self.samples[question.number]
        changed: bool | None = None
        if condition != AS_IS:
            unchanged = self.predictions.get(AS_IS.name, {}).get(question.number)
            if unchanged is not None:
                changed = normalise(unchanged.answer) != normalise(question.answer)
        score = self.benchmark.score(sample, question.answer, seconds)
        prediction = Prediction(sample, question.answer, score, question.touched, changed)
        self.predictions[condition.name][question.number] = prediction

    def _skip(self, number: int, reason: str, detail: str) -> None:
        """Leave a row out, under all conditions, so that all have the same rows."""
        sample = self.samples[number]
        self.skipped[number] = {"id": sample.id, "reason": reason, "detail": detail}
        for rows in self.predictions.values():
            rows.pop(number, None)
        LOG.warning("row %s is left out: %s", sample.id, detail)
        if len(self.skipped) > self.settings.max_skip_rate * len(self.samples):
            raise SkippedRowsError(
                f"{len(self.skipped)} of {len(self.samples)} rows could not be asked, the limit is "
                f"{self.settings.max_skip_rate:.1%}; the last was {sample.id!r}: {detail}"
            )

    def _advance(self, rows: int) -> None:
        self.done += rows
        if self.progress is not None:
            self.progress(self.done, len(self.samples) * len(self.conditions))


@dataclass
class _Question:
    """Hold a row under a condition: its number, whether its media changed, and row or answer."""

    number: int
    touched: bool
    row: Row | None = None
    answer: str = ""


def _longest_answer(processor: Any, samples: Sequence[Sample]) -> int:
    """Return twice the tokens of the longest reference, and four more."""
    texts: set[str] = set()
    for sample in samples:
        texts.update(truths(sample))
    ids = processor.tokenizer(sorted(texts), add_special_tokens=False)["input_ids"]
    return 2 * max(len(text_ids) for text_ids in ids) + 4


def _open_cache(settings: Settings, model: Any, processor: Any) -> FeatureCache | None:
    if settings.cache is None:
        return None
    precision = choose_precision(settings.precision, model.device.type)
    return FeatureCache(settings.cache, recipe(processor, model.encoders, precision))
