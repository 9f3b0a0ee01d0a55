"""Show the encoders' view of a media part: frames as resized and cropped, sound as its bands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avllm.data.media.load import Clip, Sound
from avllm.data.schema import MediaPart
from avllm.models.rows.media_inputs import left_out
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
        spectrogram: ``(mels, time)`` the encoder's input bands without padding, or None when the
            encoder takes the waveform.
        tokens: number of the part's tokens in the LLM's sequence, by stream.
        warnings: tracks of the file that the model has no encoder for, each in words.
    """

    part: MediaPart
    duration: float
    frames: Tensor | None
    span: Tensor | None
    sound: Sound | None
    spectrogram: Tensor | None
    tokens: dict[str, int]
    warnings: tuple[str, ...] = ()

    @property
    def numbers(self) -> list[str]:
        """Return seconds, frames, sound and tokens in words."""
        numbers = []
        if self.duration:
            numbers.append(f"{self.duration:.2f} s")
        if self.frames is not None:
            count, height, width = self.frames.shape[:3]
            plural = "" if count == 1 else "s"
            numbers.append(f"{count} frame{plural} of {width} x {height}")
        if self.sound is not None:
            seconds = len(self.sound.x) / self.sound.rate
            numbers.append(f"{seconds:.2f} s of sound at {self.sound.rate / 1000:g} kHz")
        elif self.part.type == "video":
            numbers.append("no sound")
        return numbers + [f"{count} {stream} tokens" for stream, count in self.tokens.items()]


def perceive(
    part: MediaPart,
    clip: Clip,
    inputs: Mapping[str, EncoderInput],
    preprocessors: Mapping[str, Any],
    order: list[str],
) -> Perceived:
    """Collect the encoders' view of a media part.

    Args:
        part: the media part.
        clip: its decoded frames and sound.
        inputs: the encoders' inputs made of the clip, by stream.
        preprocessors: the processor's, by stream.
        order: the stream of each token of the part.
    """
    by_medium: dict[str, str] = {}  # of several streams of a medium, the first by name is shown
    for stream in sorted(inputs):
        by_medium.setdefault(preprocessors[stream].medium, stream)

    frames = span = None
    if "video" in by_medium:
        stream = by_medium["video"]
        frames = picture(inputs[stream], preprocessors[stream], clip)
    if frames is not None and clip.frames is not None:
        span = clip.frames.span

    sound = spectrogram = None
    if "audio" in by_medium and clip.sound is not None:
        stream = by_medium["audio"]
        sound = clip.sound_at(preprocessors[stream].rate)
        spectrogram = bands(inputs[stream], preprocessors[stream], sound)
    return Perceived(
        part=part,
        duration=clip.duration,
        frames=frames,
        span=span,
        sound=sound,
        spectrogram=spectrogram,
        tokens={stream: order.count(stream) for stream in sorted(set(order))},
        warnings=tuple(left_out([part], [clip])),
    )


def picture(video: EncoderInput, preprocessor: Any, clip: Clip) -> Tensor | None:
    """Return the encoder's pixels with the normalisation undone: uint8 ``(T, H, W, 3)``.

    Of a backbone that takes patches instead of pictures (SigLIP 2 at native resolution), return
    the decoded frames, or None when the clip has none.
    """
    pixels = video.inputs.get("pixel_values")
    if pixels is not None and pixels.dim() == 5 and clip.frames is not None:
        pixels = pixels.flatten(0, 1)[: len(clip.frames.x)]  # less the filling of the last unit
    if pixels is None or pixels.dim() != 4 or not hasattr(preprocessor, "mean"):
        return None if clip.frames is None else clip.frames.x
    mean = torch.tensor(preprocessor.mean).view(1, -1, 1, 1)  # (1, 3, 1, 1)
    std = torch.tensor(preprocessor.std).view(1, -1, 1, 1)  # (1, 3, 1, 1)
    x = (pixels.float() * std + mean) / preprocessor.scale  # (T, 3, H, W)
    return x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)  # (T, H, W, 3)


def bands(audio: EncoderInput, preprocessor: Any, sound: Sound) -> Tensor | None:
    """Return the windows' mel bands side by side, without the padding: ``(mels, time)``.

    None for an encoder that takes the waveform.
    """
    mels = getattr(preprocessor, "mels", None)
    if mels is None:
        return None
    x = _spectrogram_of(audio, mels)  # (U, ..., mels, time) or (U, ..., time, mels)
    x = x.reshape(len(x), -1, *x.shape[-2:])[:, 0].float()  # (U, ., .): one view a unit
    if x.shape[1] != mels:
        x = x.transpose(1, 2)  # (U, mels, time)

    hop = getattr(preprocessor, "hop", preprocessor.rate // 100)  # Kaldi's banks: 10 ms, unnamed
    steps = max(1, round(preprocessor.unit_samples / hop))  # of a unit without its padding
    joined = x[:, :, :steps].transpose(0, 1).flatten(1)  # (mels, U * steps)
    sound_steps = -(-len(sound.x) // hop)  # rounded up
    return joined[:, : max(1, sound_steps)]  # (mels, time)


def _spectrogram_of(audio: EncoderInput, mels: int) -> Tensor:
    """Return the input of an audio encoder that has mel bands as one of its last two sizes."""
    for x in audio.inputs.values():
        if x.dim() >= 3 and mels in x.shape[-2:]:
            return x
    raise ValueError(f"no input of the audio encoder has {mels} mel bands")
