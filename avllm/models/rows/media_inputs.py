"""Check that a model has encoders for a row's media, and make blank inputs for absent streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from avllm.data.media.load import Clip, Frames, Sound
from avllm.data.schema import AudioPart, ImagePart, MediaPart, RowError
from avllm.tokens import EncoderInput


def check_encoders(parts: Sequence[MediaPart], sees: bool, hears: bool) -> None:
    """Refuse media parts for which the model has no encoder, before they are decoded.

    Args:
        parts: a row's media.
        sees: the model has a visual encoder.
        hears: the model has an audio encoder.

    Raises:
        RowError: ``no_encoder``.
    """
    for part in parts:
        if not isinstance(part, AudioPart) and part.regions and not sees:
            raise _no_encoder(part, "a picture with regions", "visual")
        if isinstance(part, ImagePart):
            if not sees:
                raise _no_encoder(part, "a picture", "visual")
        elif isinstance(part, AudioPart):
            if not hears:
                raise _no_encoder(part, "a sound", "audio")
        elif part.sound == "on" and not hears:
            raise _no_encoder(part, "a video whose sound is to be heard", "audio")


def check_decoded(parts: Sequence[MediaPart], clips: Sequence[Clip], strict: bool = False) -> None:
    """Refuse clips of which no encoder of the model takes in anything.

    Args:
        parts: a row's media.
        clips: decoded, in the same order.
        strict: refuse also those of which a track is left out.

    Raises:
        RowError: ``no_encoder``.
    """
    for part, clip in zip(parts, clips, strict=True):
        if clip.frames is None and clip.sound is None:
            raise _no_encoder(part, "a video without sound", "visual")
    warnings = left_out(parts, clips)
    if strict and warnings:
        raise RowError("no_encoder", warnings[0])


def left_out(parts: Sequence[MediaPart], clips: Sequence[Clip]) -> list[str]:
    """Name the tracks of a row's files that the model has no encoder for, each in words.

    Args:
        parts: the row's media.
        clips: decoded, in the same order.
    """
    warnings = []
    for part, clip in zip(parts, clips, strict=True):
        for medium in clip.unread:
            encoder = "visual" if medium == "video" else "audio"
            warnings.append(
                f"the {medium} of {Path(part.path).name} was left out: the model has no {encoder} "
                "encoder"
            )
    return list(dict.fromkeys(warnings))


def _no_encoder(part: MediaPart, medium: str, encoder: str) -> RowError:
    name = Path(part.path).name
    return RowError("no_encoder", f"{name} is {medium}, but the model has no {encoder} encoder")


def blank_inputs(preprocessors: Mapping[str, Any]) -> dict[str, EncoderInput]:
    """Return a black frame or a moment of silence for each stream."""
    inputs = {}
    for stream, preprocessor in preprocessors.items():
        if preprocessor.medium == "video":
            frame = Frames(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), torch.zeros(1, 2))
            inputs[stream] = preprocessor(frame, 0.0)
        else:
            rate = preprocessor.rate
            inputs[stream] = preprocessor(Sound(torch.zeros(rate // 10), rate, 0.0), 0.1)
    return inputs


def prepare_streams(clip: Clip, preprocessors: Mapping[str, Any]) -> dict[str, EncoderInput]:
    """Prepare a clip's frames and sound for each encoder; streams that it lacks are left out.

    Args:
        clip: the decoded clip.
        preprocessors: by stream.
    """
    inputs: dict[str, EncoderInput] = {}
    for stream, preprocessor in preprocessors.items():
        if preprocessor.medium == "video" and clip.frames is not None:
            inputs[stream] = preprocessor(clip.frames, clip.duration)
        if preprocessor.medium == "audio" and clip.sound is not None:
            inputs[stream] = preprocessor(clip.sound_at(preprocessor.rate), clip.duration)
    return inputs
