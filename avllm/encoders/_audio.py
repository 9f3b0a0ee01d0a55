"""Cut sound into windows that cover all of it, and compute the features that audio backbones read.

One rule serves every family. A unit (one window) gives ``steps`` time steps of
``unit_samples / steps`` samples each. Unit u begins at sample ``u * unit_samples``, so the steps of
all units follow each other without a gap. A backbone whose last step looks beyond its window (its
patch or convolution is wider than its stride) gets those samples too (``reach``): otherwise they
would be heard by neither window. Steps that begin after the sound's end are cut off.
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

from avllm.encoders.base import MOST_TOKENS, check_count, check_values, part_name
from avllm.tokens import EncoderInput

MOST_SAMPLES = 2**26  # of a window, an hour at 16 kHz
MOST = {
    "rate": 1_000_000,
    "tokens": MOST_TOKENS,
    "mels": 4_096,
    "n_fft": 65_536,
    "segments": 4_096,
}
"""The most of each count of a preprocessor that is not one of samples, steps or frames."""


@dataclass(frozen=True)
class SoundPreprocessor:
    """Cut sound into windows and make the backbone's inputs; families implement :meth:`prepare`.

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

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int) and not isinstance(value, bool):
                check_count(name, value, MOST.get(name, MOST_SAMPLES))
        check_count("steps", self.steps, self.unit_samples)
        check_count("the samples of a window", self.reach, MOST_SAMPLES)

    @property
    def reach(self) -> int:
        """Samples that one window is given; at least ``unit_samples``."""
        return self.unit_samples

    def __call__(self, media: Any, duration: float) -> EncoderInput:
        """Return the units of a sound.

        Args:
            media: ``x`` float32 ``(samples,)``, its ``rate``, and ``start`` in seconds of the clip.
            duration: of the clip; not read.

        Raises:
            ValueError: another rate or shape.
        """
        self._check(media)
        samples = media.x.shape[0]
        count = -(-samples * self.steps // self.unit_samples)  # steps that begin before the end
        windows = -(-samples // self.unit_samples)
        by_name: dict[str, list[Tensor]] = {}
        for first in range(0, samples, self.unit_samples):
            unit = self.prepare(media.x[first : first + self.reach])
            if first == 0:
                values = sum(x.numel() for x in unit.values())
                check_values(windows * values, f"{windows} windows of sound")
            for name, x in unit.items():
                by_name.setdefault(name, []).append(x)
        inputs = {name: torch.stack(units) for name, units in by_name.items()}
        mask = torch.ones(count, self.tokens, dtype=torch.bool)
        return EncoderInput(inputs, self.spans(count, samples, media.start), mask)

    def prepare(self, x: Tensor) -> dict[str, Tensor]:
        """Return the backbone's inputs of one unit, by name.

        Args:
            x: the window's samples ``(n,)``, at least one and at most ``reach``.
        """
        raise NotImplementedError(f"{type(self).__name__}.prepare")

    def spans(self, count: int, samples: int, start: float) -> Tensor:
        """Return ``(T, 2)`` seconds of the clip; the last step ends where the sound ends."""
        seconds = self.unit_samples / self.steps / self.rate  # of a step
        edges = torch.arange(count + 1, dtype=torch.float64) * seconds
        edges[-1] = samples / self.rate
        edges = (edges + start).float()
        return torch.stack([edges[:-1], edges[1:]], 1)

    def _check(self, media: Any) -> None:
        if media.rate != self.rate:
            raise ValueError(
                f"the sound has {media.rate} samples a second; expected {self.rate}: "
                f"load it at rate={self.rate}"
            )
        if media.x.dim() != 1 or media.x.shape[0] == 0:
            raise ValueError(
                f"the sound has shape {tuple(media.x.shape)}; expected (S,), at least one sample"
            )

    def settings(self) -> dict[str, Any]:
        """Return every field, JSON-able, and the class that reads them."""
        return {"part": part_name(self), **asdict(self)}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        """Build a preprocessor again from its :meth:`settings`."""
        return cls(**{name: value for name, value in settings.items() if name != "part"})


def window_steps(window: float | None, rate: int, step: int, most: int, name: str) -> int:
    """Return how many whole steps a window has.

    Args:
        window: in seconds; None means ``most`` steps.
        rate: samples a second.
        step: samples of a step.
        most: steps that the backbone takes at once.
        name: of the family, for the message.

    Raises:
        ValueError: the window is longer than what the backbone takes, or shorter than a step.
    """
    if window is None:
        return most
    steps = int(window * rate / step + 1e-6)
    # One step more than ``most`` passes: the 10.24 s of AST end within the patch of its last step.
    if not 1 <= steps <= most + 1 or window <= 0:
        raise ValueError(
            f"{name}: window={window} s; "
            f"expected from {step / rate:g} to {most * step / rate:g} s, "
            "the most that the backbone takes at once"
        )
    return min(steps, most)


@dataclass(frozen=True)
class MelPreprocessor(SoundPreprocessor):
    """Compute Whisper's log-mel spectrogram (Radford et al. 2022), as its feature extractor does.

    Attributes:
        mels: mel bands.
        frames: mel frames of a unit (3,000 for every released model); silence fills it up.
        hop, n_fft: samples.
    """

    mels: int = 80
    frames: int = 3000
    hop: int = 160
    n_fft: int = 400

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("the samples of all frames", self.frames * self.hop, MOST_SAMPLES)

    def prepare(self, x: Tensor) -> dict[str, Tensor]:
        """Return ``input_features`` (mels, frames) of a window's samples."""
        x = pad(x, (0, self.frames * self.hop - x.shape[0]))
        power = power_spectrum(x, self.n_fft, self.hop)[:, :-1]  # (n_fft / 2 + 1, frames)
        filters = mel_filters(self.n_fft, self.mels, 0.0, 8000.0, self.rate, slaney=True)
        log = (filters.T @ power).clamp(min=1e-10).log10()  # (mels, frames)
        log = torch.maximum(log, log.max() - 8.0)
        return {"input_features": (log + 4.0) / 4.0}


@dataclass(frozen=True)
class FbankPreprocessor(SoundPreprocessor):
    """Compute AST's Kaldi filter banks (Gong et al. 2021) as ``ASTFeatureExtractor`` does.

    Attributes:
        mels: mel bands.
        frames: frames of 10 ms that the backbone takes.
        used: frames of them that carry sound; the rest is zero.
        mean, std: of the training set.
        normalise: turn values into ``(x - mean) / (2 std)``.
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
        """Return ``input_values`` (frames, mels) of a window's samples."""
        x = pad(x, (0, max(0, self.rate // 40 - x.shape[0])))  # Kaldi needs a whole frame of 25 ms
        bank = torchaudio.compliance.kaldi.fbank(
            x[None], sample_frequency=self.rate, window_type="hanning", num_mel_bins=self.mels
        )
        bank = pad(bank[: self.frames], (0, 0, 0, max(0, self.frames - bank.shape[0])))
        if self.normalise:
            bank = (bank - self.mean) / (2 * self.std)
        return {"input_values": bank}


@dataclass(frozen=True)
class ClapPreprocessor(SoundPreprocessor):
    """Compute CLAP's mel spectrogram in decibels (Wu et al. 2022) as ``ClapFeatureExtractor`` does.

    Attributes:
        samples: length up to which a window is filled.
        padding: by what: ``repeatpad`` (the whole sound again, then silence), ``repeat`` or ``pad``
            (silence).
        mels, hop, n_fft, low, high: of the spectrogram; low and high in Hz.
        fusion: the checkpoint mixes four views of a long sound. A window is never long, so the same
            view is given four times.
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
        """Return ``input_features`` (1 or 4, frames, mels) and ``is_longer`` (1,)."""
        whole_times = self.samples // x.shape[0]
        if self.padding == "repeat":
            x = x.repeat(whole_times + 1)[: self.samples]
        elif self.padding != "pad":
            x = x.repeat(whole_times)[: self.samples]
        # In double precision: decibels near silence need more digits than float32 has.
        x = pad(x, (0, self.samples - x.shape[0])).double()
        slaney = not self.fusion
        filters = mel_filters(self.n_fft, self.mels, self.low, self.high, self.rate, slaney=slaney)
        mel = power_spectrum(x, self.n_fft, self.hop).T @ filters.double()  # (frames, mels)
        decibels = 10 * mel.clamp(min=1e-10).log10().float()
        views = 4 if self.fusion else 1
        return {
            "input_features": decibels.expand(views, -1, -1).contiguous(),
            "is_longer": torch.tensor([False]),
        }


@dataclass(frozen=True)
class WaveformPreprocessor(SoundPreprocessor):
    """Pass on the waveform itself, for wav2vec 2.0 and HuBERT.

    Attributes:
        receptive: samples that one step sees, more than its stride.
        normalise: zero mean and unit variance over the window's samples.
        attention_mask: hide the padding of a short window; checkpoints that were trained without a
            mask need plain zeros instead.
    """

    receptive: int = 400
    normalise: bool = True
    attention_mask: bool = False

    @property
    def reach(self) -> int:
        """Samples up to the last one that the last step sees."""
        return self.unit_samples + self.receptive - self.unit_samples // self.steps

    def prepare(self, x: Tensor) -> dict[str, Tensor]:
        """Return ``input_values`` (reach,), and ``attention_mask`` (reach,) if asked for."""
        stride = self.unit_samples // self.steps
        real_steps = min(-(-x.shape[0] // stride), self.steps)  # those that begin before the end
        if self.normalise:
            x = (x - x.mean()) / torch.sqrt(x.var(correction=0) + 1e-7)
        inputs = {"input_values": pad(x, (0, self.reach - x.shape[0]))}
        if self.attention_mask:
            # The backbone takes a step for padding if it sees any padding, so the mask goes up to
            # the last sample that the last real step sees.
            seen = (real_steps - 1) * stride + self.receptive
            inputs["attention_mask"] = (torch.arange(self.reach) < seen).long()
        return inputs


def power_spectrum(x: Tensor, n_fft: int, hop: int) -> Tensor:
    """Return power (n_fft / 2 + 1, S / hop + 1) of samples (S,): Hann window, centred frames."""
    window = hann_window(n_fft, x.dtype)
    spectrum = torch.view_as_real(torch.stft(x, n_fft, hop, window=window, return_complex=True))
    squares = spectrum * spectrum
    # abs() would take a root first, which takes longer than the transform.
    return squares[..., 0] + squares[..., 1]


@functools.lru_cache(maxsize=8)
def hann_window(samples: int, dtype: torch.dtype) -> Tensor:
    """Return a Hann window (samples,), remembered: making it takes as long as a transform."""
    return torch.hann_window(samples, dtype=dtype)


@functools.lru_cache(maxsize=8)
def mel_filters(n_fft: int, mels: int, low: float, high: float, rate: int, slaney: bool) -> Tensor:
    """Return triangular filters ``(n_fft / 2 + 1, mels)``, remembered.

    Args:
        low, high: Hz. rate: samples a second.
        slaney: Slaney's mel scale and area normalisation; otherwise HTK's scale without one.
    """
    make: Callable[..., Tensor] = torchaudio.functional.melscale_fbanks
    bins = n_fft // 2 + 1
    if slaney:
        return make(bins, low, high, mels, rate, norm="slaney", mel_scale="slaney")
    return make(bins, low, high, mels, rate, norm=None, mel_scale="htk")
