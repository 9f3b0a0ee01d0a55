"""Choose the clips whose streams a swap puts in the place of others, over a whole manifest."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from avllm.data.schema import MediaPart, Sample
from avllm.errors import UserError
from avllm.evaluation.benchmarks.base import truths
from avllm.evaluation.clips import ClipFacts
from avllm.evaluation.conditions import Condition, Partners, partners
from avllm.evaluation.scoring.words import normalise
from avllm.log import logger

LOG = logger(__name__)


def choose_partners(
    condition: Condition,
    samples: Sequence[Sample],
    prompts: Sequence[Sample],
    facts: Mapping[MediaPart, ClipFacts],
    streams: Collection[str],
    seed: int,
) -> Partners:
    """Choose a partner for each clip that has a stream to exchange, among all of the manifest.

    Args:
        condition: the swap.
        samples: all rows, with their truths.
        prompts: the rows as they are asked.
        facts: of all clips that could be read.
        streams: those that are exchanged.
        seed: of the choice.

    Raises:
        UserError: no clip has a partner.
    """
    asked: dict[MediaPart, list[tuple[str, str]]] = {}
    for sample, prompt in zip(samples, prompts, strict=True):
        # Times are almost never equal, so they have no part in the choice of partners.
        truth = "" if sample.seconds is not None else normalise(truths(sample)[0])
        for part in prompt.media:
            if part in facts and facts[part].streams & set(streams):
                asked.setdefault(part, []).append((prompt.kind or "", truth))
    units = []
    for part, questions in asked.items():
        units.append(replace(facts[part].unit, asked=tuple(sorted(questions))))
    chosen = partners(units, seed)
    if not chosen:
        raise UserError(
            f"swap {condition.swap}: no row has a clip with {condition.swap} "
            "and another file to take it from"
        )
    _warn_of_own(condition, prompts, set(asked), chosen)
    return chosen


def _warn_of_own(
    condition: Condition,
    prompts: Sequence[Sample],
    exchangeable: Collection[MediaPart],
    chosen: Partners,
) -> None:
    """Warn of rows that a swap does not change, since no other clip is asked their kind."""
    kinds: list[str] = []
    for prompt in prompts:
        kind = prompt.kind or ""
        could_change = any(part in exchangeable for part in prompt.media)
        if could_change and not any((kind, part) in chosen for part in prompt.media):
            kinds.append(kind or "none")
    if kinds:
        LOG.warning(
            "%s: %d rows keep their own %s, no other clip is asked their kind (%s); see `touched`",
            condition.name,
            len(kinds),
            condition.swap,
            ", ".join(sorted(set(kinds))),
        )
