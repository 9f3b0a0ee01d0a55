"""Where bfloat16 is worth it: on processors without instructions for it, it takes several times as long as float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from avllm.errors import UserError

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16"]
SETTINGS = ("auto", "fp32", "bf16")
CPU_FEATURES = ("amx_bf16", "avx512_bf16")


def has_fast_bfloat16(device_type: str) -> bool:
    """Whether a kind of device (``cpu``, ``cuda``, ...) multiplies bfloat16 in hardware."""
    import torch

    if device_type == "cpu":
        found = torch.cpu.get_capabilities()
        return any(found.get(name, False) for name in CPU_FEATURES)
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True


def choose_precision(setting: str, device_type: str) -> Precision:
    """What a setting means on a kind of device: ``auto`` is bf16 where the hardware has it, and fp32 elsewhere.

    Raises:
        UserError: an unknown setting.
    """
    if setting not in SETTINGS:
        raise UserError(f"precision is {setting!r}; expected one of {', '.join(map(repr, SETTINGS))}")
    if setting == "auto":
        return "bf16" if has_fast_bfloat16(device_type) else "fp32"
    return "bf16" if setting == "bf16" else "fp32"


def training_attention(device_type: str) -> Literal["sdpa", "eager"]:
    """Which attention trains a small transformer fastest.

    PyTorch's fused attention takes half the time of the plain one in float32 on CPUs; in bfloat16 its backward there
    takes several times as long.
    """
    return "eager" if device_type == "cpu" and has_fast_bfloat16(device_type) else "sdpa"


def product_dtype(device_type: str) -> torch.dtype:
    """The type for matrix products that need no more than eight bits: bfloat16 where it is fast, or float32."""
    import torch

    return torch.bfloat16 if has_fast_bfloat16(device_type) else torch.float32
