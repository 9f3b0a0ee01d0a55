"""Optimize matrices by Muon and everything else by AdamW, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces a matrix's momentum by
the nearest semi-orthogonal matrix: all directions learn equally fast. Its step is scaled to the
size of AdamW's (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that one learning rate and one
decay mean the same for both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from avllm import distributed
from avllm.precision import product_dtype

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, by Keller Jordan


class Muon(torch.optim.Optimizer):
    """Update groups whose ``matrices`` is true by orthogonalised momentum, others by AdamW.

    Processes that train the same parameters with the same gradients share the work: each
    orthogonalises a part of the matrices, and all get the sum.

    Args:
        groups: parameter groups with ``matrices`` (bool), ``lr`` and ``weight_decay``.
        betas: AdamW's.
        eps: AdamW's.
        momentum: Muon's (Nesterov momentum).
        iterations: Newton-Schulz iterations.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        momentum: float = 0.95,
        iterations: int = 5,
    ) -> None:
        defaults = {
            "lr": 0.0,
            "betas": betas,
            "eps": eps,
            "momentum": momentum,
            "iterations": iterations,
        }
        super().__init__(groups, defaults | {"weight_decay": 0.0, "matrices": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("Muon takes no closure; call backward before step")
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            if group["matrices"]:
                self._orthogonal(parameters, group)
            else:
                self._adam(parameters, group)

    def _orthogonal(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        directions = [self._momentum(p, group).view(p.shape[0], -1) for p in parameters]
        shares = share_out([cost(d) for d in directions], distributed.world_size())
        # All matrices of a shape are iterated together.
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for number in shares[distributed.rank()]:
            by_shape[directions[number].shape].append(number)
        # Zeros where another process does the work: the sum over processes is the whole.
        steps = [torch.zeros_like(d, dtype=product_dtype(d.device.type)) for d in directions]
        for numbers in by_shape.values():
            stacked = torch.stack([directions[number] for number in numbers])
            orthogonal = orthogonalise(stacked, group["iterations"])
            for number, step in zip(numbers, orthogonal, strict=True):
                steps[number] = step
        for p, step in zip(parameters, distributed.sum_of_parts(steps), strict=True):
            p.add_(step.view_as(p).to(p.dtype), alpha=-group["lr"] * 0.2 * max(step.shape) ** 0.5)

    def _momentum(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        grad = p.grad
        assert grad is not None  # step() takes no others
        state["momentum"].lerp_(grad, 1 - group["momentum"])
        return grad.lerp(state["momentum"], group["momentum"])

    def _adam(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        first, second = group["betas"]
        for p in parameters:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(())
                state["mean"] = torch.zeros_like(p)
                state["square"] = torch.zeros_like(p)
            state["step"] += 1
            state["mean"].lerp_(p.grad, 1 - first)
            state["square"].mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
            steps = float(state["step"])
            spread = (state["square"] / (1 - second**steps)).sqrt_().add_(group["eps"])
            p.addcdiv_(state["mean"], spread, value=-group["lr"] / (1 - first**steps))


def cost(matrix: Tensor) -> int:
    """Estimate the multiplications of one iteration on a matrix ``(a, b)``."""
    small, large = sorted(matrix.shape)
    return small * small * (2 * large + small)


def share_out(costs: Sequence[int], shares: int) -> list[list[int]]:
    """Divide items into shares of about equal cost.

    The dearest item comes first; each goes to the share that has cost least so far.

    Returns:
        The numbers of the items of each share, ascending.
    """
    numbers_by_share: list[list[int]] = [[] for _ in range(shares)]
    sums = [0] * shares
    for number in sorted(range(len(costs)), key=lambda n: -costs[n]):
        least = sums.index(min(sums))
        numbers_by_share[least].append(number)
        sums[least] += costs[number]
    return [sorted(numbers) for numbers in numbers_by_share]


def orthogonalise(x: Tensor, iterations: int) -> Tensor:
    """Return about the nearest matrices with all singular values 1, by Newton-Schulz iteration.

    It computes in bfloat16 where that is fast: the iteration needs no more.

    Args:
        x: ``(n, a, b)``.
        iterations: of Newton and Schulz.
    """
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).to(product_dtype(x.device.type))
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if y.device.type == "cpu":  # where a batched product takes twice as long as single ones
        y = torch.stack([_iterate(matrix, iterations, torch.addmm) for matrix in y])
    else:
        y = _iterate(y, iterations, torch.baddbmm)
    return y.mT if tall else y


def _iterate(y: Tensor, iterations: int, add_product: Callable[..., Tensor]) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        gram = y @ y.mT
        y = add_product(y, add_product(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y
