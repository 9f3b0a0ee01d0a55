"""Ask a model the rows of a benchmark, as they are and with a stream removed or exchanged, and score what it says."""

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
from avllm.evaluation.conditions import AS_IS, Condition, Partners, Streams, exchange, partners, remove
from avllm.evaluation.metrics import normalise
from avllm.evaluation.results import Result
from avllm.inference.generation import Generation
from avllm.log import logger
from avllm.precision import choose_precision

LOG = logger(__name__)


class SkippedRowsError(UserError):
    """More rows than allowed could not be asked: the figures would be of another test set."""


@dataclass(frozen=True)
class Settings:
    """How an evaluation runs.

    Attributes:
        batch_size: rows generated at a time.
        seed: of partners and of the bootstrap.
        max_new_tokens: of an answer; None takes twice the longest reference and four more.
        num_workers: processes that decode.
        clips_at_once: distinct clips whose features are held at a time; partners are drawn among them.
        max_skip_rate: share of rows that may fail (missing file, too long) before the evaluation stops.
        cache: folder of features that a run left behind, or None.
        decoding: ``{"type", **options}`` of a decoder, or None.
        precision: ``fp32``, ``bf16`` for autocast, or ``auto``, as the trained model's own ``train.precision``.
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
        choose_precision(self.precision, "cpu")  # is it one?


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
        rows: a manifest, or a benchmark (see :func:`avllm.evaluation.benchmarks.base.benchmark_of`).
        without: ``audio``, ``video`` or ``both``: no token of that stream is left.
        swap: ``audio`` or ``video``: that stream comes from another clip.
        limit: at most so many rows, spread over them all.
        refusal: the answer by which a question of a manifest is refused, where a row's ``meta.refusal`` says no other.
        settings: see :class:`Settings`.

    Returns:
        the figures; under a changed condition also how often the answer changed (the rows are asked as they are, too).
    """
    condition = Condition(without, swap)  # type: ignore[arg-type]
    conditions = [AS_IS] if condition == AS_IS else [AS_IS, condition]
    return evaluate_all(model, processor, rows, conditions, limit=limit, refusal=refusal, **settings)[condition.name]


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
        conditions: with ``AS_IS`` among them the results of the others say how often answers change.
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
            return _Run(model, processor, benchmark, list(conditions), chosen, progress, limit).results()
    finally:
        model.train(was_training)


