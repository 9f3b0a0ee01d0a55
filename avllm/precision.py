"""Choose bfloat16 or float32 by the hardware.

On processors without instructions for bfloat16 it takes several times as long as float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from avllm.errors import UserError

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16"]
SETTINGS = ("auto", "fp32", "bf16")
CPU_FEATURES = ("amx_bf16", "avx512_bf16")


def has_fast_bfloat16(device_type: str) -> bool:
    """Return True if a kind of device (``cpu``, ``cuda``, ...) multiplies bfloat16 in hardware."""
    import torch

    if device_type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in CPU_FEATURES)
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True


def choose_precision(setting: str, device_type: str) -> Precision:
    """Resolve a setting on a kind of device: ``auto`` is bf16 where the hardware has it, else fp32.

    Raises:
        UserError: an unknown setting.
    """
    if setting not in SETTINGS:
        expected = ", ".join(repr(name) for name in SETTINGS)
        raise UserError(f"precision is {setting!r}; expected one of {expected}")
    if setting == "bf16" or (setting == "auto" and has_fast_bfloat16(device_type)):
        return "bf16"
    return "fp32"


def training_attention(device_type: str) -> Literal["sdpa", "eager"]:
    """Return the attention that trains a small transformer fastest.

    On CPUs, PyTorch's fused attention takes half the time of the plain one in float32; in bfloat16
    its backward takes several times as long.
    """
    if device_type == "cpu" and has_fast_bfloat16(device_type):
        return "eager"
    return "sdpa"


def product_dtype(device_type: str) -> torch.dtype:
    """Return bfloat16 where it is fast, else float32: for products that need eight bits at most."""
    import torch

    return torch.bfloat16 if has_fast_bfloat16(device_type) else torch.float32


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Return half precisions as float32 and other floats unchanged: for sums over many terms."""
    import torch

    return x.to(torch.promote_types(x.dtype, torch.float32))
