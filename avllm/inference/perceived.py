"""What the model really got of a media part: its frames as resized and cropped, its sound as the encoder takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avllm.data.media.load import Clip, Sound
from avllm.data.schema import MediaPart
from avllm.tokens import EncoderInput


@dataclass(frozen=True)
class Perceived:
    """One media part, as the encoders see and hear it.

    Attributes:
        part: which file and interval, as it was asked about.
        duration: seconds of the clip.
        frames: uint8 RGB ``(T, H, W, 3)``, or None when nothing is seen.
        span: ``(T, 2)`` seconds of the clip of each frame, or None.
        sound: the waveform at the encoder's rate, or None when nothing is heard.
        spectrogram: ``(mels, time)`` the encoder's own input bands without padding, or None when it takes the waveform.
        tokens: places that the part takes in the LLM's sequence, by stream.
    """

    part: MediaPart
    duration: float
    frames: Tensor | None
    span: Tensor | None
    sound: Sound | None
    spectrogram: Tensor | None
    tokens: dict[str, int]


def perceive(
    part: MediaPart,
    clip: Clip,
    inputs: Mapping[str, EncoderInput],
    preprocessors: Mapping[str, Any],
    order: list[str],
) -> Perceived:
    """Put together what went into the encoders.

    Args:
        part: the media part.
        clip: what was decoded of it.
        inputs: what its preprocessors made of that, by stream.
        preprocessors: the processor's, by stream.
        order: the stream of each of its tokens.
    """
    # of several streams of a medium the first is shown: it overwrites the others
    by_medium = {preprocessors[s].medium: s for s in sorted(inputs, reverse=True)}
    video, audio = by_medium.get("video"), by_medium.get("audio")
    frames = None if video is None else picture(inputs[video], preprocessors[video], clip)
    sound = spectrogram = None
    if audio is not None and clip.sound is not None:
        sound = clip.sound_at(preprocessors[audio].rate)
        spectrogram = bands(inputs[audio], preprocessors[audio], sound)
    return Perceived(
        part=part,
        duration=clip.duration,
        frames=frames,
        span=None if clip.frames is None or frames is None else clip.frames.span,
        sound=sound,
        spectrogram=spectrogram,
        tokens={stream: order.count(stream) for stream in sorted(set(order))},
    )


def picture(seen: EncoderInput, preprocessor: Any, clip: Clip) -> Tensor | None:
    """uint8 ``(T, H, W, 3)``: the encoder's pixels with the normalisation undone.

    A backbone that takes patches instead of pictures (SigLIP 2 at native resolution) gives the decoded frames.
    """
    pixels = seen.inputs.get("pixel_values")
    if pixels is None or pixels.dim() != 4 or not hasattr(preprocessor, "mean"):
        return None if clip.frames is None else clip.frames.x
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (preprocessor.mean, preprocessor.std))
    x = (pixels.float() * std + mean) / preprocessor.scale  # (T, 3, H, W)
    return x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)  # (T, H, W, 3)


def bands(heard: EncoderInput, preprocessor: Any, sound: Sound) -> Tensor | None:
    """``(mels, time)``: the windows' bands side by side, without what fills up a window."""
    mels = getattr(preprocessor, "mels", None)
    if mels is None:
        return None
    x = next(v for v in heard.inputs.values() if v.dim() >= 3 and mels in v.shape[-2:])  # (U, ..., mels|time, ...)
    x = x.reshape(len(x), -1, *x.shape[-2:])[:, 0].float()  # one view a unit
    x = x if x.shape[1] == mels else x.transpose(1, 2)  # (U, mels, time)
    hop = getattr(preprocessor, "hop", preprocessor.rate // 100)  # Kaldi's banks have no hop of their own: 10 ms
    each = min(x.shape[2], max(1, round(preprocessor.unit_samples / hop)))
    row = x[:, :, :each].transpose(0, 1).flatten(1)  # (mels, U * each)
    return row[:, : max(1, -(-len(sound.x) // hop))]
