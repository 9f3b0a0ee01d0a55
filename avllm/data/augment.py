"""Changes to a clip's sound in training: a function of the clip and of (seed, place in the run) alone, so a resumed run
hears what the straight run heard, whatever the number of workers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.fft import next_fast_len
from torch.nn.functional import interpolate, pad

from avllm.data.media.load import Clip, Sound

if TYPE_CHECKING:
    from avllm.config import AugmentConfig


class Augment:
    """Clip -> changed clip. Never applied in validation, evaluation or inference.

    Args:
        settings: which changes, and how strong.
        seed: of the run.
    """

    def __init__(self, settings: AugmentConfig, seed: int) -> None:
        self.settings, self.seed = settings, seed

    def __call__(
        self, clip: Clip, place: int, part: int = 0, other: Callable[[float], Sound | None] | None = None
    ) -> Clip:
        """Change a clip.

        Args:
            clip: what was decoded.
            place: of the item in the run's endless sequence: the same item is changed otherwise when it comes again.
            part: number of the media part within its row.
            other: gives a training sound for a number from 0 to 1, None where there is none; for ``background``.

        Returns:
            a new clip. Beside pictures only the loudness changes: ``roll`` and ``speed`` would move the sound away
            from what is seen.
        """
        if clip.sound is None or clip.sound.x.numel() == 0:
            return clip
        rng = np.random.default_rng([self.seed, 3, place, part])
        settings, duration = self.settings, clip.duration
        # every number is drawn whatever is switched on: one setting does not change what another does
        turn, pitch, loud = float(rng.random()), float(rng.uniform(-1, 1)), float(rng.uniform(-1, 1))
        joined, which, start, softer = (float(n) for n in rng.random(4))
        behind = other(which) if other is not None and joined < settings.background else None
        low, high = settings.background_db
        x = clip.sound.x if behind is None else mix(clip.sound.x, behind.x, start, low + (high - low) * softer)
        if clip.frames is None:
            if settings.speed:
                # cut where it ended before: a longer clip could need one more window of the encoder for a moment's rest
                x = change_speed(x, 2.0 ** (pitch * settings.speed))[: x.shape[0]]
                duration *= x.shape[0] / clip.sound.x.shape[0]
            if settings.roll:
                x = torch.roll(x, int(turn * x.shape[0]))
        x = x * 10.0 ** (loud * settings.gain / 20.0)
        x = mute_bands(x, clip.sound.rate, settings.bands, settings.band_share, rng)
        x = silence(x, clip.sound.rate, settings.silences, settings.silence_seconds, rng)
        sound = Sound(x, clip.sound.rate, clip.sound.start)
        return replace(clip, sound=sound, more_sounds=(), duration=duration)  # other rates follow from it


def mix(x: torch.Tensor, behind: torch.Tensor, start: float, decibels: float) -> torch.Tensor:
    """``x (S,)`` with another sound behind it, ``decibels`` softer on the whole; it is rolled by a share of its length,
    cut, or silent after its end."""
    behind = torch.roll(behind, int(start * behind.shape[0]))[: x.shape[0]]
    behind = pad(behind, (0, x.shape[0] - behind.shape[0]))
    level = x.square().mean().sqrt() / behind.square().mean().sqrt().clamp(min=1e-7)
    return x + behind * level * 10.0 ** (-decibels / 20.0)


def change_speed(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Play ``x (S,)`` ``factor`` times as fast, as a tape does: shorter and higher, ``(S / factor,)``."""
    samples = max(1, round(x.shape[0] / factor))
    return interpolate(x[None, None], size=samples, mode="linear", align_corners=False)[0, 0]


def mute_bands(x: torch.Tensor, rate: int, count: int, share: float, rng: np.random.Generator) -> torch.Tensor:
    """Soften ``count`` bands of ``x (S,)`` by 30 dB, each up to ``share`` of the mel scale wide: SpecAugment (arXiv
    1904.08779) on the sound itself, so that every encoder can be trained with it."""
    if not count:
        return x
    size = next_fast_len(x.shape[0], real=True)  # a prime number of samples would take ten times as long
    spectrum = torch.fft.rfft(x, n=size)
    place = mel_places(spectrum.shape[0], rate)
    for _ in range(count):
        width = rng.random() * share
        low = rng.random() * (1 - width)
        first, end = torch.searchsorted(place, torch.tensor([low, low + width])).tolist()
        spectrum[first:end] *= 10**-1.5
    return torch.fft.irfft(spectrum, n=size)[: x.shape[0]]


@functools.lru_cache(maxsize=8)
def mel_places(bins: int, rate: int) -> torch.Tensor:
    """Where each of a spectrum's bins lies on the mel scale, 0 to 1: ``(bins,)``, rising."""
    mels = 2595.0 * torch.log10(1.0 + torch.linspace(0, rate / 2, bins) / 700.0)
    return mels / mels[-1]


def silence(x: torch.Tensor, rate: int, count: int, seconds: float, rng: np.random.Generator) -> torch.Tensor:
    """Put silence over ``count`` stretches of up to ``seconds`` each, none longer than a quarter of ``x (S,)``."""
    x = x.clone() if count else x
    for _ in range(count):
        most = min(seconds, x.shape[0] / rate / 4)
        width = math.floor(rng.random() * most * rate)
        first = int(rng.integers(0, x.shape[0] - width + 1))
        x[first : first + width] = 0.0
    return x
