"""Prepare a stage: check its lineage and settings, build model, processor and datasets."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from avllm import distributed
from avllm.config import RunConfig
from avllm.config_data import DataConfig, SourceConfig
from avllm.config_model import ModelConfig
from avllm.data.augment import Augment
from avllm.data.dataset import SampleDataset
from avllm.data.index import Manifest
from avllm.data.items import read_quarantine, without_test_reasons
from avllm.data.loader import Collate, Cut, OncePerItem, build_loader
from avllm.data.packing import fill_sequences
from avllm.data.row import text_row
from avllm.data.row_makers.base import RowMaker
from avllm.data.row_makers.each_turn import EachTurn
from avllm.data.row_makers.whole import Whole
from avllm.data.store.storage import url_of
from avllm.errors import UserError, about_setting, looked_in
from avllm.log import logger
from avllm.models.attention import PackingError, check_packing
from avllm.models.building.adapter_config import peft_config, record_of
from avllm.models.building.extend import extend_model
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.checkpoint_format import IMPORT, is_checkpoint, read_manifest_of
from avllm.models.encoders import check_encoder
from avllm.models.llm_trial import check_llm
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.models.words import load_words
from avllm.registry import build, check
from avllm.training.task import Task

LOG = logger(__name__)
STAGES_BEFORE = {
    "align": (),
    "caption": ("align",),
    "instruct": ("caption", "instruct"),
    "prefer": ("instruct", "prefer"),
}
"""The stages that a stage may start from: the last stage of ``init`` has to be one of them.

Any stage may start from imported weights, whose training was another project's.
"""


class LineageError(UserError):
    """The folder that a stage starts from was not written by a stage that it may follow."""


@dataclass
class Parts:
    """Hold the model and processor that a stage starts with.

    Attributes:
        model: the model, with this stage's LoRA sets.
        processor: its processor.
        chain: records of the stages before, oldest first.
    """

    model: AVLLM
    processor: AVProcessor
    chain: list[dict[str, Any]]


def lineage(config: RunConfig) -> list[dict[str, Any]]:
    """Return the records of the stages before this one, oldest first.

    Raises:
        LineageError: no stage that this one may follow came before, and ``init_from_scratch`` is
            not set.
    """
    before = STAGES_BEFORE[config.stage]
    expected = " or ".join(before)
    must_follow = bool(before) and not config.init_from_scratch
    if config.init is None:
        if must_follow:
            raise LineageError(
                f"stage {config.stage} starts from a finished {expected} run, but no init is "
                "given; say init: RUN, or init_from_scratch=true to train it on a fresh connector"
            )
        return []
    if not is_checkpoint(config.init):
        raise LineageError(
            f"init: {config.init} is no checkpoint{looked_in(config.init)}; expected the folder "
            f"of a finished {expected} run"
        )
    chain = read_manifest_of(config.init)["stages"]
    last = chain[-1]["stage"] if chain else "no stage"
    if must_follow and last not in (*before, IMPORT):
        raise LineageError(
            f"stage {config.stage} starts from a finished {expected} run, but {config.init} was "
            f"written by {last}; give another init, or init_from_scratch=true if that is meant"
        )
    return chain


def check_settings(config: RunConfig) -> None:
    """Check parts by name and manifests, before a model is loaded, which takes minutes.

    Raises:
        UnknownPartError: a type or an option that does not exist.
        ManifestError: a manifest is missing or malformed.
        UserError: an objective's weight is not a number.
    """
    for number, spec in enumerate(config.objectives):
        with about_setting(f"objectives.{number}"):
            weight = spec.get("weight", 1.0)
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise UserError(f"objectives.{number}.weight is {weight!r}; expected a number")
            check("objectives", _without(spec, "weight"))
    if config.model is not None:
        _check_model(config.model)
    _check_part("data.rows", "row_makers", config.data.rows)
    if config.extend is not None:
        _check_encoders("extend", config.extend.encoders)
        for number, spec in enumerate(config.extend.connector):
            _check_part(f"extend.connector.{number}", "adapters", _without(spec, "place"))
        _check_part("extend.layout", "layouts", config.extend.layout)
    with distributed.main_first():
        for name in ("train", "validation"):
            for number, source in enumerate(getattr(config.data, name)):
                with about_setting(f"data.{name}.{number}"):
                    Manifest(source.manifest)


def _check_model(config: ModelConfig) -> None:
    """Check the types and options of a model's parts."""
    _check_encoders("model", config.encoders)
    for number, spec in enumerate(config.connector):
        _check_part(f"model.connector.{number}", "adapters", spec)
    _check_part("model.layout", "layouts", config.layout)
    _check_part("model.time_codec", "time_codecs", config.time_codec)
    _check_part("model.fusion", "fusions", config.fusion)
    _check_part("model.selector", "selectors", config.selector)


