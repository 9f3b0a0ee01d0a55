"""What an objective is: a sum over targets to make small, so that every way of cutting a batch agrees."""

from __future__ import annotations

from collections.abc import Sequence
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

    What an objective carries from step to step (averages, queues) is a persistent **buffer**: resume points and
    checkpoints hold it. Buffers have to be equal on all processes, so update them from gathered values; they are not
    sent about. Its random numbers come from torch's global generator, which the trainer seeds before each call.

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

    def before_step(self, model: Any, batches: Sequence[Batch]) -> None:
        """Look at a whole optimizer step of this process before its first backward pass; does nothing here.

        Called once an optimizer step, without a graph, after the step's targets were counted. ``forward`` gets the
        same ``Batch`` objects afterwards, in this order. Do not call ``backward`` here: take gradients of values
        made here with ``torch.autograd.grad`` under ``torch.enable_grad``.

        It costs memory: where an objective has this hook, all micro batches of a step lie on the device at once, and
        not one after the other. Eight frames of 224x224 pixels in float32 are 4.8 MB, so 4,096 such rows a step are
        20 GB. With ``data.cache`` they are the encoders' features (of the same order for all patches in float16, far
        less for pooled ones and for sound), and no encoder runs twice: that is how large batches are carried.

        Args:
            model: an AVLLM.
            batches: all micro batches of the step, on the device.
        """

    def after_step(self, model: Any) -> None:
        """Follow the optimizer's step, to update averages for example; does nothing here.

        Called once an optimizer step, after the weights have changed, under DeepSpeed as well. A step that has no
        target at all is passed over and calls neither hook.
        """

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over the batch's targets, and sums of further figures over the same targets.

        A batch without targets gives a zero that still hangs on the parameters: all processes have to do the same.
        """
        raise NotImplementedError(f"{type(self).__name__}.forward")
