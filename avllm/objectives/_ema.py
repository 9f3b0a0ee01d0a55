"""Keep copies and moving averages of parameters in buffers, which checkpoints hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from avllm.errors import UserError


class FrozenCopy(nn.Module):
    """Copy the present parameters of some modules to buffers, which no rule can train.

    Args:
        modules: the modules by name; they are read, not owned.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for module, name, parameter in _parameters(modules):
            self.register_buffer(_buffer(module, name), parameter.detach().clone())

    def weights(self, module: str) -> dict[str, Tensor]:
        """Return the copies of a module's parameters for ``torch.func.functional_call``.

        They are keyed by the parameter's name in the module.
        """
        prefix = _buffer(module, "")
        copies: dict[str, Tensor] = {}
        for buffer, copy in self.named_buffers():
            if buffer.startswith(prefix):
                copies[buffer.removeprefix(prefix).replace("/", ".")] = copy
        return copies


class Ema(FrozenCopy):
    """Average the parameters of some modules over steps: ``m * average + (1 - m) * parameter``.

    All parameters are averaged, since the rules of training are not known yet; the average of a
    frozen one equals it to the bit. The memory is that of one more copy of the modules, without
    gradients.

    Args:
        modules: the modules by name; they are read, not owned.
        momentum: m, from 0 (a copy of the last step) to below 1.
    """

    def __init__(self, modules: Mapping[str, nn.Module], momentum: float) -> None:
        super().__init__(modules)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; expected 0 <= momentum < 1, e.g. 0.995")
        self.momentum = momentum

    @torch.no_grad()
    def update(self, modules: Mapping[str, nn.Module]) -> None:
        """Move the averages towards the parameters, once after an optimizer step.

        Args:
            modules: those of the constructor. Under FSDP every process has to call this.

        Raises:
            UserError: averages in half precision, which would not move, or parameters that ZeRO-3
                keeps in pieces.
        """
        for module, name, parameter in _parameters(modules):
            average = self.get_buffer(_buffer(module, name))
            if average.dtype in (torch.bfloat16, torch.float16):
                raise UserError(
                    f"momentum: the average of {module}.{name} is in {average.dtype}, too coarse "
                    "for the small steps of an average; keep the weights in float32: "
                    "train.precision bf16 does so, DeepSpeed's bf16 does not"
                )
            average.lerp_(_whole(parameter).to(average), 1 - self.momentum)


def _parameters(modules: Mapping[str, nn.Module]) -> list[tuple[str, str, nn.Parameter]]:
    """List the modules' parameters: name of the module, name in the module, parameter."""
    parameters: list[tuple[str, str, nn.Parameter]] = []
    for key, module in modules.items():
        for name, parameter in module.named_parameters():
            parameters.append((key, name, parameter))
    return parameters


def _buffer(module: str, name: str) -> str:
    """Return the buffer's name; torch allows no dots in it."""
    return f"{module}/{name}".replace(".", "/")


def _whole(parameter: Any) -> Tensor:
    """Return a parameter as one tensor, where FSDP keeps it in pieces."""
    if hasattr(parameter, "ds_id"):
        raise UserError(
            "momentum: ZeRO-3 keeps the connector's weights in pieces, and an average needs whole "
            "ones; launch with train/launch/zero2.yaml, fsdp.yaml or ddp.yaml"
        )
    if hasattr(parameter, "full_tensor"):
        parameter = parameter.full_tensor()
    whole: Tensor = parameter.detach()
    return whole
