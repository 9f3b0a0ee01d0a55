"""Turn captions into chat rows, with the same few prompts for all sets, chosen by the row's id."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

PROMPTS = {
    "image": (
        "Describe this picture.",
        "What does the picture show?",
        "Give a short description of the picture.",
        "Put this picture into one sentence.",
        "What can be seen here?",
        "Write a caption for this picture.",
    ),
    "video": (
        "Describe this video.",
        "What happens in the video?",
        "Give a short description of the clip.",
        "Put this clip into one sentence.",
        "What can be seen in this video?",
        "Write a caption for this video.",
    ),
    "audio": (
        "Describe this sound.",
        "What can be heard?",
        "Give a short description of the recording.",
        "Put this recording into one sentence.",
        "What do you hear in this recording?",
        "Write a caption for this sound.",
    ),
    "audiovisual": (
        "Describe what can be seen and heard.",
        "What does the clip show, and what does it sound like?",
        "Give a short description of the clip's picture and sound.",
        "Put what you see and hear into one sentence.",
        "What do you see, and what do you hear?",
        "Write a caption for this video and its sound.",
    ),
    "label": (
        "What makes the sound?",
        "Which sound can be heard? Name it.",
        "Name the sound in this clip.",
        "What kind of sound is this?",
    ),
}
"""Prompts by what the caption describes.

``audiovisual`` is a video whose caption describes its sound too, ``label`` the class of a sound.
"""


def caption_prompt(about: str, key: str) -> str:
    """Return one of the prompts; a key has the same prompt in every run and on every machine."""
    return wording(PROMPTS[about], key)


def wording(wordings: Sequence[str], key: str) -> str:
    """Return one of several wordings; a key has the same one in every run and on every machine."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    return wordings[number % len(wordings)]


def caption_messages(
    media_part: dict[str, Any], caption: str, key: str | None, about: str | None = None
) -> list[dict[str, Any]]:
    """Return a request for a description, and the caption as its answer.

    Args:
        media_part: content part of a row: ``{"type": "video", "video": path, ...}``.
        caption: the answer.
        key: chooses the prompt; None takes the first one, so that an evaluation asks all clips
            alike.
        about: key of :data:`PROMPTS`; the part's type when None.
    """
    about = about or media_part["type"]
    prompt = PROMPTS[about][0] if key is None else caption_prompt(about, key)
    return [
        {"role": "user", "content": [media_part, {"type": "text", "text": prompt}]},
        {"role": "assistant", "content": [{"type": "text", "text": caption}]},
    ]


def caption_samples(
    sample_id: str,
    media_part: dict[str, Any],
    captions: Sequence[str],
    training: bool,
    about: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the samples of a clip with one or several captions.

    In training each caption is a separate row, with its own prompt. In evaluation there is one row,
    whose further captions are ``answers``.

    Args:
        sample_id: the id, to which a number is added where there are several rows.
        media_part: content part of the clip.
        captions: at least one.
        training: whether the rows are trained on.
        about: key of :data:`PROMPTS`; the part's type when None.
    """
    if not training:
        messages = caption_messages(media_part, captions[0], None, about)
        row: dict[str, Any] = {"id": sample_id, "messages": messages}
        if len(captions) > 1:
            row["answers"] = list(captions[1:])
        yield row
        return
    for number, caption in enumerate(captions):
        name = f"{sample_id}-{number}" if len(captions) > 1 else sample_id
        yield {"id": name, "messages": caption_messages(media_part, caption, name, about)}
