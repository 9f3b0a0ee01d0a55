"""Define an objective: a loss summed over targets, the same however a batch is divided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from avllm.data.collate import Batch


class Objective(nn.Module):
    """Compute one term of the loss.

    An objective gets the model as an argument and owns at most a few parameters, of a head for
    example.

    The trainer divides the sums of all micro batches and processes by their total weight, so that 8
    rows at once, 8 times 1 row, and 2 processes with 4 give one and the same gradient. An objective
    therefore never takes a mean. (One that compares parts with each other sees those of one
    micro-step: accumulation adds none.)

    Targets are tokens (``batch.labels``) or parts (``batch.parts``), never rows: packing puts the
    parts of several rows into one row, and must not change the loss.

    State from step to step (averages, queues) is a persistent **buffer**, since resume points and
    checkpoints hold buffers. Buffers must be equal on all processes and are not synchronised, so
    update them from gathered values. Random numbers come from torch's global generator, which the
    trainer seeds before each call.

    Attributes:
        compares: True where the loss of a part depends on the others of its micro batch (negatives
            in the batch), so that it matters which rows share one.
        gathers: True where the others are those of all processes; False where they are those of
            the same process, among them those about the same clip.
        figures: names of the sums of ``forward`` that grow as the model gets better, which
            ``train.best_by`` may name.
    """

    compares: ClassVar[bool] = True
    gathers: ClassVar[bool] = True
    figures: Sequence[str] = ("hits",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        del model  # subclasses read widths from it; an attribute would register its weights twice

    def weight(self, batch: Batch) -> float:
        """Return the number of targets, the loss's denominator, without a forward pass."""
        raise NotImplementedError(f"{type(self).__name__}.weight")

    def before_step(self, model: Any, batches: Sequence[Batch]) -> None:
        """Prepare a whole optimizer step of this process; the base class does nothing.

        Called once an optimizer step, before its first backward pass, without a graph, after the
        step's targets were counted.
        ``forward`` gets the same ``Batch`` objects afterwards, in this order. Do not call
        ``backward`` here: take gradients of values made here with ``torch.autograd.grad`` under
        ``torch.enable_grad``.

        It costs memory: where an objective has this hook, all micro batches of a step lie on the
        device at once, and not one after the other. Eight frames of 224x224 pixels in float32 are
        4.8 MB, so 4,096 such rows a step are 20 GB. With ``data.cache`` they are the encoders'
        features (of the same order for all patches in float16, far less for pooled ones and for
        sound), and no encoder runs twice: that is how large batches are carried.

        Args:
            model: an AVLLM.
            batches: all micro batches of the step, on the device.
        """

    def after_step(self, model: Any) -> None:
        """Follow an optimizer step, to update averages for example; the base class does nothing.

        Called once an optimizer step, after the weights have changed, under DeepSpeed as well. A
        step that has no target at all is passed over and calls neither hook.
        """

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss summed over the batch's targets, and further sums over them by name.

        A figure with another denominator than the targets is a pair ``(2,)``: sum and count.

        A batch without targets gives a zero that still depends on the parameters, since all
        processes have to run the same backward pass.
        """
        raise NotImplementedError(f"{type(self).__name__}.forward")
