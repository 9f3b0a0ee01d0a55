"""What an objective is: a sum over targets to make small, so that every way of cutting a batch agrees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from avllm.data.collate import Batch


class Objective(nn.Module):
    """One term of the loss. It is handed the model and owns at most its own few parameters.

    The trainer divides the sums of all micro batches and processes by their total weight, so that 8 rows at once,
    8 times 1 row, and 2 processes with 4 give one and the same gradient. An objective therefore never takes a mean.
    (One that compares parts with each other sees those of one micro-step: accumulation brings it no further ones.)

    What it counts are tokens (``batch.labels``) or parts (``batch.parts``), never rows: packing puts the parts of
    several rows into one, and the loss has to be the same.

    Attributes:
        compares: True where the loss of a part depends on the others of its micro batch (negatives in the batch), so
            that it matters which rows share one.
    """

    compares: ClassVar[bool] = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        del model  # subclasses read widths from it; keeping it here would register its parameters twice

    def weight(self, batch: Batch) -> float:
        """The number of targets in the batch, known without a forward pass: the denominator of the loss."""
        raise NotImplementedError(f"{type(self).__name__}.weight")

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over the batch's targets, and sums of further figures over the same targets.

        A batch without targets gives a zero that still hangs on the parameters: all processes have to do the same.
        """
        raise NotImplementedError(f"{type(self).__name__}.forward")
