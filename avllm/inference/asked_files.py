"""Turn the files of a question into media parts."""

from __future__ import annotations

import mimetypes
from collections.abc import Sequence
from pathlib import Path

from avllm.data.media.load import SOUND_MODES, MediaError, is_animation, is_picture, probe
from avllm.data.schema import AudioPart, ContentPart, ImagePart, MediaPart, Message, VideoPart
from avllm.data.store.storage import name_in_utf8
from avllm.errors import UserError

Files = str | Path | Sequence[str | Path] | None


def media_kind(path: str | Path) -> str:
    """Return ``video``, ``audio`` or ``image``, by the content of a file.

    Raises:
        MediaError: none of them, and the file's name does not end like a picture's.
    """
    if is_picture(path) and not is_animation(path):
        return "image"
    try:
        has_video = probe(path).has_video
    except MediaError:
        guess = mimetypes.guess_type(path)[0]
        if guess is not None and guess.startswith("image/"):
            return "image"  # its error is raised when it is read
        raise
    return "video" if has_video else "audio"


def media_parts(video: Files, audio: Files, image: Files, sound: str = "auto") -> list[MediaPart]:
    """Return files as media parts: videos first, then sounds, then pictures.

    Raises:
        UserError: ``sound`` is none of ``auto``, ``on``, ``off``.
    """
    check_sound(sound)
    videos = [VideoPart.model_validate({"video": path, "sound": sound}) for path in _paths(video)]
    sounds = [AudioPart.model_validate({"audio": path}) for path in _paths(audio)]
    pictures = [ImagePart.model_validate({"image": path}) for path in _paths(image)]
    return [*videos, *sounds, *pictures]


def check_sound(sound: str) -> None:
    """Refuse a word that says nothing about the videos' own sound.

    Raises:
        UserError: ``sound`` is none of ``auto``, ``on``, ``off``.
    """
    if sound not in SOUND_MODES:
        raise UserError(
            f"sound={sound!r}; expected one of {', '.join(SOUND_MODES)}", reason="sound"
        )


def with_sound(message: Message, sound: str) -> Message:
    """Return a message whose videos use their sound, or do not."""
    content: list[ContentPart] = []
    for part in message.content:
        if isinstance(part, VideoPart):
            part = part.model_copy(update={"sound": sound})
        content.append(part)
    return message.model_copy(update={"content": content})


def _paths(files: Files) -> list[str]:
    if files is None:
        return []
    paths = [files] if isinstance(files, str | Path) else files
    return [name_in_utf8(path) for path in paths]
