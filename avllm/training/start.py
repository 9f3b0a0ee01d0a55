"""Before the first step and after the last: lineage, model and processor, datasets, the checkpoint with its chain."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from avllm import distributed
from avllm.config import DataConfig, RunConfig, SourceConfig
from avllm.data.augment import Augment
from avllm.data.dataset import SampleDataset
from avllm.data.index import Manifest
from avllm.data.items import read_quarantine, without_test_reasons
from avllm.data.loader import Collate
from avllm.data.packing import fill_sequences
from avllm.data.row import text_row
from avllm.data.row_makers.base import RowMaker
from avllm.data.row_makers.each_turn import EachTurn
from avllm.data.row_makers.whole import Whole
from avllm.data.store.storage import url_of
from avllm.errors import UserError
from avllm.log import logger
from avllm.models.attention import PackingError, check_packing
from avllm.models.building.extend import extend_model
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.checkpoint_format import is_checkpoint, read_manifest_of
from avllm.models.encoders import check_encoder
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.models.words import load_words
from avllm.registry import build, check
from avllm.training.task import Task

LOG = logger(__name__)
BEFORE = {"align": (), "caption": ("align",), "instruct": ("caption", "instruct"), "prefer": ("instruct", "prefer")}
"""The stages of which one has to stand at the end of the chain that a stage starts from."""


class LineageError(UserError):
    """The folder that a stage starts from was not written by a stage that may stand before it."""


@dataclass
class Parts:
    """What a stage starts with.

    Attributes:
        chain: records of the stages before, oldest first.
    """

    model: AVLLM
    processor: AVProcessor
    chain: list[dict[str, Any]]


def lineage(config: RunConfig) -> list[dict[str, Any]]:
    """The stages behind ``init``, checked against what this stage has to follow.

    Raises:
        LineageError: no such stage came before, and ``init_from_scratch`` is not set.
    """
    wanted = " or ".join(BEFORE[config.stage])
    if config.init is None:
        if wanted and not config.init_from_scratch:
            raise LineageError(
                f"stage {config.stage} starts from a finished {wanted} run, but no init is given; say init: RUN, "
                "or init_from_scratch=true to train it on a fresh connector"
            )
        return []
    if not is_checkpoint(config.init):
        raise LineageError(f"init: {config.init} is no checkpoint; expected the folder of a finished {wanted} run")
    chain = read_manifest_of(config.init)["stages"]
    last = chain[-1]["stage"] if chain else "no stage"
    if wanted and last not in BEFORE[config.stage] and not config.init_from_scratch:
        raise LineageError(
            f"stage {config.stage} starts from a finished {wanted} run, but {config.init} was written by {last}; "
            "give another init, or init_from_scratch=true if that is meant"
        )
    return chain


def check_settings(config: RunConfig) -> None:
    """What shows without a model, and is therefore looked at before one is loaded: parts by name, manifests.

    Raises:
        UnknownPartError: a type or an option that does not exist. ManifestError: a manifest is missing or malformed.
    """
    for number, spec in enumerate(config.objectives):
        weight = spec.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise UserError(f"objectives.{number}.weight is {weight!r}; expected a number")
        check("objectives", {key: value for key, value in spec.items() if key != "weight"})
    if config.model is not None:
        for stream, spec in config.model.encoders.items():
            check_encoder(stream, spec)
        for spec in config.model.connector:
            check("adapters", spec)
        check("layouts", config.model.layout)
        check("time_codecs", config.model.time_codec)
        if config.model.fusion is not None:
            check("fusions", config.model.fusion)
        if config.model.selector is not None:
            check("selectors", config.model.selector)
    check("row_makers", config.data.rows)
    if config.extend is not None:
        for stream, spec in config.extend.encoders.items():
            check_encoder(stream, spec)
        for spec in config.extend.connector:
            check("adapters", {key: value for key, value in spec.items() if key != "place"})
        check("layouts", config.extend.layout or {"type": "concat"})
    with distributed.main_first():
        for source in [*config.data.train, *config.data.validation]:
            Manifest(source.manifest)


def build_parts(config: RunConfig) -> Parts:
    """Model and processor of a stage: out of its ``model`` section, or out of the checkpoint that it starts from."""
    chain = lineage(config)
    check_settings(config)
    if config.init is not None:
        model, processor = AVLLM.from_pretrained(config.init), AVProcessor.from_pretrained(config.init)
        processor.config = model.config
        if config.extend is not None:
            processor = extend_model(model, processor, config.extend)
    else:
        assert config.model is not None
        tokenizer, media_token_ids = load_tokenizer(config.model)
        model = AVLLM.from_backbones(config.model, media_token_ids, load_words(tokenizer, config.model))
        processor = AVProcessor.from_model(model, tokenizer)
    for settings in config.lora:
        model.add_lora(settings)
    processor.max_length, processor.timeout = config.data.max_length, config.data.timeout
    return Parts(model, processor, chain)


def build_datasets(config: RunConfig, parts: Parts) -> tuple[SampleDataset, SampleDataset | None]:
    """The items of ``data.train`` and of ``data.validation`` (None without), as this stage's processor reads them.

    Quarantine lists go by ids. An id that a training manifest has means the row there, and no validation row of another
    manifest that happens to have it, too; those that training does not have are looked for in validation. Rows that are
    listed for what they share with test rows leave training alone: the same id may be the test row itself.
    """
    data, listed = config.data, read_quarantine(config.data.quarantine)
    shared = {"data.cache": data.cache is not None, f"data.pack: {data.pack}": data.shares_media}
    for setting, is_set in shared.items():
        if is_set and parts.processor.reads_question:
            raise UserError(
                f"{setting} keeps one form of a clip for all questions, but the model's selector chooses frames by the "
                "question; leave it out (pack: sequences goes with a selector)"
            )
    training = _dataset(data, data.train, parts, listed)
    if data.augment is not None:
        training.augment = Augment(data.augment, config.seed)
    if not data.validation:
        return training, None
    shared = {_place(source.manifest) for source in data.validation}
    meant = {bad.id for bad in training.items.quarantined if _place(bad.manifest) not in shared}
    others = {id: reason for id, reason in without_test_reasons(listed).items() if id not in meant}
    return training, _dataset(data, data.validation, parts, others)


def _place(manifest: str) -> str:
    """A manifest, however it is written."""
    return url_of(manifest) or os.path.realpath(manifest)


def _dataset(
    data: DataConfig, sources: Sequence[SourceConfig], parts: Parts, quarantine: Mapping[str, str]
) -> SampleDataset:
    maker: RowMaker = build("row_makers", data.rows)
    if isinstance(maker, Whole) and (parts.model.connector.conditioned or parts.processor.reads_question):
        maker = EachTurn()  # such a model reads one question a row
    return SampleDataset(
        [source.manifest for source in sources],
        parts.processor,
        maker=maker,
        pack=data.shares_media,
        max_packed=data.max_packed,
        quarantine=quarantine,
        keep_decoded=data.keep_decoded,
    )


def name_unclear(config: RunConfig, datasets: Sequence[SampleDataset]) -> None:
    """Say which ids of the quarantine lists no manifest has, and which stand in several and left all of them."""
    found: dict[str, set[str]] = {}
    for bad in (bad for dataset in datasets for bad in dataset.items.quarantined):
        found.setdefault(bad.id, set()).add(bad.manifest)
    unknown = sorted(read_quarantine(config.data.quarantine).keys() - found.keys())
    if unknown:
        LOG.warning("data.quarantine: no manifest of this run has %s; was it made for other manifests?", _some(unknown))
    several = sorted(id for id, manifests in found.items() if len(manifests) > 1)
    if several:
        LOG.warning(
            "data.quarantine: %s left several manifests, since lists go by ids; give each row its own", _some(several)
        )


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:10]) + (f" and {len(ids) - 10} more" if len(ids) > 10 else "")


def check_rows(config: RunConfig, task: Task, maker: RowMaker) -> None:
    """Check that answers that share a sequence, or a micro batch with others, are trained as if they were alone.

    Raises:
        PackingError: to the model or an objective they are not the same.
    """
    if config.data.pack or maker.shares_sequences:
        check_packing(task.model, shares_media=config.data.shares_media)
    comparing = [name for name, objective in task.objectives.items() if objective.compares]
    if config.train.max_tokens and comparing:
        raise PackingError(
            f"train.max_tokens puts rows of similar length into one micro batch, and objective {', '.join(comparing)} "
            "compares the rows of a micro batch with each other; it goes where only tokens count (next_token)"
        )


def padding(parts: Parts, *, blanks: bool, filled: int | None = None, max_tokens: int | None = None) -> Collate:
    """How rows become a batch.

    Args:
        filled: tokens up to which rows share a sequence; None gives each its own.
        max_tokens: of a micro batch, padding included; None for one micro batch of whatever size.
        blanks: every stream is there, masked where absent: several processes have to do the same at the same time, and
            DeepSpeed wants a gradient of every micro-step.
    """
    pad = int(parts.processor.tokenizer.pad_token_id)
    ids = torch.tensor([pad, pad])
    empty = text_row(ids)
    join = partial(fill_sequences, max_length=filled) if filled else None
    return Collate(partial(parts.processor.collate, blanks=blanks), empty, join, max_tokens)
