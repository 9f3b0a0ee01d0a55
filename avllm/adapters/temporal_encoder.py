"""Make a few tokens of all frames of a video: BLIP-3-Video's encoder (arXiv 2410.16267, 2.2)."""

from __future__ import annotations

from torch import Tensor, nn

from avllm.adapters._attention import AttentionBlock
from avllm.adapters._temporal import TokenLearner, TokenTuringMachine
from avllm.adapters.base import Prompt, StreamAdapter, masked_mean, whole_span
from avllm.tokens import Grid, Tokens

KINDS = ("pool", "transformer", "st_attn_pool", "ttm")


class TemporalEncoder(StreamAdapter):
    """Turn the tokens of any number of steps into the same few tokens, which span the clip.

    Frames should have few tokens by then: BLIP-3-Video puts a ``perceiver`` a frame before it.
    None of the four kinds knows the order of the steps but ``ttm``: put ``position`` before it.

    Args:
        stream: the stream to read.
        kind: ``pool``: the mean over the steps, place by place, so that ``num_tokens`` has to be
            the tokens of a step. ``transformer``: layers over all tokens, then such a mean.
            ``st_attn_pool``: that many weighted averages over all tokens of all steps, whose
            weights are learned (TokenLearner). ``ttm``: a Token Turing Machine reads the steps
            one after the other.
        num_tokens: n, 16 to 128 in the paper.
        layers: of the transformer.
        heads: of the transformer, and of the Turing machine.
        memory: tokens of the Turing machine's memory.
        read: tokens that the Turing machine reads a step.
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        stream: str,
        kind: str = "st_attn_pool",
        num_tokens: int = 32,
        layers: int = 2,
        heads: int = 8,
        memory: int = 128,
        read: int = 16,
    ) -> None:
        super().__init__(widths, llm_dim, stream)
        if kind not in KINDS:
            raise ValueError(
                f"temporal_encoder on {stream!r} has kind {kind!r}; expected one of {KINDS}"
            )
        if min(num_tokens, layers, memory, read) < 1:
            raise ValueError(
                f"temporal_encoder on {stream!r} has num_tokens {num_tokens}, layers {layers}, "
                f"memory {memory} and read {read}; expected 1 or more of each"
            )
        self.kind = kind
        self.num_tokens = num_tokens
        dim = self.in_dim
        if kind == "transformer":
            self.blocks = nn.ModuleList(AttentionBlock(dim, heads) for _ in range(layers))
        elif kind == "st_attn_pool":
            self.learner = TokenLearner(dim, num_tokens)
        elif kind == "ttm":
            self.machine = TokenTuringMachine(
                dim, heads, memory=memory, read=read, number=num_tokens
            )

    def adapt(self, tokens: Tokens, prompt: Prompt | None = None) -> Tokens:
        if self.kind == "st_attn_pool":
            x: Tensor = self.learner(*tokens.flat())  # (B, n, D)
        elif self.kind == "ttm":
            x = self.machine(tokens.x, tokens.mask)
        else:
            x = masked_mean(self._mixed(tokens).transpose(1, 2), tokens.mask.transpose(1, 2), 2)
        span = whole_span(tokens.span, tokens.mask.any(-1))  # (B, 1, 2)
        return Tokens(x.unsqueeze(1), self._mask(tokens.mask), span)  # (B, 1, n, D)

    def grid(self, grid: Grid) -> Grid:
        span = whole_span(grid.span[None], grid.mask.any(-1)[None])[0]
        return Grid(span, self._mask(grid.mask[None])[0])

    def _mixed(self, tokens: Tokens) -> Tensor:
        """Return the tokens ``(B, T, P, D)``, which have seen each other in a transformer."""
        if self.kind == "pool":
            return tokens.x
        x, real = tokens.flat()
        for block in self.blocks:
            x = block(x, x, real)
        return x.view(tokens.x.shape)

    def _mask(self, mask: Tensor) -> Tensor:
        """Return the mask of the result, ``(B, T, P)`` -> ``(B, 1, n)``.

        Raises:
            ValueError: means place by place are as many as a step has tokens.
        """
        if self.kind in ("st_attn_pool", "ttm"):
            return mask.flatten(1).any(1).view(-1, 1, 1).expand(-1, 1, self.num_tokens)
        if mask.shape[2] != self.num_tokens:
            raise ValueError(
                f"temporal_encoder on {self.stream!r} has kind {self.kind!r} and num_tokens "
                f"{self.num_tokens}, and steps of {mask.shape[2]} tokens; set num_tokens to that, "
                "or put a perceiver with so many queries a frame before it"
            )
        return mask.any(1, keepdim=True)
