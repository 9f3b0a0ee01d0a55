"""Talk to the other processes: rank, sums, and a gather that passes gradients on.

Every function works in a single process too, where it changes nothing: callers need no
`if world_size > 1`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from avllm.errors import UserError

T = TypeVar("T")


def active() -> bool:
    """Return True if there is a process group."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if active() else 1


def rank() -> int:
    """Return this process's number, 0 without a process group."""
    return dist.get_rank() if active() else 0


def is_main() -> bool:
    """Return True for the one process that writes files and logs."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process has called this."""
    if active():
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """Run the block in the main process before the others.

    The others read from the disk what it has made, downloads for example.
    """
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def sum_over_processes(x: Tensor) -> Tensor:
    """Return the sum of ``x`` (same shape everywhere) over the processes, without gradient."""
    x = x.detach().clone()
    if active():
        dist.all_reduce(x)
    return x


def sum_of_parts(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return each tensor's sum over the processes, in one exchange.

    Args:
        parts: tensors of one dtype, with the same shapes on every process.
    """
    if not active() or not parts:
        return parts
    flat = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(flat)
    sums = flat.split([part.numel() for part in parts])
    return [total.view(part.shape) for total, part in zip(sums, parts, strict=True)]


def gather_objects(obj: Any) -> list[Any]:
    """Return one small picklable object from each process, in rank order, on every process."""
    if not active():
        return [obj]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, obj)
    return out


def from_main(function: Callable[[], T]) -> T:
    """Call a function in the main process; return its value, or raise its error, in each process.

    Raises:
        UserError: what the function raised.
    """
    value: Any = None
    error: UserError | None = None
    if is_main():
        try:
            value = function()
        except UserError as raised:
            error = raised
    value, error = gather_objects((value, error))[0]
    if error is not None:
        raise error
    return value


class _Gather(torch.autograd.Function):
    """Concatenate rows of all processes; the backward sums the gradients of all for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: x.shape[0]] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        first = sum(ctx.sizes[: rank()])
        return grad[first : first + ctx.sizes[rank()]], None


def gather_with_grad(x: Tensor) -> tuple[Tensor, int]:
    """Concatenate the rows of all processes, with gradients.

    The gradient of a row is the sum over all processes. With a data-parallel average of parameter
    gradients and a loss of (own rows' sum) / (all rows) * world_size, this is exactly the gradient
    of one process that holds every row. All processes have to call it, also one without rows, and
    all have to call backward.

    Args:
        x: ``(n, ...)``, n may differ over the processes, 0 included.

    Returns:
        the rows ``(sum of n, ...)`` in rank order, and the index of this process's first row.
    """
    if not active():
        return x, 0
    sizes = gather_sizes(x.shape[0], x.device)
    return _Gather.apply(x, sizes), sum(sizes[: rank()])


def gather_sizes(n: int, device: torch.device) -> list[int]:
    """Return each process's ``n``, in rank order."""
    sizes = torch.zeros(world_size(), dtype=torch.long, device=device)
    sizes[rank()] = n
    return [int(v) for v in sum_over_processes(sizes)]
