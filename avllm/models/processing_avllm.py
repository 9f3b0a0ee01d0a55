"""From a sample to token ids, labels and prepared media: one processor for training, chat, batch, API and evaluation.

It holds the tokenizer with its chat template, the encoders' preprocessors, a connector without weights (to count
tokens) and the layout, and nothing heavy: loader workers carry it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase

from avllm.config import ModelConfig
from avllm.data.collate import IGNORE, Batch, Row, collate
from avllm.data.media import Clip, Frames, Sampling, Sound
from avllm.data.media_part import load_parts
from avllm.data.schema import AudioPart, ImagePart, MediaPart, Message, RowError, Sample, TextPart
from avllm.encoders.base import preprocessor_from_settings
from avllm.errors import UserError, loading
from avllm.layouts.base import Layout
from avllm.models.configuration_avllm import AVConfig
from avllm.models.connector import Connector, stream_names
from avllm.registry import build
from avllm.tokens import EncoderInput, Grid

FILE = "avllm_processor.json"
MOST_ORDERS = 512  # orders of clips that a processor remembers
MARK = "\u0001"  # stands for a media part while the chat template is rendered; no text holds this control character
MOST_PIECES = 4096  # texts and chats whose form is remembered
DEFAULT_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n' }}"
    "{% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] + '\n' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


class AVProcessor:
    """Samples in, rows and batches out.

    Args:
        tokenizer: the LLM's, with a placeholder token for each stream.
        preprocessors: by stream.
        config: what the model is made of.
        widths: width of each stream that the encoders give.
        llm_dim: width of the LLM's embeddings.

    Raises:
        ValueError: a text around media does not hold ``{media}`` once.

    Attributes:
        max_length: longest row in tokens.
        timeout: seconds after which decoding one file is given up.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        preprocessors: dict[str, Any],
        config: AVConfig,
        widths: dict[str, int],
        llm_dim: int,
    ) -> None:
        self.tokenizer, self.preprocessors, self.config = tokenizer, preprocessors, config
        self.widths, self.llm_dim = widths, llm_dim
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
        self.sampling = Sampling(**config.sampling)
        self._encoded: dict[str, list[int]] = {}
        self._chats: dict[tuple[Any, ...], tuple[str, list[tuple[int, int]]]] = {}
        self._orders: dict[tuple[Any, ...], list[str]] = {}
        self.max_length = 2048
        self.timeout = 60.0
        if tokenizer.chat_template is None:
            tokenizer.chat_template = DEFAULT_TEMPLATE
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

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
        widths = {
            name: encoder.out_dims[layer]
            for s, encoder in encoders.items()
            for layer, name in zip(encoder.layer_names, stream_names(s, encoder.layer_names), strict=True)
        }
        return cls(tokenizer, preprocessors, config, widths, llm_dim)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer and ``avllm_processor.json``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        state = {
            "preprocessors": {s: p.settings() for s, p in self.preprocessors.items()},
            "widths": self.widths,
            "llm_dim": self.llm_dim,
            "max_length": self.max_length,
            "timeout": self.timeout,
        }
        (folder / FILE).write_text(json.dumps(state, indent=2), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **auto: Any) -> AVProcessor:
        """Read what :meth:`save_pretrained` wrote, beside the model's config.json.

        Args:
            folder: a checkpoint.
            auto: what ``AutoProcessor`` hands on by itself; nothing else is accepted.

        Raises:
            FileNotFoundError: the folder holds no processor. TypeError: an option that would do nothing.
        """
        if set(auto) - {"_from_auto", "trust_remote_code", "revision"}:
            raise TypeError(f"AVProcessor.from_pretrained takes a folder only, not {sorted(auto)}")
        folder = Path(folder)
        if not (folder / FILE).is_file():
            raise FileNotFoundError(f"{folder} has no {FILE}; expected an avllm checkpoint folder")
        state = json.loads((folder / FILE).read_text(encoding="utf-8"))
        preprocessors = {s: preprocessor_from_settings(v) for s, v in state["preprocessors"].items()}
        config, tokenizer = AVConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        processor = cls(tokenizer, preprocessors, config, state["widths"], state["llm_dim"])
        processor.max_length, processor.timeout = state["max_length"], state["timeout"]
        return processor

    # ---- media ----------------------------------------------------------------------------------------------------

    def load_clips(self, parts: Sequence[MediaPart], root: Path | None) -> list[Clip]:
        """Decode media parts (of a row) as this model's encoders need them, each interval of a file once.

        Raises:
            MediaError: a file that cannot be decoded. RowError: media that the model has no encoder for.
        """
        audio = self.preprocessors.get("audio")
        sees = "video" in self.preprocessors
        for part in parts:
            if isinstance(part, ImagePart):
                self._needs(sees, "picture", "visual")
            elif isinstance(part, AudioPart):
                self._needs(audio is not None, "sound", "audio")
            elif part.sound == "on":
                self._needs(audio is not None, "video whose sound is to be heard", "audio")
        sampling, rate = self.sampling if sees else None, None if audio is None else audio.rate
        return load_parts(parts, root, sampling=sampling, rate=rate, timeout=self.timeout)

    def load_clip(self, part: MediaPart, root: Path | None) -> Clip:
        """Decode one media part."""
        return self.load_clips([part], root)[0]

    @staticmethod
    def _needs(there: bool, what: str, encoder: str) -> None:
        if not there:
            raise RowError("no_encoder", f"it holds a {what}, but the model has no {encoder} encoder")

    def prepare(self, clip: Clip) -> dict[str, EncoderInput]:
        """Each stream of a clip as its encoder takes it; an absent stream is absent here too."""
        found = {}
        if clip.frames is not None and "video" in self.preprocessors:
            found["video"] = self.preprocessors["video"](clip.frames, clip.duration)
        if clip.sound is not None and "audio" in self.preprocessors:
            found["audio"] = self.preprocessors["audio"](clip.sound, clip.duration)
        return found

    def order(self, clip: dict[str, EncoderInput]) -> list[str]:
        """The streams' names in the order of the LLM's sequence, one a token: the run that the clip becomes."""
        # in the order of the model's streams, not of the clip's: features out of a cache make the same row
        grids: dict[str, Grid] = {n: clip[n.split(".")[0]].grid for n in self.widths if n.split(".")[0] in clip}
        if not grids:
            return []
        # clocks and masks alone decide it, and many questions ask about one clip
        key = tuple((n, g.mask.shape, g.span.numpy().tobytes(), g.mask.numpy().tobytes()) for n, g in grids.items())
        if key not in self._orders:
            if len(self._orders) >= MOST_ORDERS:
                self._orders.clear()
            self._orders[key] = self.layout.order(self.connector.output_grid(grids))
        return self._orders[key]

    # ---- text -----------------------------------------------------------------------------------------------------

    def row(
        self,
        sample: Sample,
        clips: Sequence[dict[str, EncoderInput]],
        answer: bool = True,
        runs: Sequence[list[str]] | None = None,
    ) -> Row:
        """Token ids with the media runs in place, and labels on the assistant's turns only.

        Args:
            sample: the messages.
            clips: :meth:`prepare`'s result for each media part, in order.
            answer: True for training; False ends the row where the last answer begins.
            runs: :meth:`order` of each clip, where it is already known from another row about the same clips.

        Raises:
            RowError: an empty answer, reserved text, more media than parts, or a row longer than ``max_length``.
        """
        if len(clips) != len(sample.media):
            raise RowError("media_count", f"{len(sample.media)} media parts but {len(clips)} clips were given")
        self._check(sample, answer)
        messages = sample.messages if answer else sample.question().messages
        text, trained = self._rendered(messages, answer)
        ids, labels = self._tokenise(text, trained, [self.order(c) for c in clips] if runs is None else runs)
        if len(ids) > self.max_length:
            raise RowError(
                "too_long",
                f"{len(ids)} tokens; the longest row is {self.max_length} and answers are never cut. "
                "Raise data.max_length, or use fewer frames or queries",
            )
        media = torch.isin(ids, torch.tensor(list(self.config.media_token_ids.values())))
        targets = [m.text for m in messages if m.role == "assistant"]
        return Row(sample.id, ids, labels, list(clips), media, sample.source, sample.kind, targets=targets)

    def _check(self, sample: Sample, answer: bool) -> None:
        if answer and not (sample.answer or "").strip():
            raise RowError("empty_answer", "the last turn is no answer or an empty one; training needs a text")
        for message in sample.messages:
            for token in [MARK, *(f"<|{s}|>" for s in self.config.media_token_ids)]:
                if token in message.text:
                    raise RowError("reserved_text", f"the text holds {token!r}, which stands for media tokens")

    def _rendered(self, messages: list[Message], answer: bool) -> tuple[str, list[tuple[int, int]]]:
        """:meth:`_render` of the chat with a mark for each media part; the same few chats come back row after row."""
        plain = [(m.role, self._flatten(m)) for m in messages]
        if self.config.system and plain[0][0] != "system":
            plain.insert(0, ("system", self.config.system))
        key = (answer, *plain)
        if key not in self._chats:
            if len(self._chats) >= MOST_PIECES:
                self._chats.clear()
            self._chats[key] = self._render([{"role": r, "content": c} for r, c in plain], answer)
        return self._chats[key]

    def _render(self, plain: list[dict[str, str]], answer: bool) -> tuple[str, list[tuple[int, int]]]:
        """The chat as text, and the character ranges of the assistant's turns."""
        whole = self._template(plain, generation=not answer)
        ranges = []
        for place, message in enumerate(plain):
            if message["role"] != "assistant":
                continue
            before, after = self._template(plain[:place], True), self._template(plain[: place + 1], False)
            end = min(len(after), len(whole))
            if not whole.startswith(after.rstrip()):  # Qwen3 drops the empty thoughts of earlier turns
                turn = message["content"] + after.rpartition(message["content"])[2]
                end = len(before) + len(turn) if whole.startswith(turn, len(before)) else -1
            if end < 0 or not whole.startswith(before):
                raise RowError(
                    "chat_template",
                    f"the chat template rewrites turn {place} when more turns follow; use one that only appends",
                )
            ranges.append((len(before), end))
        return whole, ranges

    def _template(self, messages: list[dict[str, str]], generation: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        except TemplateError as error:
            raise RowError(
                "chat_template", f"the LLM's chat template refuses roles {[m['role'] for m in messages]}: {error}"
            ) from error
        return str(text)

    def _flatten(self, message: Message) -> str:
        pieces = []
        for part in message.content:
            around = "{media}" if isinstance(part, TextPart) else self.config.media_text.get(part.type, "{media}")
            pieces.append(part.text if isinstance(part, TextPart) else around.replace("{media}", MARK))
        return "".join(pieces)

    def _tokenise(self, text: str, trained: list[tuple[int, int]], runs: Sequence[list[str]]) -> tuple[Tensor, Tensor]:
        """Tokenise between the borders of media and answers, so that a prompt is exactly the beginning of its row."""
        marks = [i for i, c in enumerate(text) if c == MARK]
        cuts = sorted({0, len(text), *marks, *(m + 1 for m in marks), *(c for r in trained for c in r)})
        spans = [(a, b) for a, b in pairwise(cuts) if b > a]
        plain = [text[a:b] for a, b in spans if text[a] != MARK]
        encoded = iter(self._encode(plain))
        pending, media = iter(runs), self.config.media_token_ids  # looked up once: a config's attributes are slow
        ids: list[int] = []
        labels: list[int] = []
        for a, _ in spans:
            is_run = text[a] == MARK
            piece = [media[name] for name in next(pending)] if is_run else next(encoded)
            on = not is_run and any(low <= a < high for low, high in trained)
            ids += piece
            labels += piece if on else [IGNORE] * len(piece)
        return torch.tensor(ids, dtype=torch.long), torch.tensor(labels, dtype=torch.long)

    def _encode(self, pieces: list[str]) -> list[list[int]]:
        """Token ids of pieces of text; the same few (turn markers, questions) come back row after row."""
        new = [p for p in dict.fromkeys(pieces) if p not in self._encoded]
        if len(self._encoded) + len(new) > MOST_PIECES:
            self._encoded, new = {}, list(dict.fromkeys(pieces))
        if new:
            self._encoded |= zip(new, self.tokenizer(new, add_special_tokens=False)["input_ids"], strict=True)
        return [self._encoded[p] for p in pieces]

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
            self._blanks = {s: moment[s](p) for s, p in self.preprocessors.items()}
        return self._blanks

    def decode(self, ids: Tensor) -> list[str]:
        """Generated ids ``(R, L)`` -> answers."""
        return [t.strip() for t in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def describe(self, row: Row) -> dict[str, int]:
        """Tokens by stream and of text, for people."""
        names = {i: s for s, i in self.config.media_token_ids.items()}
        counts = Counter(names.get(int(i), "text") for i in row.input_ids)
        return dict(counts)


AutoProcessor.register(AVConfig, AVProcessor, exist_ok=True)


def load_tokenizer(description: ModelConfig) -> tuple[PreTrainedTokenizerBase, dict[str, int]]:
    """The LLM's tokenizer with a placeholder for each stream, and the placeholders' ids.

    The ids may lie behind the LLM's vocabulary: they are replaced by media before anything is embedded.
    """
    with loading("the LLM's tokenizer", description.llm.name):
        tokenizer = AutoTokenizer.from_pretrained(description.llm.name, revision=description.llm.revision)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {description.llm.name!r} has no end-of-sequence token; answers could not end"
        )
    # An adapter that makes a stream of its own names it in its option `to`.
    made = [spec["to"] for spec in description.connector if "to" in spec and "." not in spec["to"]]
    names = [*description.encoders, *made]
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{n}|>" for n in names]})
    return tokenizer, {n: cast(int, tokenizer.convert_tokens_to_ids(f"<|{n}|>")) for n in names}
