"""A conversation about media: history in, streamed text out. The terminal, the demo and the Python API stand on it."""

from __future__ import annotations

import math
import mimetypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import torch

from avllm.data.cache.fill import encode
from avllm.data.media.load import SOUND_MODES, Clip, MediaError, is_picture, probe
from avllm.data.reading import MediaReader, Prepared
from avllm.data.schema import AudioPart, ContentPart, ImagePart, MediaPart, Message, Sample, TextPart, VideoPart
from avllm.errors import UserError
from avllm.inference.generation import Generation
from avllm.inference.perceived import Perceived, perceive
from avllm.inference.stream import stream_text
from avllm.tokens import duration_of

if TYPE_CHECKING:
    from avllm.models.modeling_avllm import AVLLM
    from avllm.models.processing_avllm import AVProcessor

Files = str | Path | Sequence[str | Path] | None


@dataclass
class _Media:
    """A media part of the chat: decoded, prepared, and once it was asked about, encoded."""

    clip: Clip
    inputs: Prepared
    features: Prepared | None = None


class Chat:
    """One conversation with a model.

    Args:
        model: in eval mode, on its device.
        processor: the one that was saved with it.

    Attributes:
        messages: the turns so far. A turn is added when its answer is complete or was stopped, not when it failed.
    """

    def __init__(self, model: AVLLM, processor: AVProcessor) -> None:
        self.model, self.processor = model, processor
        self.messages: list[Message] = []
        self._stop = Event()
        self._reader = MediaReader(processor, keep_mb=math.inf)
        self._media: dict[MediaPart, _Media] = {}

    @classmethod
    def load(cls, checkpoint: str | Path, device: str = "cpu", **options: Any) -> Chat:
        """Read a checkpoint folder.

        Args:
            checkpoint: the folder of a trained model.
            device: ``cpu``, ``cuda``, ``cuda:1``, ...
            options: ``dtype``, ``quantize`` (``4bit`` or ``8bit``), ``backbones``: see
                :func:`avllm.models.checkpoint.load_model`.

        Raises:
            CheckpointError: the folder is no checkpoint, or does not fit its backbones.
            ValueError: no such device here.
        """
        from avllm.models.modeling_avllm import AVLLM
        from avllm.models.processing_avllm import AVProcessor

        check_device(device)
        model = AVLLM.from_pretrained(str(checkpoint), device=device, **options)
        return cls(model, AVProcessor.from_pretrained(checkpoint))

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
        """Ask the next question; the media are read before this returns, the answer comes as it is generated.

        Args:
            question: the text of the next turn, or all messages of a chat (Sample form), which replace the history.
            video, audio, image: files that the question is about, in front of it.
            sound: whether the videos' own sound is used: ``auto``, ``on`` or ``off``.
            generation: ``max_new_tokens``, ``temperature`` (0 = greedy, the default), ``top_p``, ``decoding``.

        Returns:
            Pieces of the answer. Closing the iterator, or :meth:`stop` from elsewhere, ends it early.

        Raises:
            MediaError: a file that cannot be read. RowError: no encoder for it, or more tokens than fit.
            ValueError: a setting out of range, or no question.
        """
        settings = Generation(**generation)
        parts = media_parts(video, audio, image, sound)
        if isinstance(question, str):
            if not question.strip():
                raise UserError("the question is empty; expected some text")
            turn = Message(role="user", content=[*parts, TextPart(text=question)])
            messages = [*self.messages, turn]
        elif parts:
            raise UserError("media were given beside whole messages; put them into the messages as parts")
        else:
            messages = [Message.model_validate(m) for m in question]
        return self._answer(messages, self._batch(messages), settings)

    def _batch(self, messages: list[Message]) -> Any:
        sample = Sample.model_validate({"id": "chat", "messages": messages}).question()
        self._read(sample.media, sample.last_question)
        self._media = {part: self._media[part] for part in sample.media}  # what the chat is about no more is forgotten
        self._reader.forget(but=sample.media)
        row = self.processor.row(sample, self._encoded(sample.media), answer=False)
        return self.processor.collate([row], padding_side="left").to(self.model.device)

    def _read(self, parts: Sequence[MediaPart], question: str = "") -> None:
        """Read and prepare the media that are new, or all where frames are chosen by the question."""
        again = self.processor.reads_question
        new = [part for part in dict.fromkeys(parts) if again or part not in self._media]
        for part, clip in zip(new, self._reader.clips(new, None), strict=True):
            self._media[part] = _Media(clip, self.processor.prepare(clip, question))

    def _encoded(self, parts: Sequence[MediaPart]) -> list[Prepared]:
        """Return the encoders' features of media; a clip passes them once, however often it is asked about."""
        new = [media for part, media in self._media.items() if part in parts and media.features is None]
        with torch.no_grad():
            features = encode([media.inputs for media in new], self.model.encoders, self.model.device)
        for media, streams in zip(new, features, strict=True):
            media.features = streams
        return [self._media[part].features or {} for part in parts]

    def _answer(self, messages: list[Message], batch: Any, generation: Generation) -> Iterator[str]:
        self._stop = stop = Event()
        arguments = generation.arguments(self.model, self.processor)
        tokenizer = self.processor.tokenizer
        duration = self._duration(messages)

        def decode(ids: list[int], whole: bool) -> str:
            text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
            return self.processor.content.say_seconds(text, duration, whole)

        said: list[str] = []
        try:
            for piece in stream_text(self.model.generate, decode, stop, batch=batch, **arguments):
                said.append(piece)
                yield piece
        except GeneratorExit:  # the reader has gone: what it got is the turn
            self._remember(stop, messages, said)
            raise
        self._remember(stop, messages, said)

    def _duration(self, messages: list[Message]) -> float | None:
        """Return the seconds of the last clip, which an answer's times are about."""
        media = Sample.model_validate({"id": "chat", "messages": messages}).media
        return duration_of(self._media[media[-1]].inputs) if media else None

    def _remember(self, stop: Event, messages: list[Message], said: list[str]) -> None:
        if stop is not self._stop:  # the chat was cleared, or asked something else, meanwhile
            return
        asked = messages if messages[-1].role == "user" else messages[:-1]
        self.messages = [*asked, Message(role="assistant", content=[TextPart(text="".join(said))])]

    def look(
        self, *, video: Files = None, audio: Files = None, image: Files = None, sound: str = "auto"
    ) -> list[Perceived]:
        """Read media without asking yet: what the model would get of them. A question about them reads them no more.

        Raises:
            MediaError: a file that cannot be read. RowError: no encoder for it.
        """
        parts = media_parts(video, audio, image, sound)
        self._read(parts)
        return self._perceive(parts)

    def use_sound(self, sound: str) -> None:
        """Use the videos' own sound (``auto``, ``on``) or not (``off``) from the next question on, in all turns.

        Raises:
            ValueError: ``sound`` is none of the three.
        """
        _check_sound(sound)
        self.messages = [
            m.model_copy(update={"content": [_with_sound(part, sound) for part in m.content]}) for m in self.messages
        ]

    def stop(self) -> None:
        """End the answer that is being generated, from any thread; what was said so far becomes the turn."""
        self._stop.set()

    def clear(self) -> None:
        """Forget all turns and media."""
        self.stop()
        self.messages, self._media, self._stop = [], {}, Event()
        self._reader.forget()

    @property
    def perceived(self) -> list[Perceived]:
        """What the model really got of the chat's media, in their order; there as soon as :meth:`ask` has returned."""
        return self._perceive(list(self._media))

    def _perceive(self, parts: Sequence[MediaPart]) -> list[Perceived]:
        preprocessors, order = self.processor.preprocessors, self.processor.order
        perceived = []
        for part in parts:
            media = self._media[part]
            perceived.append(perceive(part, media.clip, media.inputs, preprocessors, order(media.inputs)))
        return perceived


