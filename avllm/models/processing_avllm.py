"""Turn samples into token ids, labels and prepared media, in training, chat and evaluation.

The processor holds the tokenizer with its chat template, the encoders' preprocessors, a connector
without weights (to count tokens) and the layout. It is small enough for every loader worker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from avllm.data.collate import Batch, collate
from avllm.data.media.load import Clip, Sampling
from avllm.data.media.part import load_parts
from avllm.data.reading import MediaReader
from avllm.data.region_marks import mark_clips, mark_numbers
from avllm.data.row import Row
from avllm.data.schema import MediaPart, Message, RowError, Sample
from avllm.data.selectors.base import Selector
from avllm.data.soft import Soft
from avllm.fusions.base import consumed_streams
from avllm.layouts.base import Layout
from avllm.log import logger
from avllm.models.configuration_avllm import AVConfig
from avllm.models.connector import Connector
from avllm.models.encoders import widths_of
from avllm.models.loading.files import read_processor, reading, refuse_unknown
from avllm.models.merge import is_placeholder
from avllm.models.rows.chat_text import ChatText, check_media_text
from avllm.models.rows.content import Content, check_regions
from avllm.models.rows.media_inputs import (
    blank_inputs,
    check_decoded,
    check_encoders,
    left_out,
    prepare_streams,
)
from avllm.models.rows.row_parts import check_answers, check_length, row_of
from avllm.models.rows.stream_order import StreamOrder, check_layout
from avllm.models.whole_folder import save_processor
from avllm.models.words import add_to_tokenizer, check_tokenizer
from avllm.registry import build
from avllm.tokens import EncoderInput, duration_of
from avllm.weights import no_larger_than

LOG = logger(__name__)


class AVProcessor(ProcessorMixin):
    """Makes rows and batches from samples.

    Saving and ``AutoProcessor`` are those of transformers; the chat template is the tokenizer's.

    Args:
        tokenizer: the LLM's, with a placeholder token for each stream.
        preprocessors: by stream.
        config: what the model is made of.
        widths: width of each stream that the encoders give.
        llm_dim: width of the LLM's embeddings.
        max_length: longest row in tokens.
        timeout: seconds after which decoding one file is given up.

    Attributes:
        strict: refuse files that the model can use in part only: a video that it only hears.

    Raises:
        UserError: a text around media lacks ``{media}``, or the layout names an unknown stream.
    """

    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        preprocessors: dict[str, Any],
        config: AVConfig,
        widths: dict[str, int],
        llm_dim: int,
        max_length: int = 2048,
        timeout: float = 60.0,
    ) -> None:
        super().__init__(tokenizer)
        self.preprocessors = preprocessors
        self.config = config
        self.widths = widths
        self.llm_dim = llm_dim
        self.max_length = max_length
        self.timeout = timeout
        self.strict = False
        check_media_text(config)
        with torch.device("meta"):  # it counts tokens and needs no weights
            self.connector = Connector(config.connector, widths, llm_dim)
        self.layout: Layout = build("layouts", config.layout)
        check_layout(config, self.connector)
        self.selector: Selector | None = None
        if config.selector:
            self.selector = build("selectors", config.selector)
        self.fused = consumed_streams(config.fusion)
        self.sampling = Sampling(**config.sampling)
        self.chat_text = ChatText(tokenizer, config)
        self.content = Content(config)
        self.stream_order = StreamOrder(self.connector, self.layout, widths, self.fused)
        check_tokenizer(tokenizer, config.words)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    def add_words(self, words: Sequence[str]) -> dict[str, int]:
        """Add words to the tokenizer and return their ids, for ``AVLLM.add_words``.

        Raises:
            UserError: the tokenizer has one of them already.
        """
        return add_to_tokenizer(self.tokenizer, words)

    @classmethod
    def from_model(cls, model: Any, tokenizer: PreTrainedTokenizerBase) -> AVProcessor:
        """Make a model's processor; ``tokenizer`` comes from :func:`load_tokenizer`."""
        return cls.from_encoders(
            model.encoders, tokenizer, model.config, model.connector[0].llm_dim
        )

    @classmethod
    def from_encoders(
        cls, encoders: Any, tokenizer: PreTrainedTokenizerBase, config: AVConfig, llm_dim: int
    ) -> AVProcessor:
        """Make the processor of encoders and of an LLM with ``llm_dim`` wide embeddings."""
        preprocessors = {s: e.preprocessor() for s, e in encoders.items()}
        return cls(tokenizer, preprocessors, config, widths_of(encoders), llm_dim)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``processor_config.json``, without tokenizer and config."""
        return {
            "processor_class": type(self).__name__,
            "preprocessors": {s: p.settings() for s, p in self.preprocessors.items()},
            "widths": self.widths,
            "llm_dim": self.llm_dim,
            "max_length": self.max_length,
            "timeout": self.timeout,
        }

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str | PathLike[str],
        *,
        max_length: int | None = None,
        timeout: float | None = None,
        allow_parts: Collection[str] = (),
        **kwargs: Any,
    ) -> AVProcessor:
        """Read the processor of a checkpoint folder.

        Args:
            folder: the checkpoint.
            max_length, timeout: see the class; None for the saved ones.
            allow_parts: parts from outside of the package, ``pkg.module:Class``, that the
                checkpoint may name; loading it imports their modules.
            kwargs: what ``AutoProcessor`` passes on, which has no meaning for a folder.

        Raises:
            CheckpointError: see :func:`avllm.models.loading.files.read_processor`.
            TypeError: an unknown argument.
        """
        refuse_unknown(kwargs)
        folder = Path(folder)
        saved = read_processor(folder, allow_parts)
        with reading(folder, "the processor"), no_larger_than(saved.size, str(folder)):
            return cls(
                saved.tokenizer,
                saved.preprocessors,
                saved.config,
                saved.widths,
                saved.llm_dim,
                saved.max_length if max_length is None else max_length,
                saved.timeout if timeout is None else timeout,
            )

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> list[str]:  # type: ignore
        """Write the processor's files, and their digests into the manifest of a checkpoint."""
        return save_processor(super().save_pretrained, save_directory, **kwargs)

    # ---- from samples to batches ---------------------------------------------------------------

    def __call__(  # type: ignore[override]
        self,
        samples: Sequence[Sample | dict[str, Any]],
        root: str | Path | None = None,
        answer: bool = False,
    ) -> Batch:
        """Read the media of samples, one after the other, and make a batch.

        Args:
            samples: the rows.
            root: the folder that relative paths start from.
            answer: False ends each row where its last answer begins, for ``AVLLM.generate``.

        Raises:
            MediaError: a file cannot be read.
            RowError: a row cannot be made.
        """
        reader = MediaReader(self)
        rows = []
        for sample in map(Sample.model_validate, samples):
            clips = reader.clips(sample.media, None if root is None else Path(root))
            for warning in left_out(sample.media, clips):
                LOG.warning("row %s: %s", sample.id, warning)
            inputs = [self.prepare(clip, sample.last_question) for clip in clips]
            rows.append(self.row(sample, inputs, answer))
        return self.collate(rows, "right" if answer else "left")

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Message | dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
    ) -> str | Batch:
        """Write a chat by the tokenizer's template.

        Args:
            conversation: messages of a :class:`Sample`: text, video, audio and image parts.
            add_generation_prompt: end where the next answer begins; a last answer is left out.
            tokenize: read the media, too.

        Returns:
            the text, with ``<|video|>`` for a video, and so on; with ``tokenize`` a batch of one.

        Raises:
            RowError: the template refuses the roles.
            MediaError: a file cannot be read.
        """
        sample = Sample.model_validate({"id": "chat", "messages": conversation})
        if tokenize:
            return self([sample], answer=not add_generation_prompt)
        if add_generation_prompt:
            sample = sample.question()
        return self.chat_text.write(sample, answer=not add_generation_prompt)

    # ---- media -------------------------------------------------------------------------------

    def load_clips(self, parts: Sequence[MediaPart], root: Path | None) -> list[Clip]:
        """Decode a row's media parts as the encoders need them, each interval of a file once.

        Raises:
            MediaError: a file cannot be decoded.
            RowError: the model has no encoder for a part, or with ``strict`` for a track of it.
        """
        rates = sorted({self.preprocessors[s].rate for s in self.streams_of("audio")}, reverse=True)
        sees = bool(self.streams_of("video"))
        check_encoders(parts, sees, hears=bool(rates))
        clips = load_parts(
            parts,
            root,
            sampling=self.sampling if sees else None,
            rate=rates[0] if rates else None,
            more_rates=rates[1:],
            timeout=self.timeout,
        )
        check_decoded(parts, clips, self.strict)
        return clips

    @property
    def reads_question(self) -> bool:
        """Return True if frames are chosen by the question: questions cannot share a clip."""
        return self.selector is not None

    def prepare(self, clip: Clip, question: str = "") -> dict[str, EncoderInput]:
        """Prepare each stream of a clip for its encoder; streams that the clip lacks are left out.

        Args:
            clip: the decoded clip.
            question: the question about it, for models with a selector.
        """
        if self.selector is not None:
            clip = self.selector.select(clip, question)
        inputs = prepare_streams(clip, self.preprocessors)
        check_regions(clip, inputs)
        return {stream: replace(item, duration=clip.duration) for stream, item in inputs.items()}

    def streams_of(self, medium: str) -> list[str]:
        """Return the encoders' streams of a medium, ``video`` or ``audio``."""
        return [stream for stream, part in self.preprocessors.items() if part.medium == medium]

    def order(self, clip: dict[str, EncoderInput], variant: str | None = None) -> list[str]:
        """Return the stream of each token that a clip becomes in the LLM's sequence, in order.

        Args:
            clip: inputs by stream, of :meth:`prepare`.
            variant: the variant in which the connector runs.
        """
        return self.stream_order.of(clip, variant)

    # ---- text --------------------------------------------------------------------------------

    def row(
        self,
        sample: Sample,
        clips: Sequence[dict[str, EncoderInput]],
        answer: bool = True,
        runs: Sequence[list[str]] | None = None,
        last_only: bool = False,
        variant: str | None = None,
        durations: Sequence[float | None] | None = None,
        marks: Sequence[int] | None = None,
    ) -> Row:
        """Make token ids with the media runs in place, and labels on the assistant's turns only.

        Args:
            sample: the messages.
            clips: :meth:`prepare`'s result for each media part, in order.
            answer: True for training; False ends the row where the last answer begins.
            runs: :meth:`order` of each clip, if another row about the same clips has it.
            last_only: train the last answer alone, as a connector needs that reads the question.
            variant: the variant in which the connector runs, see :class:`~avllm.data.row.Row`.
            durations: seconds of each clip; None reads them from its streams, if any are left.
            marks: of the row's regions, in their order; see the adapter ``token_marks``.

        Raises:
            RowError: an empty answer, reserved text, another number of clips, or a row too long.
        """
        if len(clips) != len(sample.media):
            raise RowError(
                "media_count", f"{len(sample.media)} media parts but {len(clips)} clips were given"
            )
        if answer:
            check_answers(sample)
        for message in sample.messages:
            self.chat_text.check(message)
        messages = sample.messages if answer else sample.question().messages
        seconds = durations or [duration_of(clip) for clip in clips]
        numbers = mark_numbers(sample.media, marks, len(self.content.marks))
        written = self.content.write(messages, seconds, numbers)
        clips = mark_clips(sample.media, clips, numbers)
        chat = self.chat_text.render(written.messages, answer)
        if runs is None:
            runs = [self.order(clip, variant) for clip in clips]
        tokens = self.chat_text.tokenize(chat, runs)
        check_length(tokens, self.max_length, is_prompt=not answer)
        is_media = is_placeholder(tokens.ids, self.config.media_token_ids)
        row = row_of(
            sample, chat, tokens, list(clips), is_media, last_only=last_only, is_prompt=not answer
        )
        soft = Soft.of(self.content.mixtures(tokens.ids, written.words))
        last = seconds[-1] if seconds else None
        return replace(row, variant=variant, soft=soft, duration=last)

    def collate(self, rows: list[Row], padding_side: str = "right", blanks: bool = False) -> Batch:
        """Collate rows to a batch.

        Args:
            rows: of :meth:`row`.
            padding_side: ``left`` for generation.
            blanks: give absent streams a masked unit, for training on several processes.
        """
        given = self.blanks if blanks else None
        return collate(rows, int(self.tokenizer.pad_token_id), padding_side, given)

    @cached_property
    def blanks(self) -> dict[str, EncoderInput]:
        """A black frame and a moment of silence, on which modules run without training."""
        return blank_inputs(self.preprocessors)

    def decode(self, ids: Tensor, durations: Sequence[float | None] | None = None) -> list[str]:
        """Turn generated ids ``(R, L)`` into answers, with times in seconds.

        Args:
            ids: of the answers alone.
            durations: seconds of the clip that each answer is about (``Row.duration``). Without
                one, an answer keeps the words of the time codec.
        """
        decoded = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        texts = [self.answer_text(text) for text in decoded]
        if durations is None:
            return texts
        return [
            self.content.say_seconds(text, seconds)
            for text, seconds in zip(texts, durations, strict=True)
        ]

    def answer_text(self, text: str, whole: bool = True) -> str:
        """Return generated text without thoughts and white space around the answer."""
        return self.chat_text.without_thoughts(text, whole).strip()

    def describe(self, row: Row) -> dict[str, int]:
        """Count the tokens of each stream and of text, for people."""
        streams = {token_id: stream for stream, token_id in self.config.media_token_ids.items()}
        return dict(Counter(streams.get(token_id, "text") for token_id in row.input_ids.tolist()))


AutoProcessor.register(AVConfig, AVProcessor, exist_ok=True)
