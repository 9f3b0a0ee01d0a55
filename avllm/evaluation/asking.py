"""Ask all rows of a benchmark under all conditions, once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from avllm.data.boundary import one_row
from avllm.data.cache.fill import FeatureCache, recipe
from avllm.data.row import Row
from avllm.data.schema import MediaPart, RowError, Sample
from avllm.errors import UserError
from avllm.evaluation.answering import answer_rows
from avllm.evaluation.benchmarks.base import Benchmark, Prediction, failed_score, truths
from avllm.evaluation.clips import ClipStore, ClipUse, EncodedClip, Failure, in_chunks
from avllm.evaluation.conditions import AS_IS, Condition, Partners
from avllm.evaluation.results import Result
from avllm.evaluation.sampling import draw_rows
from avllm.evaluation.scoring.words import normalise
from avllm.evaluation.settings import Settings
from avllm.evaluation.swapping import choose_partners
from avllm.evaluation.variants import Variants
from avllm.log import logger
from avllm.precision import choose_precision
from avllm.tokens import duration_of

LOG = logger(__name__)


class FailedRowsError(UserError):
    """More rows than allowed could not be asked: the figures would be of another test set."""


class Run:
    """Ask all rows of a benchmark under all conditions, once.

    Conditions that exchange no stream come first: after them all clips are known, so that the
    partners of a swap are chosen among those of the whole benchmark.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        benchmark: Benchmark,
        conditions: Sequence[Condition],
        settings: Settings,
        progress: Callable[[int, int], None] | None,
        limit: int | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.benchmark = benchmark
        # AS_IS is first, so that the others can be compared with it.
        self.conditions = sorted(conditions, key=lambda c: c != AS_IS)
        self.settings = settings
        self.samples = draw_rows(benchmark.samples(), limit, settings.seed)
        if not self.samples:
            raise UserError("the benchmark has no rows; expected at least one to ask")
        self.prompts = [benchmark.prompt(sample) for sample in self.samples]
        self.uses = [clip_uses(prompt, processor) for prompt in self.prompts]
        self.max_new_tokens = settings.max_new_tokens or _longest_answer(processor, self.samples)
        self.clips = ClipStore(
            model,
            processor,
            benchmark.root,
            num_workers=settings.num_workers,
            cache=_open_cache(settings, model, processor),
        )
        # By condition, then by the row's number.
        self.predictions: dict[str, dict[int, Prediction]] = {c.name: {} for c in conditions}
        self.failures: dict[str, dict[int, Failure]] = {c.name: {} for c in conditions}
        self.failed: set[int] = set()  # under any condition
        self.progress = progress
        self.done = 0

    def results(self) -> dict[str, Result]:
        """Return the results by the conditions' names."""
        plain = [condition for condition in self.conditions if condition.swap is None]
        for numbers in in_chunks(self.uses, self.settings.clips_at_once):
            clips, failures = self._encode([self.uses[number] for number in numbers])
            for condition in plain:
                self._ask(condition, numbers, clips, failures, {})
        for condition in self.conditions:
            if condition.swap is not None:
                self._swap(condition)
        return {condition.name: self._result(condition) for condition in self.conditions}

    def _encode(
        self, uses: Sequence[tuple[ClipUse, ...]]
    ) -> tuple[dict[ClipUse, EncodedClip], dict[ClipUse, Failure]]:
        """Return the clips of some rows, and why there are none of others."""
        distinct: dict[ClipUse, None] = {}  # as an ordered set
        for of_row in uses:
            distinct |= dict.fromkeys(of_row)
        clips: dict[ClipUse, EncodedClip] = {}
        failures: dict[ClipUse, Failure] = {}
        for use, outcome in self.clips.get(list(distinct)).items():
            if isinstance(outcome, Failure):
                failures[use] = outcome
            else:
                clips[use] = outcome
        return clips, failures

    def _swap(self, condition: Condition) -> None:
        """Ask all rows with streams of other clips, along the partners' order.

        Neighbours in that order share clips, so most clips are encoded once more at most.
        """
        assert condition.swap is not None
        streams = self.processor.streams_of(condition.swap)
        partners = choose_partners(
            condition,
            self.samples,
            self.prompts,
            self.clips.facts,
            streams,
            self.settings.seed,
        )
        places: dict[MediaPart, int] = {}
        for _, part in partners:
            places.setdefault(part, len(places))
        order: list[tuple[int, int]] = []
        for number, prompt in enumerate(self.prompts):
            first = min((places[part] for part in prompt.media if part in places), default=-1)
            order.append((first, number))
        numbers = [number for _, number in sorted(order)]
        ordered = [self._uses_of_swap(number, partners) for number in numbers]
        for chunk in in_chunks(ordered, self.settings.clips_at_once):
            clips, failures = self._encode([ordered[place] for place in chunk])
            self._ask(condition, [numbers[place] for place in chunk], clips, failures, partners)

    def _uses_of_swap(self, number: int, partners: Partners) -> tuple[ClipUse, ...]:
        """Return the clips that a row is asked with under a swap: its own and partners'.

        They are none where its answer is known already.
        """
        others = self._others(number, partners)
        if not others and number in self.predictions.get(AS_IS.name, {}):
            return ()
        return tuple(dict.fromkeys([*self.uses[number], *others]))

    def _others(self, number: int, partners: Partners) -> list[ClipUse]:
        """Return the partners of a row's clips."""
        kind = self.prompts[number].kind or ""
        others: list[ClipUse] = []
        for use in self.uses[number]:
            partner = partners.get((kind, use.part))
            if partner is not None:
                others.append(ClipUse(partner, use.question))
        return others

    def _ask(
        self,
        condition: Condition,
        numbers: Sequence[int],
        clips: dict[ClipUse, EncodedClip],
        failures: dict[ClipUse, Failure],
        partners: Partners,
    ) -> None:
        """Ask rows under a condition, and record their answers."""
        variants = Variants(self.processor, condition, clips, partners)
        questions: list[_Question] = []
        for number in numbers:
            needed = [*self.uses[number], *self._others(number, partners)]
            unread = [use for use in needed if use in failures]
            if unread:
                self._fail(condition, number, failures[unread[0]])
                continue
            try:
                with one_row():
                    question = self._question(number, variants)
            except RowError as error:
                self._fail(condition, number, Failure(error.reason, str(error)))
            else:
                questions.append(question)
        self._answer(questions)
        for question in questions:
            self._note(condition, question)

    def _question(self, number: int, variants: Variants) -> _Question:
        """Return a row's question under a condition.

        A row that the condition does not change has its answer from the unchanged condition.

        Raises:
            RowError: the row cannot be asked.
        """
        prompt = self.prompts[number]
        uses = self.uses[number]
        kind = prompt.kind or ""
        unchanged = self.predictions.get(AS_IS.name, {}).get(number)
        touched = any(variants.touches(use, kind) for use in uses)
        if not touched and unchanged is not None:
            return _Question(number, touched, answer=unchanged.answer)
        media = [variants.of(use, kind) for use in uses]
        row = self.processor.row(
            prompt,
            [variant.streams for variant in media],
            answer=False,
            runs=[variant.run for variant in media],
            # Of the whole clip: with all streams removed there is none to read it from.
            durations=[duration_of(variants.clips[use].streams) for use in uses],
        )
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

    def _note(self, condition: Condition, question: _Question) -> None:
        """Score an answer and compare it with the answer of the unchanged condition."""
        sample = self.samples[question.number]
        changed: bool | None = None
        if condition != AS_IS:
            unchanged = self.predictions.get(AS_IS.name, {}).get(question.number)
            if unchanged is not None:
                changed = normalise(unchanged.answer) != normalise(question.answer)
        parts = self.prompts[question.number].media
        seconds = max((self.clips.facts[part].unit.seconds for part in parts), default=0.0)
        score = self.benchmark.score(sample, question.answer, seconds)
        prediction = Prediction(sample, question.answer, score, question.touched, changed)
        self.predictions[condition.name][question.number] = prediction

    def _fail(self, condition: Condition, number: int, failure: Failure) -> None:
        """Record that a row could not be asked under a condition.

        Raises:
            FailedRowsError: too many rows could not.
        """
        self.failures[condition.name][number] = failure
        self._advance(1)
        if number in self.failed:
            return
        self.failed.add(number)
        sample = self.samples[number]
        LOG.warning("row %s counts as wrong: %s", sample.id, failure.detail)
        if len(self.failed) > self.settings.max_skip_rate * len(self.samples):
            raise FailedRowsError(
                f"{len(self.failed)} of {len(self.samples)} rows could not be asked, the limit is "
                f"{self.settings.max_skip_rate:.1%}; the last was {sample.id!r}: {failure.detail}"
            )

    def _result(self, condition: Condition) -> Result:
        """Return the result of a condition; rows that failed are in it, as wrong ones."""
        by_number = dict(self.predictions[condition.name])
        longest = max((facts.unit.seconds for facts in self.clips.facts.values()), default=0.0)
        failed: list[dict[str, str]] = []
        for number, failure in sorted(self.failures[condition.name].items()):
            sample = self.samples[number]
            score = failed_score(self.benchmark.score(sample, "", longest))
            by_number[number] = Prediction(sample, "", score, failed=True)
            failed.append({"id": sample.id, "reason": failure.reason, "detail": failure.detail})
        predictions = [by_number[number] for number in sorted(by_number)]
        return Result(condition, predictions, self.settings.seed, failed, self.benchmark.figures)

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


def clip_uses(prompt: Sample, processor: Any) -> tuple[ClipUse, ...]:
    """Return a row's clips, in order, with the question where the model's selector reads it."""
    question = prompt.last_question if processor.reads_question else ""
    return tuple(ClipUse(part, question) for part in prompt.media)


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
