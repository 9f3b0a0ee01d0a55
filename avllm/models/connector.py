"""Connect encoders and LLM by a list of adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
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
            adapter = _build(place, spec, widths, llm_dim)
            self.append(adapter)
            widths = adapter.out_widths
        wrong = {name: width for name, width in widths.items() if width != llm_dim}
        if wrong:
            unfit = UserError(
                f"the connector ends with widths {wrong}; the LLM's is {llm_dim}. "
                "End each stream with a projection (linear, mlp) or consume it"
            )
            unfit.setting = "model.connector"
            raise unfit
        self.widths = widths
        self.out_streams = list(widths)
        self._unproven = {
            place for place, adapter in enumerate(self.adapters) if _is_foreign(adapter)
        }

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
        for place, adapter in enumerate(self.adapters):
            made = adapter(streams, prompt)
            if place in self._unproven and _has_tokens(streams):
                check_grid(place, adapter, streams, made)
                self._unproven.remove(place)
            streams = made
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


def _build(place: int, spec: dict[str, Any], widths: dict[str, int], llm_dim: int) -> Adapter:
    try:
        adapter: Adapter = build("adapters", spec, widths, llm_dim)
    except UserError as error:
        message = f"connector[{place}] ({spec.get('type')}): {error}"
        placed = UserError(message, reason=error.reason)
        placed.setting = f"model.connector.{place}"
        raise placed from error
    return adapter


def _is_foreign(adapter: Adapter) -> bool:
    """Return whether an adapter is from outside of the package, whose tests hold for its own."""
    return not type(adapter).__module__.startswith("avllm.")


def check_grid(
    place: int, adapter: Adapter, streams: Mapping[str, Tokens], made: Mapping[str, Tokens]
) -> None:
    """Compare what an adapter made of a clip of a batch with what its grid says without weights.

    Args:
        place: of the adapter in the connector.
        adapter: the adapter.
        streams: its input.
        made: its output.

    Raises:
        UserError: ``grid`` or ``width``: the two disagree, so that a loader would count other
            tokens than the model makes.
    """
    where = f"connector[{place}] ({type(adapter).__module__}:{type(adapter).__name__})"
    clip = _first_clip(streams)
    grids = {name: _grid_of(tokens, clip) for name, tokens in streams.items()}
    grids = {name: grid for name, grid in grids.items() if grid.places}
    for name, grid in adapter.output_grid(grids).items():
        if name not in made:
            raise UserError(
                f"{where}: output_grid names the stream {name!r}, and forward makes "
                f"{', '.join(made)}; both have to name the same",
                reason="grid",
            )
        laid_out = made[name].extra.get("places", made[name].mask)[clip]
        seen = int(laid_out.sum())
        if seen != grid.places:
            raise UserError(
                f"{where}: grid counts {grid.places} tokens of stream {name!r} for a clip of which "
                f"adapt makes {seen} (T x P = {tuple(laid_out.shape)}); both have to drop, pool "
                "and mask the same steps",
                reason="grid",
            )
        width = made[name].x.shape[-1]
        if width != adapter.out_widths.get(name, width):
            raise UserError(
                f"{where}: stream {name!r} is {width} wide, and out_widths says "
                f"{adapter.out_widths[name]}; declare it with set_out_dim",
                reason="width",
            )


def _has_tokens(streams: Mapping[str, Tokens]) -> bool:
    return any(bool(tokens.mask.any()) for tokens in streams.values())


def _first_clip(streams: Mapping[str, Tokens]) -> int:
    """Return the first clip of a batch that has a token; one has to."""
    present = torch.stack([tokens.present() for tokens in streams.values()]).any(0)  # (B,)
    return int(present.int().argmax())


def _grid_of(tokens: Tokens, clip: int) -> Grid:
    """Return clock and mask of one clip of a batch, without the padding after its last step."""
    real_steps = tokens.mask[clip].any(-1).nonzero()  # (K, 1)
    steps = int(real_steps[-1]) + 1 if len(real_steps) else 0
    return Grid(tokens.span[clip, :steps].cpu(), tokens.mask[clip, :steps].cpu())


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
        unreached = UserError(
            f"the connector ends with streams {lost}, for which the tokenizer has no placeholder; "
            f"it has {sorted(token_ids)}. Consume them in an adapter or in model.fusion, or end "
            "with the encoders' streams"
        )
        unreached.setting = "model.connector"
        raise unreached


def stream_names(stream: str, layer_names: list[str]) -> list[str]:
    """Return the streams of an encoder: ``stream``, and ``stream.layer`` for more layers."""
    return [f"{stream}.{name}" if name else stream for name in layer_names]
