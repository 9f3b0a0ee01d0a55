"""Map pictures of high dynamic range to the range and colours of sRGB, which encoders expect.

Values become light (ITU-R BT.2100), colours those of BT.709. Light up to half of reference white
(203 nits, ITU-R BT.2408) stays, and what is brighter is rolled off towards white, whose peak is
1,000 nits; all three colours of a pixel are scaled alike, so that its hue stays.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

PQ = 16
HLG = 18
HDR_TRANSFERS = {PQ: "PQ (SMPTE ST 2084)", HLG: "HLG (ARIB STD-B67)"}
"""Transfer functions of high dynamic range, as ITU-T H.273 numbers them."""
WHITE = 203.0  # nits of reference white
PEAK = 1_000.0  # nits of the brightest that an HLG display shows
KNEE = 0.5  # of reference white; what is brighter is rolled off
LEVELS = 1 << 16
# From the primaries of BT.2020 to those of BT.709.
TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
    np.float32,
)
LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)  # of BT.2020's red, green and blue


def is_high_dynamic_range(frame: VideoFrame) -> bool:
    """Return whether a frame's values are PQ or HLG."""
    return int(frame.color_trc) in HDR_TRANSFERS


def tone_mapped(frame: VideoFrame, transfer: int) -> list[np.ndarray]:
    """Return red, green and blue ``(H, W)`` uint8 of a ``gbrp16le`` frame.

    Args:
        frame: of BT.2020's colours.
        transfer: its transfer function, one of ``HDR_TRANSFERS``.
    """
    green, blue, red = (_values(frame, number) for number in range(3))
    light = _light(transfer)[np.stack([red, green, blue])]  # (3, H, W)
    if transfer == HLG:
        luminance = np.tensordot(LUMINANCE, light, 1)  # (H, W)
        light *= (PEAK / WHITE) * luminance**0.2
    light = np.tensordot(TO_BT709, light, 1).clip(0)
    brightest = light.max(0)  # (H, W)
    light *= _rolled_off(brightest) / brightest.clip(1e-6)
    index = (light * (LEVELS - 1) + 0.5).astype(np.uint16)
    return list(_srgb()[index])


def _values(frame: VideoFrame, plane: int) -> np.ndarray:
    """Return one plane, uint16 ``(H, W)``."""
    buffer: Any = frame.planes[plane]
    content = np.frombuffer(buffer, np.uint16)
    lines = content.reshape(-1, frame.planes[plane].line_size // 2)
    return lines[: frame.height, : frame.width]


def _rolled_off(light: np.ndarray) -> np.ndarray:
    """Return light from 0 to 1: unchanged up to the knee, from there on ever less."""
    above = 1 - np.exp(-(light - KNEE).clip(0) / (1 - KNEE))
    return np.minimum(light, KNEE) + (1 - KNEE) * above


@lru_cache(maxsize=2)
def _light(transfer: int) -> np.ndarray:
    """Return the light of each value of 16 bits, float32: of PQ as a share of reference white.

    Of HLG it is the scene's, from 0 to 1, which a display brightens by the pixel's luminance.
    """
    value = np.arange(LEVELS, dtype=np.float64) / (LEVELS - 1)
    if transfer == PQ:
        root = value ** (32 / 2523)
        light = np.maximum(root - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * root)
        return (light ** (16384 / 2610) * 10_000 / WHITE).astype(np.float32)
    low = value**2 / 3
    high = (np.exp((value - 0.55991073) / 0.17883277) + 0.28466892) / 12
    return np.where(value <= 0.5, low, high).astype(np.float32)


@lru_cache(maxsize=1)
def _srgb() -> np.ndarray:
    """Return the sRGB value of each of 65,536 steps of light, uint8."""
    light = np.arange(LEVELS, dtype=np.float64) / (LEVELS - 1)
    value = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (255 * value + 0.5).astype(np.uint8)
