"""The connector: a list of adapters between the encoders and the LLM."""

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
        widths: width of each stream that the encoders give (``video``, ``audio``, ``audio.4``, ...).
        llm_dim: width of the LLM's embeddings, which every stream must have at the end.

    Raises:
        ValueError: an adapter reads a stream that does not arrive, or a stream ends with another width.
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
        """The steps, in order."""
        return cast(list[Adapter], list(self))

    @property
    def conditioned(self) -> bool:
        """Whether any adapter reads the prompt."""
        return any(adapter.conditioned for adapter in self.adapters)

    @property
    def by_content(self) -> bool:
        """Whether content decides how many tokens any adapter makes."""
        return any(adapter.by_content for adapter in self.adapters)

    def forward(self, streams: dict[str, Tokens], prompt: Prompt | None = None) -> dict[str, Tokens]:
        """Fold the streams over the adapters."""
        return self.steps(streams, prompt)[-1]

    def steps(self, streams: dict[str, Tokens], prompt: Prompt | None = None) -> list[dict[str, Tokens]]:
        """The same fold with what it passes: the streams as adapter 0, 1, ... gets them and as the last leaves them."""
        found = [streams]
        for adapter in self:
            found.append(adapter(found[-1], prompt))
        return found

    def output_grid(self, grids: dict[str, Grid]) -> dict[str, Grid]:
        """Fold clocks and token counts alone over the adapters, for one clip.

        Raises:
            UserError: an adapter counts by what an adapter before it has only bounded.
        """
        for place, adapter in enumerate(self.adapters):
            made = adapter.output_grid(grids)
            for name, grid in grids.items():
                if grid.at_most and made.get(name) is not grid:
                    raise UserError(
                        f"connector[{place}] ({type(adapter).__name__}) reads stream {name!r}, of which an adapter "
                        "before it makes a number of tokens that content decides; only adapters that keep each token "
                        "in its place (linear, mlp) can follow. Put it before that one"
                    )
            grids = made
        return grids


def bind_adapters(model: Any) -> None:
    """Show each adapter the model that it is part of; see :meth:`avllm.adapters.base.Adapter.bind`.

    Raises:
        TypeError: an adapter registered a parameter of another part, which would be saved and trained twice.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for place, adapter in enumerate(model.connector.adapters):
        adapter.bind(model)
        own = [names.get(id(parameter), "connector.") for parameter in adapter.parameters()]
        foreign = [name for name in own if not name.startswith("connector.")]
        if foreign:
            raise TypeError(
                f"connector[{place}] ({type(adapter).__name__}) registers {foreign[0]} of another part as its own; "
                "keep what bind() is given by weakref.ref(model)"
            )


def check_placeholders(streams: Sequence[str], token_ids: Mapping[str, int], consumed: Sequence[str]) -> None:
    """Make sure that each stream reaches the LLM: by a placeholder's id, or consumed by the fusion.

    Raises:
        UserError: one that does not.
    """
    nameless = [stream for stream in streams if stream not in token_ids and stream not in consumed]
    if nameless:
        raise UserError(
            f"the connector ends with streams {sorted(nameless)}, for which the tokenizer has no placeholder; it has "
            f"{sorted(token_ids)}. Consume them in an adapter or in model.fusion, or end with the encoders' streams"
        )


def stream_names(stream: str, layer_names: list[str]) -> list[str]:
    """Names of the streams that an encoder gives: its own, and ``stream.layer`` for further layers."""
    return [f"{stream}.{name}" if name else stream for name in layer_names]