def _check_part(key: str, kind: str, spec: dict[str, Any] | None) -> None:
    """Check the type and options of a part, if there is one."""
    if spec is not None:
        with about_setting(key):
            check(kind, spec)


def _check_encoders(section: str, encoders: Mapping[str, dict[str, Any]]) -> None:
    for stream, spec in encoders.items():
        with about_setting(f"{section}.encoders.{stream}"):
            check_encoder(stream, spec)


def _without(spec: dict[str, Any], option: str) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key != option}


def build_parts(config: RunConfig) -> Parts:
    """Build a stage's model and processor by its ``model`` section, or load those of ``init``."""
    with about_setting("init"):
        chain = lineage(config)
    check_settings(config)
    for settings in config.peft:
        with about_setting("peft"):
            peft_config(record_of(settings))
    if config.init is not None:
        with about_setting("init"):
            model = AVLLM.from_pretrained(
                config.init, allow_parts=config.allow_parts, backbones=config.backbones
            )
            processor = AVProcessor.from_pretrained(config.init, allow_parts=config.allow_parts)
        processor.config = model.config
        if config.extend is not None:
            processor = extend_model(model, processor, config.extend)
    else:
        assert config.model is not None
        tokenizer, media_token_ids = load_tokenizer(config.model)
        words = load_words(tokenizer, config.model)
        model = AVLLM.from_backbones(config.model, media_token_ids, words)
        processor = AVProcessor.from_model(model, tokenizer)
    for adapters in config.sets:
        with about_setting("lora" if config.lora else "peft"):
            model.add_lora(adapters)
    processor.max_length = config.data.max_length
    processor.timeout = config.data.timeout
    return Parts(model, processor, chain)


def build_datasets(config: RunConfig, parts: Parts) -> tuple[SampleDataset, SampleDataset | None]:
    """Build the datasets of ``data.train`` and of ``data.validation`` (None without).

    Quarantine lists go by ids. An id that a training manifest has means the row there, and not a
    validation row of another manifest that happens to have the same id; an id that training does
    not have is looked for in validation. Rows that are listed for what they share with test rows
    leave training only: in validation, the same id may be the test row itself.
    """
    data = config.data
    listed = read_quarantine(data.quarantine)
    _check_question_settings(data, parts)
    training = _dataset(data, data.train, parts, listed)
    if data.augment is not None:
        training.augment = Augment(data.augment, config.seed)
    if not data.validation:
        return training, None
    validated = {_canonical(source.manifest) for source in data.validation}
    left_training: set[str] = set()
    for bad in training.items.quarantined:
        if _canonical(bad.manifest) not in validated:
            left_training.add(bad.id)
    reasons_by_id = without_test_reasons(listed)
    for id in left_training & reasons_by_id.keys():
        del reasons_by_id[id]
    return training, _dataset(data, data.validation, parts, reasons_by_id)


def validation_loader(config: RunConfig, dataset: SampleDataset, cut: Cut, collate: Collate) -> Any:
    """Build the loader of the validation rows, each once, in the same order each time.

    The order decides which negatives share a batch. It follows from the seed and the rows' ids, so
    that a sorted file makes no row harder.

    Args:
        config: the stage. dataset: of its validation rows. cut, collate: into batches.
    """
    drawn = dataset.items.drawn_by_id(config.seed, config.train.validate_rows)
    items = OncePerItem(drawn.tolist(), cut)
    return build_loader(dataset, items, collate, config.data.num_workers)


def _check_question_settings(data: DataConfig, parts: Parts) -> None:
    """Refuse settings that keep one form of a clip where a selector chooses frames by question.

    Raises:
        UserError: ``data.cache`` or a ``data.pack`` that shares media is set with such a selector.
    """
    shared = {"data.cache": data.cache is not None, f"data.pack: {data.pack}": data.shares_media}
    for setting, is_set in shared.items():
        if is_set and parts.processor.reads_question:
            raise UserError(
                f"{setting} keeps one form of a clip for all questions, but the model's selector "
                "chooses frames by the question; leave it out (pack: sequences goes with a "
                "selector)"
            )


def _canonical(manifest: str) -> str:
    """Return one spelling of a manifest's path, so that two spellings compare equal."""
    return url_of(manifest) or os.path.realpath(manifest)


def _dataset(
    data: DataConfig, sources: Sequence[SourceConfig], parts: Parts, quarantine: Mapping[str, str]
) -> SampleDataset:
    maker: RowMaker = build("row_makers", data.rows)
    if isinstance(maker, Whole) and (_reads_question(parts) or _rewrites_turns(parts)):
        maker = EachTurn()  # one question a row, and each answer after its own prompt
    return SampleDataset(
        [source.manifest for source in sources],
        parts.processor,
        maker=maker,
        pack=data.shares_media,
        max_packed=data.max_packed,
        quarantine=quarantine,
        keep_decoded=data.keep_decoded,
    )


