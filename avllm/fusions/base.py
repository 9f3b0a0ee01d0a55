"""Define a fusion: trainable layers that let media act inside the LLM, beside its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from avllm.errors import UserError
from avllm.registry import build, check, options
from avllm.tokens import Tokens


class Fusion(nn.Module):
    """Let streams act inside the LLM.

    The streams that it consumes take no place in the LLM's sequence and have no placeholder token.
    Its parameters are named ``fusion....``; they train by the rules of ``trainable`` and are saved
    with the connector. The LLM's own parameters must not be registered here: they would be saved
    and trained twice.

    Args:
        widths: the width of each stream that leaves the connector.
        llm: the LLM, for its sizes and its layers.
        streams: the streams that are consumed.

    Raises:
        ValueError: a stream that does not leave the connector, or none at all.
    """

    def __init__(self, widths: dict[str, int], llm: Any, *, streams: list[str]) -> None:
        super().__init__()
        del llm
        missing = [stream for stream in streams if stream not in widths]
        if missing or not streams:
            seen = f"stream {missing[0]!r}" if missing else "no stream"
            raise ValueError(
                f"{type(self).__name__} reads {seen}; expected some of {sorted(widths)}, "
                "with which the connector ends"
            )
        self.streams = list(streams)

    def prepare(self, tokens: dict[str, Tokens], batch: Any) -> Any:
        """Return the media as the LLM's layers read them, computed once for all calls in a context.

        Args:
            tokens: connector output by stream, ``(B, T, P, D)`` each, those that have a placeholder
                too. A stream may be missing and a clip's mask may be all False: the LLM then runs
                as if there were no such media. Where parameters are used at all, they must stay on
                the graph, for processes wait for each other's gradients.
            batch: a :class:`~avllm.data.collate.Batch` of rows ``(R, L)``. The LLM reads all of
                them or, with a cache, a part: the places ``L``, ``L + 1``, ... are tokens that
                follow the rows. It may be given each row several times in succession (beams).
        """
        raise NotImplementedError(f"{type(self).__name__}.prepare")

    def context(self, llm: Any, prepared: Any) -> AbstractContextManager[None]:
        """Return a context in which the LLM's calls see the media.

        Contexts nest, and the innermost counts alone. A context is entered again when a backward
        pass recomputes layers (gradient checkpointing), so entering it computes nothing and changes
        nothing for good. Several threads may be inside at a time, each with its own media: keep
        what differs in a ``ContextVar``.

        Args:
            llm: the LLM, bare or wrapped by PEFT.
            prepared: what :meth:`prepare` returned; None: the LLM reads text alone.
        """
        raise NotImplementedError(f"{type(self).__name__}.context")


def consumed_streams(spec: Mapping[str, Any] | None) -> list[str]:
    """Return the streams that the fusion of a config consumes, without building it.

    Args:
        spec: ``{"type", **options}``, or None for a model without a fusion.
    """
    if spec is None:
        return []
    default = options(check("fusions", spec))["streams"].default
    return list(spec.get("streams", default))


def build_fusion(spec: Mapping[str, Any] | None, widths: dict[str, int], llm: Any) -> Fusion | None:
    """Build the fusion of a config and put it into the LLM; None for a model without one."""
    if spec is None:
        return None
    fusion: Fusion = build("fusions", spec, widths, llm)
    return fusion


def decoder_layers(llm: Any) -> nn.ModuleList:
    """Return the layers of a causal LM of transformers: the longest list of modules of its decoder.

    Raises:
        UserError: it has none whose members are called with hidden states.
    """
    decoder = llm.get_decoder()
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UserError(
            f"the decoder of {type(llm).__name__} is {type(decoder).__name__}, which holds no list "
            "of layers; expected a causal LM of transformers with one"
        )
    return max(lists, key=len)
