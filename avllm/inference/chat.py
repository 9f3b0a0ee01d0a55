"""Hold a conversation about media: history in, streamed text out.

The command line, the demo and the Python API use it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from avllm.data.cache.fill import encode
from avllm.data.reading import MediaReader, Prepared
from avllm.data.schema import MediaPart, Message, Sample, TextPart, TimePart
from avllm.data.store.storage import check_utf8
from avllm.errors import UserError
from avllm.inference.asked_files import Files, check_sound, media_parts, with_sound
from avllm.inference.file_state import FileState
from avllm.inference.generation import Generation
from avllm.inference.perceived import Perceived, perceive
from avllm.inference.stream import stream_text
from avllm.tokens import duration_of

if TYPE_CHECKING:
    from avllm.models.modeling_avllm import AVLLM
    from avllm.models.processing_avllm import AVProcessor

KEEP_MB = 512.0
"""Decoded clips that a chat keeps whose frames are chosen by the question."""


@dataclass
class _Media:
    """A media part of the chat: prepared and, after the first question, encoded.

    The decoded clip is not kept: of a film in 4K it is a thousand times as large.
    """

    perceived: Perceived
    inputs: Prepared
    file_state: FileState | None
    features: Prepared | None = None

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        tensors: list[Tensor | None] = [self.perceived.frames, self.perceived.spectrogram]
        if self.perceived.sound is not None:
            tensors.append(self.perceived.sound.x)
        for prepared in [self.inputs, self.features or {}]:
            for stream in prepared.values():
                tensors += [*stream.inputs.values(), *(stream.features or {}).values()]
        return sum(x.numel() * x.element_size() for x in tensors if x is not None)


class Chat:
    """One conversation with a model.

    Args:
        model: in eval mode, on the device where it is to run.
        processor: the one that was saved with it.

    Attributes:
        messages: the turns so far. A turn is added when its answer is complete or was stopped, not
            when it failed.
        warnings: about the last answer, in words: tracks of the chat's files that the model cannot
            use, and thoughts that did not end in an answer.
    """

    def __init__(self, model: AVLLM, processor: AVProcessor) -> None:
        self.model = model
        self.processor = processor
        self.messages: list[Message] = []
        self.warnings: list[str] = []
        self._stop = Event()
        # Where the question selects the frames, each question needs the decoded clip.
        self._reader = MediaReader(processor, keep_mb=KEEP_MB if processor.reads_question else 0)
        self._media: dict[MediaPart, _Media] = {}

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        device: str = "cpu",
        allow_parts: Collection[str] = (),
        strict: bool = False,
        **options: Any,
    ) -> Chat:
        """Load a checkpoint folder.

        Args:
            checkpoint: the folder of a trained model.
            device: ``cpu``, ``cuda``, ``cuda:1``, ...
            allow_parts: parts from outside of the package that the checkpoint may name,
                each ``pkg.module:Class``.
            strict: refuse files that the model can use in part only, such as a video that it only
                hears; else :attr:`warnings` names what was left out.
            options: ``dtype``, ``quantize`` (``4bit`` or ``8bit``), ``backbones``: see
                :func:`avllm.models.checkpoint.load_model`.

        Raises:
            CheckpointError: the folder is no checkpoint, or does not fit its backbones.
            ForeignPartError: it names a part that is not allowed.
            UserError: this machine has no such device.
        """
        from avllm.models.modeling_avllm import AVLLM
        from avllm.models.processing_avllm import AVProcessor

        check_device(device)
        model = AVLLM.from_pretrained(
            str(checkpoint), device=device, allow_parts=allow_parts, **options
        )
        processor = AVProcessor.from_pretrained(checkpoint, allow_parts=allow_parts)
        processor.strict = strict
        return cls(model, processor)

    def ask(
        self,
        question: str | Sequence[Message | dict[str, Any]],
        *,
        video: Files = None,
        audio: Files = None,
        image: Files = None,
        sound: str = "auto",
        **generation: Any,
    ) -> Iterator[str]:
        """Ask the next question: read its media at once, return the answer as it is generated.

        Args:
            question: the text of the next turn, or all messages of a chat (Sample form), which
                replace the history.
            video, audio, image: files that the question is about, in front of it.
            sound: whether the videos' own sound is used: ``auto``, ``on`` or ``off``.
            generation: ``max_new_tokens``, ``temperature`` (0 = greedy, the default), ``top_p``,
                ``decoding``.

        Returns:
            Pieces of the answer. Closing the iterator, or :meth:`stop` from another thread, ends
            it early.

        Raises:
            MediaError: a file that cannot be read.
            RowError: no encoder for it, or more tokens than fit.
            UserError: a setting out of range, or no question.
        """
        settings = Generation.of(generation)
        parts = media_parts(video, audio, image, sound)
        if isinstance(question, str):
            if not question.strip():
                raise UserError("the question is empty; expected some text", reason="empty")
            check_utf8(question, "the question")
            turn = Message(role="user", content=[*parts, TextPart(text=question)])
            messages = [*self.messages, turn]
        elif parts:
            raise UserError(
                "media were given beside whole messages; put them into the messages as parts",
                reason="media_beside_messages",
            )
        else:
            messages = [Message.model_validate(message) for message in question]
        batch = self._batch(messages)
        self.warnings = []
        for perceived in self.perceived:
            self.warnings += perceived.warnings
        return self._answer(messages, batch, settings)

    def _batch(self, messages: list[Message]) -> Any:
        """Return the batch of one prompt; forget media that the messages no longer hold."""
        sample = Sample.model_validate({"id": "chat", "messages": messages}).question()
        self._read(sample.media, sample.last_question)
        self._media = {part: self._media[part] for part in sample.media}
        self._reader.forget(but=sample.media)
        row = self.processor.row(sample, self._encoded(sample.media), answer=False)
        return self.processor.collate([row], padding_side="left").to(self.model.device)

    def _read(self, parts: Sequence[MediaPart], question: str = "") -> None:
        """Read and prepare new media, or all media where the question selects the frames."""
        states = {part: FileState.of(part) for part in parts}
        changed = [
            part
            for part, state in states.items()
            if part in self._media and self._media[part].file_state != state
        ]
        if changed:
            self._reader.forget(but=[part for part in self._media if part not in changed])
        unread = list(states)
        if not self.processor.reads_question:
            unread = [part for part in states if part not in self._media or part in changed]
        for part, clip in zip(unread, self._reader.clips(unread, None), strict=True):
            inputs = self.processor.prepare(clip, question)
            order = self.processor.order(inputs)
            view = perceive(part, clip, inputs, self.processor.preprocessors, order)
            self._media[part] = _Media(view, inputs, states[part])

    def _encoded(self, parts: Sequence[MediaPart]) -> list[Prepared]:
        """Return the encoders' features of media; each clip is encoded once for all questions."""
        unencoded = [
            media for part, media in self._media.items() if part in parts and media.features is None
        ]
        inputs = [media.inputs for media in unencoded]
        with torch.no_grad():
            features = encode(inputs, self.model.encoders, self.model.device)
        for media, streams in zip(unencoded, features, strict=True):
            media.features = streams
        return [self._media[part].features or {} for part in parts]

    def _answer(self, messages: list[Message], batch: Any, generation: Generation) -> Iterator[str]:
        """Yield the pieces of the answer, then add the turn to the history."""
        stop = Event()
        self._stop = stop
        arguments = generation.arguments(self.model, self.processor)
        tokenizer = self.processor.tokenizer
        duration = self._duration(messages)
        content = self.processor.content
        generated = ""  # with the LLM's thoughts
        written = ""  # the answer with its times as the LLM writes them

        def decode(ids: list[int], whole: bool) -> str:
            nonlocal generated, written
            generated = str(tokenizer.decode(ids, skip_special_tokens=True))
            written = self.processor.answer_text(generated, whole)
            return content.say_seconds(written, duration, whole)

        pieces: list[str] = []
        try:
            for piece in stream_text(self.model.generate, decode, stop, batch=batch, **arguments):
                pieces.append(piece)
                yield piece
        except GeneratorExit:  # the reader closed the iterator: the turn is the text that it got
            self._remember(stop, messages, [TextPart(text="".join(pieces))])
            raise
        if stop is self._stop:
            self.warnings += self.processor.chat_text.warnings_about(generated)
        self._remember(stop, messages, content.read(written, duration))

    def _duration(self, messages: list[Message]) -> float | None:
        """Return the seconds of the last clip, which an answer's times are about."""
        media = Sample.model_validate({"id": "chat", "messages": messages}).media
        if not media:
            return None
        return duration_of(self._media[media[-1]].inputs)

    def _remember(
        self, stop: Event, messages: list[Message], answer: Sequence[TextPart | TimePart]
    ) -> None:
        """Add an answer to its messages, unless the chat was cleared or asked something else."""
        if stop is not self._stop:
            return
        history = list(messages)
        if history[-1].role != "user":
            del history[-1]
        turn = Message(role="assistant", content=list(answer))
        self.messages = [*history, turn]

    def look(
        self, *, video: Files = None, audio: Files = None, image: Files = None, sound: str = "auto"
    ) -> list[Perceived]:
        """Read media before a question, and return the encoders' view of them.

        The next question about the same media does not read them again.

        Raises:
            MediaError: a file that cannot be read. RowError: no encoder for it.
        """
        parts = media_parts(video, audio, image, sound)
        self._read(parts)
        asked = {part for message in self.messages for part in message.content}
        for part in list(self._media):  # files that were looked at and never asked about
            if part not in asked and part not in parts:
                del self._media[part]
        return [self._media[part].perceived for part in parts]

    def use_sound(self, sound: str) -> None:
        """Set whether the videos' own sound is used, in all turns, from the next question on.

        Args:
            sound: ``auto``, ``on`` or ``off``.

        Raises:
            UserError: ``sound`` is none of the three.
        """
        check_sound(sound)
        self.messages = [with_sound(message, sound) for message in self.messages]

    def stop(self) -> None:
        """End the answer that is being generated, from any thread; its text so far is the turn."""
        self._stop.set()

    def holds(self, path: str | Path) -> bool:
        """Return whether a turn holds the file."""
        for message in self.messages:
            if any(getattr(part, "path", None) == str(path) for part in message.content):
                return True
        return False

    @property
    def media_bytes(self) -> int:
        """Bytes of memory that the chat's media take."""
        return sum(media.size for media in list(self._media.values()))

    def release_media(self) -> None:
        """Free the memory of the chat's media; the next question reads their files again."""
        self._media = {}
        self._reader.forget()

    def clear(self) -> None:
        """Forget all turns and media."""
        self.stop()
        self._stop = Event()
        self.messages = []
        self._media = {}
        self._reader.forget()

    @property
    def perceived(self) -> list[Perceived]:
        """The encoders' view of the chat's media, in their order, from :meth:`ask` on."""
        return [media.perceived for media in self._media.values()]


def check_device(device: str) -> None:
    """Check that this machine has a device, before anything is loaded.

    Raises:
        UserError: torch has no such kind of device, or this machine has none.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UserError(
            f"device {device!r} is none that torch has; expected cpu, cuda, cuda:1, ...",
            reason="device",
        ) from error
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    usable = ["cpu"]
    if accelerator is not None:
        usable.append(accelerator.type)
    if kind not in usable:
        raise UserError(
            f"device {device!r} is not usable here; this machine has {' and '.join(usable)}",
            reason="device",
        )