class _Run:
    """One pass over a benchmark."""

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
        self.conditions = sorted(conditions, key=lambda c: c != AS_IS)  # first, so that the others can be compared
        self.settings = settings
        self.samples = spread(benchmark.samples(), limit)
        self.prompts = [benchmark.prompt(sample) for sample in self.samples]
        self.max_new_tokens = settings.max_new_tokens or _longest_answer(processor, self.samples)
        self.found: dict[str, dict[int, Prediction]] = {c.name: {} for c in conditions}
        self.skipped: dict[int, dict[str, str]] = {}
        self.progress, self.done = progress, 0
        self.cache = _open_cache(settings, model, processor)

    def results(self) -> dict[str, Result]:
        media = [tuple(dict.fromkeys(p.media)) for p in self.prompts]
        for places in in_chunks(media, self.settings.clips_at_once):
            self._chunk(places, list(dict.fromkeys(part for i in places for part in media[i])))
        for condition in self.conditions:
            rows = self.found[condition.name].values()
            if condition.swap and not any(p.touched for p in rows):
                raise UserError(
                    f"swap {condition.swap}: no row has a clip with {condition.swap} and another file to take it from"
                )
        skipped = [self.skipped[i] for i in sorted(self.skipped)]
        return {
            c.name: Result(c, [rows[i] for i in sorted(rows)], self.settings.seed, skipped, self.benchmark.figures)
            for c in self.conditions
            for rows in [self.found[c.name]]
        }

    def _chunk(self, places: list[int], parts: list[MediaPart]) -> None:
        encoded = encode_clips(
            self.model,
            self.processor,
            parts,
            self.benchmark.root,
            num_workers=self.settings.num_workers,
            cache=self.cache,
        )
        clips = {part: clip for part, clip in encoded.items() if isinstance(clip, EncodedClip)}
        for place in places:
            failure = next((f for p in self.prompts[place].media if isinstance(f := encoded[p], Failure)), None)
            if failure is not None:
                self._skip(place, failure.reason, failure.detail)
        places = [i for i in places if i not in self.skipped]
        for condition in self.conditions:
            self._ask(condition, [i for i in places if i not in self.skipped], clips)

    def _ask(self, condition: Condition, places: list[int], clips: dict[MediaPart, EncodedClip]) -> None:
        variants = _Variants(self.processor, condition, clips, self._partners(condition, places, clips))
        asked_before = self.found.get(AS_IS.name, {})
        rows: dict[int, Row] = {}
        answers: dict[int, str] = {}
        touched: dict[int, bool] = {}
        for place in places:
            prompt = self.prompts[place]
            media = [variants.of(part, prompt.kind or "") for part in prompt.media]
            touched[place] = any(m.touched for m in media)
            if not touched[place] and place in asked_before:  # the very same question: it has its answer
                answers[place] = asked_before[place].answer
                continue
            try:
                streams, runs = [m.streams for m in media], [m.run for m in media]
                rows[place] = self.processor.row(prompt, streams, answer=False, runs=runs)
            except RowError as error:
                self._skip(place, error.reason, str(error))
        self._warn_of_own(condition, [i for i in (*answers, *rows) if not touched[i]], clips)
        if answers:
            self._advance(len(answers))
        found = answer_rows(
            self.model,
            self.processor,
            list(rows.values()),
            batch_size=self.settings.batch_size,
            max_new_tokens=self.max_new_tokens,
            decoding=self.settings.decoding,
            progress=self._advance,
        )
        answers |= zip(rows, found, strict=True)
        for place, answer in answers.items():
            seconds = max((clips[p].unit.seconds for p in self.prompts[place].media), default=0.0)
            self._note(condition, place, answer, seconds, touched[place])

    def _warn_of_own(self, condition: Condition, places: list[int], clips: dict[MediaPart, EncodedClip]) -> None:
        """Rows of a swap that keep what they have, since no other clip is asked their kind of question."""
        kept = [i for i in places if any(self._swapped(condition, clips[p]) for p in self.prompts[i].media)]
        if condition.swap and kept:
            kinds = sorted({self.prompts[i].kind or "none" for i in kept})
            LOG.warning(
                "%s: %d rows keep their own %s, no other clip is asked their kind (%s); see `touched`",
                *(condition.name, len(kept), condition.swap, ", ".join(kinds)),
            )

    def _swapped(self, condition: Condition, clip: EncodedClip) -> bool:
        """Whether a clip has streams of the medium that the condition exchanges."""
        return condition.swap is not None and any(
            stream in clip.streams for stream in self.processor.streams_of(condition.swap)
        )

    def _partners(self, condition: Condition, places: list[int], clips: dict[MediaPart, EncodedClip]) -> Partners:
        if condition.swap is None:
            return {}
        asked: dict[MediaPart, list[tuple[str, str]]] = {}
        for place in places:
            sample = self.samples[place]
            # times are as good as never equal: whose meets whose is all one
            truth = "" if sample.seconds is not None else normalise(truths(sample)[0])
            for part in self.prompts[place].media:
                asked.setdefault(part, []).append((self.prompts[place].kind or "", truth))
        having = [part for part in asked if self._swapped(condition, clips[part])]
        units = [replace(clips[part].unit, asked=tuple(sorted(asked[part]))) for part in having]
        return partners(units, self.settings.seed)

    def _note(self, condition: Condition, place: int, answer: str, seconds: float, touched: bool) -> None:
        sample = self.samples[place]
        plain = self.found.get(AS_IS.name, {}).get(place) if condition != AS_IS else None
        changed = None if plain is None else normalise(plain.answer) != normalise(answer)
        score = self.benchmark.score(sample, answer, seconds)
        self.found[condition.name][place] = Prediction(sample, answer, score, touched, changed)

    def _skip(self, place: int, reason: str, detail: str) -> None:
        sample = self.samples[place]
        self.skipped[place] = {"id": sample.id, "reason": reason, "detail": detail}
        for rows in self.found.values():
            rows.pop(place, None)  # a row that one condition cannot ask is left out of all: the same rows everywhere
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


@dataclass(frozen=True)
class _Variant:
    """A clip under a condition: what is left of it, how it stands in the sequence, and whether anything was changed."""

    streams: Streams
    run: list[str]
    touched: bool


class _Variants:
    """Clips under a condition, each made once: rows about the same clip hold the same object and share its pass."""

    def __init__(
        self, processor: Any, condition: Condition, clips: dict[MediaPart, EncodedClip], partners: Partners
    ) -> None:
        self.processor, self.condition, self.clips, self.partners = processor, condition, clips, partners
        self.made: dict[tuple[MediaPart, MediaPart | None], _Variant] = {}

    def of(self, part: MediaPart, kind: str) -> _Variant:
        key = (part, self.partners.get((kind, part)))
        if key not in self.made:
            self.made[key] = self._make(*key)
        return self.made[key]

    def _make(self, part: MediaPart, partner: MediaPart | None) -> _Variant:
        clip, swap = self.clips[part].streams, self.condition.swap
        gone = [stream for medium in self.condition.removed for stream in self.processor.streams_of(medium)]
        streams = remove(clip, gone)
        if partner is not None and swap is not None:
            streams = exchange(clip, self.clips[partner].streams, self.processor.streams_of(swap))
        return _Variant(streams, self.processor.order(streams), partner is not None or len(streams) < len(clip))


def _longest_answer(processor: Any, samples: Sequence[Sample]) -> int:
    texts = sorted({t for s in samples for t in truths(s)})
    lengths = [len(ids) for ids in processor.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return 2 * max(lengths) + 4


def _open_cache(settings: Settings, model: Any, processor: Any) -> FeatureCache | None:
    if settings.cache is None:
        return None
    precision = choose_precision(settings.precision, model.device.type)
    return FeatureCache(settings.cache, recipe(processor, model.encoders, precision))
