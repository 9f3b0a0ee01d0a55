"""What a process has to know about the others: rank, sums, and a gather that lets gradients through.

Every function works in a single process too, where it does nothing; so callers hold no `if world_size > 1`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def active() -> bool:
    """Is there a process group?"""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """The number of processes, 1 without a process group."""
    return dist.get_world_size() if active() else 1


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if active() else 0


def is_main() -> bool:
    """Does this process write files and talk?"""
    return rank() == 0


def barrier() -> None:
    """Wait until every process has come here."""
    if active():
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """The main process goes through the block before the others: they find on the disk what it has made."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of ``x`` (any shape, the same on all) over the processes; detached, ``x`` stays as it was."""
    x = x.detach().clone()
    if active():
        dist.all_reduce(x)
    return x


def sum_of_parts(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """The sum over the processes of each tensor, in one exchange; all of one dtype, alike on every process."""
    if not active() or not parts:
        return parts
    flat = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(flat)
    return [piece.view(part.shape) for piece, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]


def gather_objects(obj: Any) -> list[Any]:
    """One small picklable object from each process, in rank order, on every process."""
    if not active():
        return [obj]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, obj)
    return out


class _Gather(torch.autograd.Function):
    """Rows of all processes, one after the other; the backward sums what every process wants of these rows."""

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

    The gradient that flows back into a row is the sum over all processes; with a data-parallel average of parameter
    gradients and a loss of (own rows' sum) / (all rows) * world_size this is exactly the gradient of one process that
    holds every row. All processes have to call it, also one without rows, and all have to call backward.

    Args:
        x: ``(n, ...)``, n may differ over the processes, 0 included.

    Returns:
        ``(sum of n, ...)`` in rank order, and the place of this process's first row in it.
    """
    if not active():
        return x, 0
    sizes = gather_sizes(x.shape[0], x.device)
    return _Gather.apply(x, sizes), sum(sizes[: rank()])


def gather_sizes(n: int, device: torch.device) -> list[int]:
    """Each process's ``n``, in rank order."""
    sizes = torch.zeros(world_size(), dtype=torch.long, device=device)
    sizes[rank()] = n
    return [int(v) for v in sum_over_processes(sizes)]