def check_device(device: str) -> None:
    """Whether this machine has a device, before anything is loaded.

    Raises:
        ValueError: torch knows no such device, or there is none here.
    """
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UserError(f"device {device!r} is none that torch knows; expected cpu, cuda, cuda:1, ...") from error
    here = torch.accelerator.current_accelerator(check_available=True)
    if kind != "cpu" and (here is None or kind != here.type):
        raise UserError(f"device {device!r} is not usable here; this machine has cpu{f' and {here}' if here else ''}")


def media_kind(path: str | Path) -> str:
    """``video``, ``audio`` or ``image``, by what is in the file.

    Raises:
        MediaError: none of them, and its name does not say that it should be a picture.
    """
    if is_picture(path):
        return "image"
    try:
        return "video" if probe(path).has_video else "audio"
    except MediaError:
        if (mimetypes.guess_type(path)[0] or "").startswith("image/"):
            return "image"  # reading it will say what is wrong with it
        raise


def media_parts(video: Files, audio: Files, image: Files, sound: str = "auto") -> list[MediaPart]:
    """Files -> media parts, videos first, then sounds, then pictures.

    Raises:
        ValueError: ``sound`` is none of ``auto``, ``on``, ``off``.
    """
    _check_sound(sound)
    videos = [VideoPart.model_validate({"video": str(f), "sound": sound}) for f in _files(video)]
    sounds = [AudioPart.model_validate({"audio": str(f)}) for f in _files(audio)]
    return [*videos, *sounds, *(ImagePart(image=str(f)) for f in _files(image))]


def _check_sound(sound: str) -> None:
    if sound not in SOUND_MODES:
        raise UserError(f"sound={sound!r}; expected one of {', '.join(SOUND_MODES)}")


def _with_sound(part: ContentPart, sound: str) -> ContentPart:
    return part.model_copy(update={"sound": sound}) if isinstance(part, VideoPart) else part


def _files(given: Files) -> list[str | Path]:
    if given is None:
        return []
    return [given] if isinstance(given, str | Path) else list(given)
