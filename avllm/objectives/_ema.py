"""An exponential moving average of parameters, kept in buffers so that checkpoints and resume points hold it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from avllm.errors import UserError


class FrozenCopy(nn.Module):
    """Keep the parameters of some modules as they are now; a buffer each, so that no rule can train them.

    Args:
        modules: the modules by name; they are read, not owned.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for module, name, parameter in _parameters(modules):
            self.register_buffer(_buffer(module, name), parameter.detach().clone())

    def weights(self, module: str) -> dict[str, Tensor]:
        """Return the copies of a module's parameters by name, for ``torch.func.functional_call``."""
        prefix = _buffer(module, "")
        own = {name: copy for name, copy in self.named_buffers() if name.startswith(prefix)}
        return {name.removeprefix(prefix).replace("/", "."): copy for name, copy in own.items()}


class Ema(FrozenCopy):
    """Average the parameters of some modules over steps: ``m * average + (1 - m) * parameter``.

    All parameters are averaged, since what trains is decided later; a frozen one stays what it is to
    the bit. A buffer a parameter: the memory of one more copy of the modules, none of gradients.

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
            UserError: averages in half precision, which would not move, or parameters cut up by ZeRO-3.
        """
        for module, name, parameter in _parameters(modules):
            average = self.get_buffer(_buffer(module, name))
            if average.dtype in (torch.bfloat16, torch.float16):
                raise UserError(
                    f"momentum: the average of {module}.{name} is in {average.dtype}, whose steps are larger than "
                    "the average's; keep the weights in float32 (train.precision bf16 goes, DeepSpeed's bf16 does not)"
                )
            average.lerp_(_whole(parameter).to(average), 1 - self.momentum)


def _parameters(modules: Mapping[str, nn.Module]) -> list[tuple[str, str, nn.Parameter]]:
    return [(key, name, p) for key, module in modules.items() for name, p in module.named_parameters()]


def _buffer(module: str, name: str) -> str:
    """Return the buffer's name; torch allows no dots in it."""
    return f"{module}/{name}".replace(".", "/")


def _whole(parameter: Any) -> Tensor:
    """Return a parameter that FSDP keeps in pieces as one."""
    if hasattr(parameter, "ds_id"):
        raise UserError(
            "momentum: ZeRO-3 cuts the connector's weights up, and an average of them needs whole ones; launch with "
            "train/launch/zero2.yaml, fsdp.yaml or ddp.yaml"
        )
    whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole.detach()
