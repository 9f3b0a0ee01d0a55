"""Sound: cutting it into windows that cover all of it, and the features that the audio backbones were trained on.

One rule serves every family. A unit (one window) yields ``steps`` time steps of ``unit_samples / steps`` samples each;
unit u begins at sample ``u * unit_samples``, so the steps of all units stand in one unbroken row. A backbone whose last
step looks beyond its window (a patch or a convolution wider than its stride) gets those samples too (``reach``), so
that no sample is lost between two windows. Steps that lie wholly behind the sound's end are cut off.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
import torchaudio
from torch import Tensor
from torch.nn.functional import pad

from avllm.encoders.base import part_name
from avllm.tokens import EncoderInput


@dataclass(frozen=True)
class SoundPreprocessor:
    """Sound -> windows -> the backbone's inputs; families implement :meth:`prepare`.

    Attributes:
        rate: samples a second that the sound must have.
        unit_samples: samples from the start of one window to the start of the next.
        steps: S, time steps of a window.
        tokens: P, tokens of a step.
    """

    rate: int
    unit_samples: int
    steps: int
    tokens: int
    medium: ClassVar[str] = "audio"

    @property
    def reach(self) -> int:
        """Samples that one window is given; at least ``unit_samples``."""
        return self.unit_samples

    def __call__(self, media: Any, duration: float) -> EncoderInput:
        """Sound ``x`` float32 (S,), ``rate`` and ``start`` (seconds of the clip) -> the units of that sound."""
        self._check(media)
        samples = media.x.shape[0]
        count = -(-samples * self.steps // self.unit_samples)  # steps that begin before the sound's end
        starts = range(0, samples, self.unit_samples)
        units = [self.prepare(media.x[i : i + self.reach]) for i in starts]
        inputs = {key: torch.stack([unit[key] for unit in units]) for key in units[0]}
        mask = torch.ones(count, self.tokens, dtype=torch.bool)
        return EncoderInput(inputs, self.spans(count, samples, media.start), mask)

    def prepare(self, x: Tensor) -> dict[str, Tensor]:
        """One window's samples, at most ``reach`` and at least one -> the backbone's inputs of one unit."""
        raise NotImplementedError(f"{type(self).__name__}.prepare")

    def spans(self, count: int, samples: int, start: float) -> Tensor:
        """``(T, 2)`` seconds of the clip; the last step ends where the sound ends."""
        edges = torch.arange(count + 1, dtype=torch.float64) * (self.unit_samples / self.steps / self.rate)
        edges[-1] = samples / self.rate
        edges = (edges + start).float()
        return torch.stack([edges[:-1], edges[1:]], 1)

    def _check(self, media: Any) -> None:
        if media.rate != self.rate:
            raise ValueError(
                f"the sound has {media.rate} samples a second; expected {self.rate}: load it at rate={self.rate}"
            )
        if media.x.dim() != 1 or media.x.shape[0] == 0:
            raise ValueError(f"the sound has shape {tuple(media.x.shape)}; expected (S,) with at least one sample")

    def settings(self) -> dict[str, Any]:
        """Every field, JSON-able, and the class that reads them."""
        return {"part": part_name(self), **asdict(self)}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        """The inverse of :meth:`settings`."""
        return cls(**{k: v for k, v in settings.items() if k != "part"})


def window_steps(window: float | None, rate: int, step: int, most: int, name: str) -> int:
    """How many whole steps of ``step`` samples a window of so many seconds has; None means ``most``.

    Raises:
        ValueError: the window is longer than what the backbone takes at once, or shorter than a step.
    """
    if window is None:
        return most
    steps = int(window * rate / step + 1e-6)
    if not 1 <= steps <= most + 1 or window <= 0:  # one more: 10.24 s of AST end within its last step's patch
        raise ValueError(
            f"{name}: window={window} s; expected from {step / rate:g} to {most * step / rate:g} s, "
            "the most that the backbone takes at once"
        )
    return min(steps, most)


@dataclass(frozen=True)
class MelPreprocessor(SoundPreprocessor):
    """Whisper's log-mel spectrogram (Radford et al. 2022), as ``WhisperFeatureExtractor`` makes it.

    Attributes:
        mels: mel bands. frames: mel frames of a unit (3,000 for every released model), reached by padding with silence.
        hop, n_fft: samples.
    """

    mels: int = 80
    frames: int = 3000
    hop: int = 160
    n_fft: int = 400

    def prepare(self, x: Tensor) -> dict[str, Tensor]:
        """Samples -> ``input_features`` (mels, frames)."""
        x = pad(x, (0, self.frames * self.hop - x.shape[0]))
        power = power_spectrum(x, self.n_fft, self.hop)[:, :-1]  # (n_fft / 2 + 1, frames)
        log = (
            (mel_filters(self.n_fft, self.mels, 0.0, 8000.0, self.rate, slaney=True).T @ power).clamp(min=1e-10).log10()
        )
        log = torch.maximum(log, log.max() - 8.0)
        return {"input_features": (log + 4.0) / 4.0}


@dataclass(frozen=True)
class FbankPreprocessor(SoundPreprocessor):
    """AST's Kaldi filter banks (Gong et al. 2021), as ``ASTFeatureExtractor`` makes them.

    Attributes:
        mels: mel bands. frames: frames of 10 ms that the backbone wants. used: frames of them that carry sound.
        mean, std: of the training set; values become ``(x - mean) / (2 std)``. normalise: whether they do.
    """

    mels: int = 128
    frames: int = 1024
    used: int = 1024
    mean: float = -4.2677393
    std: float = 4.5689974
    normalise: bool = True

    @property
    def reach(self) -> int:
        """Samples of the ``used`` frames."""
        return (self.used - 1) * self.rate // 100 + self.rate // 40

    def prepare(self, x: Tensor) -> dict[str, Tensor]:
        """Samples -> ``input_values`` (frames, mels)."""
        x = pad(x, (0, max(0, self.rate // 40 - x.shape[0])))  # Kaldi wants one whole frame of 25 ms
        bank = torchaudio.compliance.kaldi.fbank(
            x[None], sample_frequency=self.rate, window_type="hanning", num_mel_bins=self.mels
        )
        bank = pad(bank[: self.frames], (0, 0, 0, max(0, self.frames - bank.shape[0])))
        return {"input_values": (bank - self.mean) / (2 * self.std) if self.normalise else bank}


@dataclass(frozen=True)
class ClapPreprocessor(SoundPreprocessor):
    """CLAP's mel spectrogram in decibels (Wu et al. 2022), as ``ClapFeatureExtractor`` makes it for one window.

    Attributes:
        samples: what a window is filled up to.
        padding: how: ``repeatpad`` (repeat whole, then silence), ``repeat`` or ``pad``.
        mels, hop, n_fft, low, high: of the spectrogram; low and high in Hz.
        fusion: the checkpoint mixes four views of long sound; a window is never long, so one view stands four times.
    """

    samples: int = 480_000
    mels: int = 64
    hop: int = 480
    n_fft: int = 1024
    low: float = 50.0
    high: float = 14_000.0
    padding: str = "repeatpad"
    fusion: bool = False

    def prepare(self, x: Tensor) -> dict[str, Tensor]:
        """Samples -> ``input_features`` (1 or 4, frames, mels) and ``is_longer`` (1,)."""
        times = self.samples // x.shape[0]
        if self.padding != "pad":
            x = x.repeat(times + (self.padding == "repeat"))[: self.samples]
        x = pad(x, (0, self.samples - x.shape[0])).double()  # decibels near silence need more than float32
        filters = mel_filters(self.n_fft, self.mels, self.low, self.high, self.rate, slaney=not self.fusion)
        mel = power_spectrum(x, self.n_fft, self.hop).T @ filters.double()  # (frames, mels)
        mel = 10 * mel.clamp(min=1e-10).log10().float()
        return {
            "input_features": mel.expand(4 if self.fusion else 1, -1, -1).contiguous(),
            "is_longer": torch.tensor([False]),
        }


@dataclass(frozen=True)
class WaveformPreprocessor(SoundPreprocessor):
    """The waveform itself, for wav2vec 2.0 and HuBERT.

    Attributes:
        receptive: samples that one step sees, more than its stride.
        normalise: zero mean and unit variance over the window's own samples.
        attention_mask: hide the padding of a short window; checkpoints trained without it want plain zeros.
    """

    receptive: int = 400
    normalise: bool = True
    attention_mask: bool = False

    @property
    def reach(self) -> int:
        """Up to the end of what the last step sees."""
        return self.unit_samples + self.receptive - self.unit_samples // self.steps

    def prepare(self, x: Tensor) -> dict[str, Tensor]:
        """Samples -> ``input_values`` (reach,), and ``attention_mask`` (reach,) where it is wanted."""
        stride = self.unit_samples // self.steps
        real = min(-(-x.shape[0] // stride), self.steps)  # steps that begin before the end
        if self.normalise:
            x = (x - x.mean()) / torch.sqrt(x.var(correction=0) + 1e-7)
        inputs = {"input_values": pad(x, (0, self.reach - x.shape[0]))}
        if self.attention_mask:
            # the backbone counts a step as real only if all that it sees is: say so up to the last step's end
            seen = (real - 1) * stride + self.receptive
            inputs["attention_mask"] = (torch.arange(self.reach) < seen).long()
        return inputs


def power_spectrum(x: Tensor, n_fft: int, hop: int) -> Tensor:
    """Samples (S,) -> power (n_fft / 2 + 1, S / hop + 1); Hann window, centred frames."""
    spectrum = torch.view_as_real(torch.stft(x, n_fft, hop, window=hann_window(n_fft, x.dtype), return_complex=True))
    squares = spectrum * spectrum
    return squares[..., 0] + squares[..., 1]  # abs() would take a root first, which takes longer than the transform


@functools.lru_cache(maxsize=8)
def hann_window(samples: int, dtype: torch.dtype) -> Tensor:
    """(samples,); to make it takes as long as a transform."""
    return torch.hann_window(samples, dtype=dtype)


@functools.lru_cache(maxsize=8)
def mel_filters(n_fft: int, mels: int, low: float, high: float, rate: int, slaney: bool) -> Tensor:
    """(n_fft / 2 + 1, mels) triangular filters: Slaney's scale and area normalisation, or HTK's scale without."""
    make: Callable[..., Tensor] = torchaudio.functional.melscale_fbanks
    if slaney:
        return make(n_fft // 2 + 1, low, high, mels, rate, norm="slaney", mel_scale="slaney")
    return make(n_fft // 2 + 1, low, high, mels, rate, norm=None, mel_scale="htk")
