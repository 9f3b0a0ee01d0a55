"""From a sample to token ids, labels and prepared media: one processor for training, chat, batch, API and evaluation.

It holds the tokenizer with its chat template, the encoders' preprocessors, a connector without weights (to count
tokens) and the layout, and nothing heavy: loader workers carry it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin
from transformers.utils import PROCESSOR_NAME

from avllm.adapters.base import in_variant
from avllm.data.collate import Batch, collate
from avllm.data.media.load import Clip, Frames, Sampling, Sound
from avllm.data.media.part import load_parts
from avllm.data.reading import MediaReader
from avllm.data.row import Row
from avllm.data.schema import AudioPart, ImagePart, MediaPart, Message, RowError, Sample
from avllm.data.selectors.base import Selector
from avllm.data.soft import Soft
from avllm.encoders.base import preprocessor_from_settings
from avllm.errors import UserError
from avllm.fusions.base import consumed_streams
from avllm.layouts.base import Layout
from avllm.models.checkpoint_format import CheckpointError, read_config
from avllm.models.configuration_avllm import AVConfig
from avllm.models.connector import Connector
from avllm.models.encoders import widths_of
from avllm.models.merge import is_placeholder
from avllm.models.rows.chat_text import MARK, ChatText
from avllm.models.rows.content import Content, check_regions, in_seconds
from avllm.models.rows.row_parts import row_of
from avllm.models.words import add_to_tokenizer, check_tokenizer
from avllm.registry import build
from avllm.tokens import EncoderInput, Grid, duration_of

OLD_NAME = "avllm_processor.json"  # before it was a ProcessorMixin
MOST_ORDERS = 512  # orders of clips that a processor remembers


class AVProcessor(ProcessorMixin):
    """Samples in, rows and batches out.

    Of transformers' processors it has saving, loading and ``AutoProcessor``; the chat template is the tokenizer's.

    Args:
        tokenizer: the LLM's, with a placeholder token for each stream.
        preprocessors: by stream.
        config: what the model is made of.
        widths: width of each stream that the encoders give.
        llm_dim: width of the LLM's embeddings.
        max_length: longest row in tokens.
        timeout: seconds after which decoding one file is given up.

    Raises:
        UserError: a text around media does not hold ``{media}`` once, or the layout names a stream that is not there.
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
        self.preprocessors, self.config = preprocessors, config
        self.widths, self.llm_dim = widths, llm_dim
        self.max_length, self.timeout = max_length, timeout
        for kind, text in config.media_text.items():
            if text.count("{media}") != 1:
                raise UserError(f"media_text around {kind} is {text!r}; expected {{media}} in it, once")
        with torch.device("meta"):  # counts tokens, holds no numbers
            self.connector = Connector(config.connector, widths, llm_dim)
        self.layout: Layout = build("layouts", config.layout)
        unknown = [s for s in config.layout.get("streams") or [] if s not in self.connector.out_streams]
        if unknown:
            raise UserError(
                f"layout: stream {unknown[0]!r} does not come out of the connector; choose among "
                f"{self.connector.out_streams}"
            )
        self.selector: Selector | None = build("selectors", config.selector) if config.selector else None
        self.fused = consumed_streams(config.fusion)
        self.sampling = Sampling(**config.sampling)
        self.chat_text = ChatText(tokenizer, config)
        self.content = Content(config)
        self._orders: dict[tuple[Any, ...], list[str]] = {}
        check_tokenizer(tokenizer, config.words)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    def add_words(self, words: Sequence[str]) -> dict[str, int]:
        """Add words to the tokenizer and return their ids, for ``AVLLM.add_words``.

        Raises:
            UserError: the tokenizer has one of them already.
        """
        return add_to_tokenizer(self.tokenizer, words)

    # ---- building -------------------------------------------------------------------------------------------------

    @classmethod
    def from_model(cls, model: Any, tokenizer: PreTrainedTokenizerBase) -> AVProcessor:
        """The processor that goes with a composed model; ``tokenizer`` has been through :func:`load_tokenizer`."""
        return cls.from_encoders(model.encoders, tokenizer, model.config, model.connector[0].llm_dim)

    @classmethod
    def from_encoders(
        cls, encoders: Any, tokenizer: PreTrainedTokenizerBase, config: AVConfig, llm_dim: int
    ) -> AVProcessor:
        """The processor of encoders by stream and of an LLM whose embeddings are ``llm_dim`` wide."""
        preprocessors = {s: e.preprocessor() for s, e in encoders.items()}
        return cls(tokenizer, preprocessors, config, widths_of(encoders), llm_dim)

    def to_dict(self) -> dict[str, Any]:
        """What ``processor_config.json`` holds. The tokenizer has files of its own, the config is the model's."""
        return {
            "processor_class": type(self).__name__,
            "preprocessors": {s: p.settings() for s, p in self.preprocessors.items()},
            "widths": self.widths,
            "llm_dim": self.llm_dim,
            "max_length": self.max_length,
            "timeout": self.timeout,
        }

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: str | PathLike[Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The constructor's arguments beside the tokenizer, out of a checkpoint folder: ``from_pretrained`` calls this.

        Args:
            pretrained_model_name_or_path: a checkpoint folder.
            kwargs: ``max_length`` and ``timeout``, which go before those in the folder, and transformers' own.

        Raises:
            FileNotFoundError: the folder holds no processor. CheckpointError: another model's.
            TypeError: an argument that would do nothing.
        """
        folder = Path(pretrained_model_name_or_path)
        if not (folder / PROCESSOR_NAME).is_file() and (folder / OLD_NAME).is_file():
            raise CheckpointError(
                f"{folder} was written by an earlier avllm: rename its {OLD_NAME} to {PROCESSOR_NAME}"
            )
        if not (folder / PROCESSOR_NAME).is_file():
            raise FileNotFoundError(f"{folder} has no {PROCESSOR_NAME}; expected an avllm checkpoint folder")
        config = read_config(folder)
        state, given = super().get_processor_dict(folder, **kwargs)
        unknown = sorted(given.keys() - {"max_length", "timeout", "trust_remote_code"})
        if unknown:
            raise TypeError(f"AVProcessor.from_pretrained takes max_length and timeout, not {unknown}")
        state["preprocessors"] = {s: preprocessor_from_settings(v) for s, v in state["preprocessors"].items()}
        return state | {"config": config}, given

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: Any = None, **kwargs: Any
    ) -> Any:
        # the base class would hand these to the tokenizer too, which would keep and save them
        rest = {name: value for name, value in kwargs.items() if name not in ("max_length", "timeout")}
        return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **rest)

    # ---- whole ways -----------------------------------------------------------------------------------------------

    def __call__(  # type: ignore[override]
        self, samples: Sequence[Sample | dict[str, Any]], root: str | Path | None = None, answer: bool = False
    ) -> Batch:
        """Samples -> a batch, their media read one after the other.

        Args:
            samples: the rows. root: the folder that relative paths start from.
            answer: False for ``AVLLM.generate``: each row ends where its last answer begins; True for a forward pass.

        Raises:
            MediaError: a file cannot be read. RowError: a row cannot be made.
        """
        reader = MediaReader(self)
        rows = []
        for sample in map(Sample.model_validate, samples):
            clips = reader.inputs(sample.media, None if root is None else Path(root), sample.last_question)
            rows.append(self.row(sample, clips, answer))
        return self.collate(rows, "right" if answer else "left")

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Message | dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
    ) -> str | Batch:
        """A chat as the tokenizer's template writes it.

        Args:
            conversation: messages, as a :class:`Sample` has them: text, video, audio and image parts.
            add_generation_prompt: end where the next answer begins; a last answer is left out.
            tokenize: read the media, too.

        Returns:
            the text, with ``<|video|>`` in the place of a video, and so on; with ``tokenize`` a batch of one row.

        Raises:
            RowError: the template refuses the roles. MediaError: a file cannot be read.
        """
        sample = Sample.model_validate({"id": "chat", "messages": conversation})
        if tokenize:
            return self([sample], answer=not add_generation_prompt)
        shown = sample.question() if add_generation_prompt else sample
        text = self.chat_text.render(in_seconds(shown.messages), answer=not add_generation_prompt).text
        for part in shown.media:
            text = text.replace(MARK, f"<|{part.type}|>", 1)
        return text

    # ---- media ----------------------------------------------------------------------------------------------------

    def load_clips(self, parts: Sequence[MediaPart], root: Path | None) -> list[Clip]:
        """Decode media parts (of a row) as this model's encoders need them, each interval of a file once.

        Raises:
            MediaError: a file that cannot be decoded. RowError: media that the model has no encoder for.
        """
        rates = sorted({self.preprocessors[s].rate for s in self.streams_of("audio")}, reverse=True)
        sees, hears = bool(self.streams_of("video")), bool(rates)
        for part in parts:
            if not isinstance(part, AudioPart) and part.regions:
                self._needs(sees, "picture with regions", "visual")
            if isinstance(part, ImagePart):
                self._needs(sees, "picture", "visual")
            elif isinstance(part, AudioPart):
                self._needs(hears, "sound", "audio")
            elif part.sound == "on":
                self._needs(hears, "video whose sound is to be heard", "audio")
        clips = load_parts(
            parts,
            root,
            sampling=self.sampling if sees else None,
            rate=rates[0] if hears else None,
            more_rates=rates[1:],
            timeout=self.timeout,
        )
        for clip in clips:
            self._needs(clip.frames is not None or clip.sound is not None, "video without sound", "visual")
        return clips

    @staticmethod
    def _needs(there: bool, what: str, encoder: str) -> None:
        if not there:
            raise RowError("no_encoder", f"it holds a {what}, but the model has no {encoder} encoder")

    @property
    def reads_question(self) -> bool:
        """Whether clips are chosen by the question, so that none can be shared between questions."""
        return self.selector is not None

    def prepare(self, clip: Clip, question: str = "") -> dict[str, EncoderInput]:
        """Prepare each stream of a clip for its encoder; an absent stream is absent here too.

        Args:
            clip: as decoded. question: what is asked about it, for models with a selector.
        """
        if self.selector is not None:
            clip = self.selector.select(clip, question)
        inputs = {}
        for stream, preprocessor in self.preprocessors.items():
            if preprocessor.medium == "video" and clip.frames is not None:
                inputs[stream] = preprocessor(clip.frames, clip.duration)
            if preprocessor.medium == "audio" and clip.sound is not None:
                inputs[stream] = preprocessor(clip.sound_at(preprocessor.rate), clip.duration)
        check_regions(clip, inputs)
        return {stream: replace(item, duration=clip.duration) for stream, item in inputs.items()}

    def streams_of(self, medium: str) -> list[str]:
        """Return the encoders' streams of a medium, ``video`` or ``audio``."""
        return [stream for stream, part in self.preprocessors.items() if part.medium == medium]

    def order(self, clip: dict[str, EncoderInput], variant: str | None = None) -> list[str]:
        """Return the streams' names in the order of the LLM's sequence, one a token: the run that the clip becomes.

        Args:
            clip: of :meth:`prepare`. variant: the one in which the connector runs.
        """
        # in the order of the model's streams, not of the clip's: features out of a cache make the same row
        grids: dict[str, Grid] = {n: clip[n.split(".")[0]].grid for n in self.widths if n.split(".")[0] in clip}
        if not grids:
            return []
        # clocks and masks alone decide it, and many questions ask about one clip
        clocks = ((n, g.mask.shape, g.span.numpy().tobytes(), g.mask.numpy().tobytes()) for n, g in grids.items())
        key = (variant, *clocks)
        if key not in self._orders:
            if len(self._orders) >= MOST_ORDERS:
                self._orders.clear()
            with in_variant(variant):
                made = self.connector.output_grid(grids)
            self._orders[key] = self.layout.order({n: grid for n, grid in made.items() if n not in self.fused})
        return self._orders[key]

    # ---- text -----------------------------------------------------------------------------------------------------

    def row(
        self,
        sample: Sample,
        clips: Sequence[dict[str, EncoderInput]],
        answer: bool = True,
        runs: Sequence[list[str]] | None = None,
        last_only: bool = False,
        variant: str | None = None,
    ) -> Row:
        """Make token ids with the media runs in place, and labels on the assistant's turns only.

        Args:
            sample: the messages.
            clips: :meth:`prepare`'s result for each media part, in order.
            answer: True for training; False ends the row where the last answer begins.
            runs: :meth:`order` of each clip, where it is already known from another row about the same clips.
            last_only: train the last answer alone; the turns before it are given. A connector that reads the question
                needs it, since it reads one question a row.
            variant: the one in which the connector runs, see :class:`~avllm.data.row.Row`.

        Raises:
            RowError: an empty answer, reserved text, more media than parts, or a row longer than ``max_length``.
        """
        if len(clips) != len(sample.media):
            raise RowError("media_count", f"{len(sample.media)} media parts but {len(clips)} clips were given")
        self._check(sample, answer)
        messages = sample.messages if answer else sample.question().messages
        written = self.content.write(messages, [duration_of(clip) for clip in clips])
        chat = self.chat_text.render(written.messages, answer)
        tokens = self.chat_text.tokenize(chat, [self.order(c, variant) for c in clips] if runs is None else runs)
        ids = tokens.ids
        if len(ids) > self.max_length:
            raise RowError(
                "too_long",
                f"{len(ids)} tokens; the longest row is {self.max_length} and answers are never cut. "
                "Raise data.max_length (max_length of the processor), take a shorter clip, fewer frames or queries",
            )
        is_media = is_placeholder(ids, self.config.media_token_ids)
        row = row_of(sample, chat, tokens, list(clips), is_media, last_only=last_only, is_prompt=not answer)
        return replace(row, variant=variant, soft=Soft.of(self.content.mixtures(ids, written.words)))

    def _check(self, sample: Sample, answer: bool) -> None:
        if answer and not (sample.answer or "").strip():
            raise RowError("empty_answer", "the last turn is no answer or an empty one; training needs a text")
        for message in sample.messages:
            self.chat_text.check(message)

    # ---- batches --------------------------------------------------------------------------------------------------

    def collate(self, rows: list[Row], padding_side: str = "right", blanks: bool = False) -> Batch:
        """Rows -> Batch; ``blanks`` gives absent streams a masked unit, for training on several processes."""
        given = self.blanks() if blanks else None
        return collate(rows, int(self.tokenizer.pad_token_id), padding_side, given)

    def blanks(self) -> dict[str, EncoderInput]:
        """A black frame and a moment of silence, all masked: they let modules run without being data."""
        if not hasattr(self, "_blanks"):
            moment = {
                "video": lambda p: p(Frames(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), torch.zeros(1, 2)), 0.0),
                "audio": lambda p: p(Sound(torch.zeros(p.rate // 10), p.rate, 0.0), 0.1),
            }
            self._blanks = {s: moment[p.medium](p) for s, p in self.preprocessors.items()}
        return self._blanks

    def decode(self, ids: Tensor, durations: Sequence[float | None] | None = None) -> list[str]:
        """Turn generated ids ``(R, L)`` into answers, in which times are said in seconds.

        Args:
            ids: of the answers alone.
            durations: seconds of the clip that each answer is about (``Row.duration``). Without one, an answer keeps
                the words of the time codec.
        """
        texts = [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        if durations is None:
            return texts
        return [self.content.say_seconds(text, seconds) for text, seconds in zip(texts, durations, strict=True)]

    def describe(self, row: Row) -> dict[str, int]:
        """Tokens by stream and of text, for people."""
        names = {i: s for s, i in self.config.media_token_ids.items()}
        counts = Counter(names.get(int(i), "text") for i in row.input_ids)
        return dict(counts)


AutoProcessor.register(AVConfig, AVProcessor, exist_ok=True)