def _reads_question(parts: Parts) -> bool:
    """Return whether media tokens depend on the question: by the connector or chosen frames."""
    return parts.model.connector.conditioned or parts.processor.reads_question


def _rewrites_turns(parts: Parts) -> bool:
    """Return whether the chat template writes an answer otherwise when more turns follow it."""
    return parts.processor.chat_text.rewrites_turns()


def name_unclear(config: RunConfig, datasets: Sequence[SampleDataset]) -> None:
    """Warn of listed ids that no manifest has, and of those that left several manifests."""
    manifests_by_id: dict[str, set[str]] = {}
    for dataset in datasets:
        for bad in dataset.items.quarantined:
            manifests_by_id.setdefault(bad.id, set()).add(bad.manifest)
    listed = read_quarantine(config.data.quarantine)
    unknown = sorted(listed.keys() - manifests_by_id.keys())
    if unknown:
        LOG.warning(
            "data.quarantine: no manifest of this run has %s; was it made for other manifests?",
            _some(unknown),
        )
    several = sorted(id for id, manifests in manifests_by_id.items() if len(manifests) > 1)
    if several:
        LOG.warning(
            "data.quarantine: %s left several manifests, since lists go by ids; "
            "give each row its own",
            _some(several),
        )


def _some(ids: Sequence[str]) -> str:
    first = ", ".join(ids[:10])
    return first if len(ids) <= 10 else f"{first} and {len(ids) - 10} more"


def check_rows(config: RunConfig, task: Task, maker: RowMaker) -> None:
    """Check that answers that share a sequence or a micro batch train as if they were alone.

    Raises:
        PackingError: for the model or an objective they do not.
        LLMError: the LLM reads embeddings otherwise than token ids.
    """
    with about_setting("model.llm"):
        check_llm(task.model)
    if config.data.pack or maker.shares_sequences:
        with about_setting("data.pack"):
            check_packing(task.model, shares_media=config.data.shares_media)
    comparing = [name for name, objective in task.objectives.items() if objective.compares]
    if config.train.max_tokens and comparing:
        with about_setting("train.max_tokens"):
            raise PackingError(
                "train.max_tokens puts rows of similar length into one micro batch, and objective "
                f"{', '.join(comparing)} compares the rows of a micro batch with each other; use "
                "it with objectives that count tokens only (next_token)"
            )


def check_comparisons(config: RunConfig, task: Task, sizes: Sequence[int], processes: int) -> None:
    """Refuse a stage in which an objective has nothing to compare a part with.

    Args:
        config: the stage.
        task: its objectives.
        sizes: items of each training manifest: rows, or groups of rows about the same media.
        processes: that train together.

    Raises:
        UserError: ``nothing_to_compare``.
    """
    drawn = _rows_to_draw_from(config.data, sizes)
    for name, objective in task.objectives.items():
        if not objective.compares or (config.data.shares_media and not objective.gathers):
            continue
        rows = config.train.batch_size * (processes if objective.gathers else 1)
        if min(rows, drawn) < 2:
            raise UserError(
                f"objective {name} compares the rows of a micro batch with each other, and there "
                f"is one: train.batch_size is {config.train.batch_size}, there are {processes} "
                f"processes, and data.train holds {drawn} rows that may share a batch. Raise "
                "train.batch_size (train.accumulate adds none), or add rows",
                reason="nothing_to_compare",
            )


def _rows_to_draw_from(data: DataConfig, sizes: Sequence[int]) -> int:
    """Return how many different items a micro batch may hold at most."""
    capped = []
    for source, size in zip(data.train, sizes, strict=True):
        capped.append(min(size, source.max_rows or size))
    return min(capped) if data.batches == "one_source" else sum(capped)


def padding(
    parts: Parts,
    *,
    blanks: bool,
    filled: int | None = None,
    max_tokens: int | None = None,
) -> Collate:
    """Return the function that makes batches of rows.

    Args:
        parts: the processor pads and collates.
        blanks: add every stream to every batch, masked where absent: several processes have to do
            the same at the same time, and DeepSpeed needs a gradient of every micro-step.
        filled: tokens up to which rows share a sequence; None gives each its own.
        max_tokens: of a micro batch, padding included; None for one micro batch of any size.
    """
    pad = int(parts.processor.tokenizer.pad_token_id)
    empty = text_row(torch.tensor([pad, pad]))
    join = partial(fill_sequences, max_length=filled) if filled else None
    return Collate(partial(parts.processor.collate, blanks=blanks), empty, join, max_tokens)
