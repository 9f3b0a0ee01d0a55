"""Learned queries that read a stream by cross-attention: BLIP-2's Q-Former (arXiv 2301.12597), in transformers' layers.

Per frame (BLIP-2, InstructBLIP), per window of time (SALMONN, arXiv 2310.13289), or over the whole clip (the video and
audio Q-Formers of Video-LLaMA, arXiv 2306.02858).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avllm.adapters.base import Prompt, StreamAdapter, Windows, gather_steps, time_windows, whole_span, window_grid
from avllm.tokens import Grid, Tokens


class QFormer(StreamAdapter):
    """``num_queries`` learned queries read the tokens of each frame, window or clip.

    Args:
        stream: the stream to read.
        num_queries: queries, hence tokens that each frame, window or clip becomes.
        per: ``frame`` (each time step by itself), ``window`` (needs ``seconds``) or ``clip``.
        seconds: length and distance of the windows.
        context: seconds that a window's queries see around its centre; more than ``seconds`` lets windows overlap.
        dim, layers, heads, intermediate: of the Q-Former; ``dim`` is the width that goes out.
        cross_every: every how many layers there is cross-attention (BLIP-2: 2; Video-LLaMA's second level: 1).
        dropout: of attention and hidden states.
        init: a hub name or folder of a transformers BLIP-2 checkpoint whose Q-Former and query tokens to start from;
            read by :meth:`load_init` only, never while a saved model is rebuilt.
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        stream: str,
        num_queries: int = 32,
        per: str = "frame",
        seconds: float | None = None,
        context: float | None = None,
        dim: int = 768,
        layers: int = 12,
        heads: int = 12,
        intermediate: int | None = None,
        cross_every: int = 2,
        dropout: float = 0.0,
        init: str | None = None,
    ) -> None:
        super().__init__(widths, llm_dim, stream)
        if per not in ("frame", "window", "clip"):
            raise ValueError(f"qformer on {stream!r} has per {per!r}; expected 'frame', 'window' or 'clip'")
        if (per == "window") != (seconds is not None):
            raise ValueError(f"qformer on {stream!r} has per {per!r} and seconds {seconds}; a window needs its seconds")
        if seconds is not None and seconds <= 0:
            raise ValueError(f"qformer on {stream!r} has seconds {seconds}; expected more than 0")
        if context is not None and (seconds is None or context < seconds):
            raise ValueError(
                f"qformer on {stream!r} has context {context}; expected at least the window's seconds ({seconds}), "
                "for what lies between narrower ones would not be read"
            )
        if num_queries < 1 or layers < 1:
            raise ValueError(
                f"qformer on {stream!r} has num_queries {num_queries} and layers {layers}; expected 1 or more"
            )
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        config = Blip2QFormerConfig(
            hidden_size=dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=intermediate or 4 * dim,
            cross_attention_frequency=cross_every,
            encoder_hidden_size=self.in_dim,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            vocab_size=2,  # the text side of the Q-Former is not used here
        )
        self.per, self.seconds, self.context, self.init = per, seconds, context, init
        self.query_tokens = nn.Parameter(torch.empty(1, num_queries, dim).normal_(std=config.initializer_range))
        self.qformer = Blip2QFormerModel(config)
        self.set_out_dim(dim)

    def adapt(self, tokens: Tokens, prompt: Prompt | None = None) -> Tokens:
        x, keep, span = self._groups(tokens)  # (B, G, M, D), (B, G, M), (B, G, 2)
        b, g = keep.shape[:2]
        real = keep.any(-1)  # (B, G)
        # Only groups that hold something are computed; the others stay zero and masked.
        read = self._read(x[real], keep[real]) if bool(real.any()) else None  # (G_real, Q, D')
        q, d = self.query_tokens.shape[1:]
        out = x.new_zeros(b, g, q, d, dtype=self.query_tokens.dtype if read is None else read.dtype)
        if read is not None:
            out[real] = read
        else:  # keep every parameter in the graph, so that gradients exist (as zeros) on every process
            out = out + 0.0 * sum(p.sum() for p in self.parameters())
        return Tokens(out, real[..., None].expand(b, g, q), span)  # (B, G, Q, D')

    def grid(self, grid: Grid) -> Grid:
        q = self.query_tokens.shape[1]
        if self.per == "frame":
            span, real = grid.span, grid.mask.any(-1)
        elif self.per == "clip":
            span, real = whole_span(grid.span[None], grid.mask.any(-1)[None])[0], grid.mask.any()[None]
        else:
            windows, keep = window_grid(grid, float(self.seconds or 0), self.context)
            span, real = windows.span[0], keep.flatten(1).any(1)
        return Grid(span, real[:, None].expand(-1, q))

    def _groups(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        if self.per == "frame":
            return tokens.x, tokens.mask, tokens.span
        if self.per == "clip":
            x, mask = tokens.flat()
            return x.unsqueeze(1), mask.unsqueeze(1), whole_span(tokens.span, tokens.mask.any(-1))
        windows: Windows = time_windows(tokens.span, tokens.mask.any(-1), float(self.seconds or 0), self.context)
        x, keep = gather_steps(tokens, windows)  # (B, W, K, P, D)
        return x.flatten(2, 3), keep.flatten(2, 3), windows.span

    def _read(self, x: Tensor, keep: Tensor) -> Tensor:
        queries = self.query_tokens.expand(x.shape[0], -1, -1)
        output = self.qformer(query_embeds=queries, encoder_hidden_states=x, encoder_attention_mask=keep.long())
        return output.last_hidden_state  # (G_real, Q, D')

    def load_init(self) -> None:
        """Start from a BLIP-2 checkpoint's Q-Former and query tokens, as ``init`` says.

        Raises:
            ValueError: the checkpoint's sizes are not this adapter's.
        """
        if self.init is None:
            return
        from transformers import Blip2ForConditionalGeneration

        source = Blip2ForConditionalGeneration.from_pretrained(self.init)
        theirs = {k: v for k, v in source.qformer.state_dict().items() if not k.startswith("embeddings.")}
        ours = {k for k in self.qformer.state_dict() if not k.startswith("embeddings.")}
        if set(theirs) != ours or source.query_tokens.shape != self.query_tokens.shape:
            odd = sorted(set(theirs) ^ ours)[:3]
            raise ValueError(
                f"qformer init {self.init!r}: query tokens {tuple(source.query_tokens.shape)}, {len(theirs)} tensors; "
                f"expected {tuple(self.query_tokens.shape)} and {len(ours)} (differing: {odd}); "
                "set dim, layers, heads, cross_every and num_queries to the checkpoint's"
            )
        self.qformer.load_state_dict(theirs, strict=False)
        with torch.no_grad():
            self.query_tokens.copy_(source.query_tokens)
