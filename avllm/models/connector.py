"""Connect encoders and LLM by a list of adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from avllm.adapters.base import Adapter, Prompt
from avllm.errors import UserError
from avllm.registry import build
from avllm.tokens import Grid, Tokens


class Connector(nn.ModuleList):
    """Adapters in order; their parameters are named ``connector.<place>...``.

    Args:
        specs: ``[{"type", **options}]``.
        widths: width of each stream of the encoders (``video``, ``audio``, ``audio.4``, ...).
        llm_dim: width of the LLM's embeddings, which every stream must have at the end.

    Raises:
        UserError: an adapter reads a stream that does not exist, or a stream ends with another
            width.
    """

    def __init__(self, specs: list[dict[str, Any]], widths: dict[str, int], llm_dim: int) -> None:
        super().__init__()
        for place, spec in enumerate(specs):
            try:
                adapter: Adapter = build("adapters", spec, widths, llm_dim)
            except UserError as error:
                raise UserError(f"connector[{place}] ({spec.get('type')}): {error}") from error
            self.append(adapter)
            widths = adapter.out_widths
        wrong = {name: width for name, width in widths.items() if width != llm_dim}
        if wrong:
            raise UserError(
                f"the connector ends with widths {wrong}; the LLM's is {llm_dim}. "
                "End each stream with a projection (linear, mlp) or consume it"
            )
        self.widths = widths
        self.out_streams = list(widths)

    @property
    def adapters(self) -> list[Adapter]:
        """Return the adapters, in order."""
        return cast(list[Adapter], list(self))

    @property
    def conditioned(self) -> bool:
        """Return True if any adapter reads the prompt."""
        return any(adapter.conditioned for adapter in self.adapters)

    @property
    def by_content(self) -> bool:
        """Return True if content decides how many tokens any adapter makes."""
        return any(adapter.by_content for adapter in self.adapters)

    def forward(
        self, streams: dict[str, Tokens], prompt: Prompt | None = None
    ) -> dict[str, Tokens]:
        """Pass the streams through the adapters, one after the other."""
        return self.steps(streams, prompt)[-1]

    def steps(
        self, streams: dict[str, Tokens], prompt: Prompt | None = None
    ) -> list[dict[str, Tokens]]:
        """Return the inputs of adapter 0, 1, ..., and the output of the last adapter."""
        steps = [streams]
        for adapter in self:
            streams = adapter(streams, prompt)
            steps.append(streams)
        return steps

    def output_grid(self, grids: dict[str, Grid]) -> dict[str, Grid]:
        """Pass clocks and masks of one clip through the adapters, without features.

        Raises:
            UserError: an adapter counts from a number that the adapter before it only bounds.
        """
        for place, adapter in enumerate(self.adapters):
            made = adapter.output_grid(grids)
            for name, grid in grids.items():
                if grid.at_most and made.get(name) is not grid:
                    raise UserError(
                        f"connector[{place}] ({type(adapter).__name__}) reads stream {name!r}, of "
                        "which an adapter before it makes a number of tokens that content decides; "
                        "only adapters that keep each token in its place (linear, mlp) can follow. "
                        "Put it before that one"
                    )
            grids = made
        return grids


def bind_adapters(model: Any) -> None:
    """Pass the model to each of its adapters, see :meth:`avllm.adapters.base.Adapter.bind`.

    Raises:
        TypeError: an adapter registered a parameter of another part, which would be saved and
            trained twice.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for place, adapter in enumerate(model.connector.adapters):
        adapter.bind(model)
        registered = [names.get(id(parameter), "connector.") for parameter in adapter.parameters()]
        foreign = [name for name in registered if not name.startswith("connector.")]
        if foreign:
            raise TypeError(
                f"connector[{place}] ({type(adapter).__name__}) registers {foreign[0]} of another "
                "part as its own; keep the model that bind() is given by weakref.ref(model)"
            )


def check_placeholders(
    streams: Sequence[str], token_ids: Mapping[str, int], consumed: Sequence[str]
) -> None:
    """Refuse streams that do not reach the LLM, by a placeholder or through the fusion.

    Raises:
        UserError: a stream has no placeholder and no fusion consumes it.
    """
    reached = {*token_ids, *consumed}
    lost = sorted(stream for stream in streams if stream not in reached)
    if lost:
        raise UserError(
            f"the connector ends with streams {lost}, for which the tokenizer has no placeholder; "
            f"it has {sorted(token_ids)}. Consume them in an adapter or in model.fusion, or end "
            "with the encoders' streams"
        )


def stream_names(stream: str, layer_names: list[str]) -> list[str]:
    """Return the streams of an encoder: ``stream``, and ``stream.layer`` for more layers."""
    return [f"{stream}.{name}" if name else stream for name in layer_names]
