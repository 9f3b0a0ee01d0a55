"""Change a clip's sound in training.

The change depends on the clip and on (seed, place in the run) alone. So a resumed run hears what an
uninterrupted run hears, with any number of workers.
"""

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
    from avllm.config_data import AugmentConfig


class Augment:
    """Change clips in training; validation, evaluation and inference never apply it.

    Args:
        settings: which changes, and how strong.
        seed: of the run.
    """

    def __init__(self, settings: AugmentConfig, seed: int) -> None:
        self.settings = settings
        self.seed = seed

    def __call__(
        self,
        clip: Clip,
        place: int,
        part: int = 0,
        other: Callable[[float], Sound | None] | None = None,
    ) -> Clip:
        """Change a clip.

        Args:
            clip: what was decoded.
            place: of the item in the run's endless sequence: the same item is changed in another
                way when it comes again.
            part: number of the media part within its row.
            other: gives a training sound for a number from 0 to 1, None where there is none; for
                ``background``.

        Returns:
            a new clip. The sound of a clip with pictures only changes in loudness: ``roll`` and
            ``speed`` would move it away from the picture.
        """
        if clip.sound is None or clip.sound.x.numel() == 0:
            return clip
        rng = np.random.default_rng([self.seed, 3, place, part])
        settings = self.settings
        duration = clip.duration
        # All numbers are drawn for all settings, so that one setting has no effect on another.
        turn = float(rng.random())
        pitch = float(rng.uniform(-1, 1))
        loud = float(rng.uniform(-1, 1))
        joined, which, start, softer = (float(n) for n in rng.random(4))
        x = clip.sound.x
        background: Sound | None = None
        if other is not None and joined < settings.background:
            background = other(which)
        if background is not None:
            low, high = settings.background_db
            x = mix(x, background.x, start, low + (high - low) * softer)
        if clip.frames is None:
            if settings.speed:
                # Never longer than before: a moment more could take another window of the encoder.
                x = change_speed(x, 2.0 ** (pitch * settings.speed))[: x.shape[0]]
                duration *= x.shape[0] / clip.sound.x.shape[0]
            if settings.roll:
                x = torch.roll(x, int(turn * x.shape[0]))
        x = x * 10.0 ** (loud * settings.gain / 20.0)
        x = mute_bands(x, clip.sound.rate, settings.bands, settings.band_share, rng)
        x = silence(x, clip.sound.rate, settings.silences, settings.silence_seconds, rng)
        # Other rates are resampled from the changed sound.
        sound = Sound(x, clip.sound.rate, clip.sound.start)
        return replace(clip, sound=sound, more_sounds=(), duration=duration)


def mix(
    x: torch.Tensor,
    background: torch.Tensor,
    start: float,
    decibels: float,
) -> torch.Tensor:
    """Add a background to ``x (S,)``, ``decibels`` softer on average.

    The background is rolled by a share of its length and cut to S; a shorter one ends in silence.
    """
    rolled = torch.roll(background, int(start * background.shape[0]))[: x.shape[0]]
    padded = pad(rolled, (0, x.shape[0] - rolled.shape[0]))
    level = x.square().mean().sqrt() / padded.square().mean().sqrt().clamp(min=1e-7)
    return x + padded * level * 10.0 ** (-decibels / 20.0)


def change_speed(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Play ``x (S,)`` ``factor`` times as fast, as a tape does: ``(S / factor,)``."""
    samples = max(1, round(x.shape[0] / factor))
    return interpolate(x[None, None], size=samples, mode="linear", align_corners=False)[0, 0]


def mute_bands(
    x: torch.Tensor,
    rate: int,
    count: int,
    share: float,
    rng: np.random.Generator,
) -> torch.Tensor:
    """Soften ``count`` bands of ``x (S,)`` by 30 dB, each up to ``share`` of the mel scale wide.

    This is SpecAugment (arXiv 1904.08779) on the sound itself, so that it serves every encoder.
    """
    if not count:
        return x
    size = next_fast_len(x.shape[0], real=True)  # a prime number would take ten times as long
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
    """Return the position of each spectrum bin on the mel scale, 0 to 1: ``(bins,)``, rising."""
    mels = 2595.0 * torch.log10(1.0 + torch.linspace(0, rate / 2, bins) / 700.0)
    return mels / mels[-1]


def silence(
    x: torch.Tensor,
    rate: int,
    count: int,
    seconds: float,
    rng: np.random.Generator,
) -> torch.Tensor:
    """Silence ``count`` stretches of up to ``seconds`` each, at most a quarter of ``x (S,)``."""
    x = x.clone() if count else x
    for _ in range(count):
        most = min(seconds, x.shape[0] / rate / 4)
        width = math.floor(rng.random() * most * rate)
        first = int(rng.integers(0, x.shape[0] - width + 1))
        x[first : first + width] = 0.0
    return x
