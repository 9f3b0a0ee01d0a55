"""Read a stream with learned queries: BLIP-2's Q-Former (arXiv 2301.12597).

The layers are transformers' own.

Per frame (BLIP-2, InstructBLIP), per window of time (SALMONN, arXiv 2310.13289), or over the whole
clip (the video and audio Q-Formers of Video-LLaMA, arXiv 2306.02858).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from avllm.adapters._blip2 import Blip2Weights, load_blip2
from avllm.adapters._cut import UnitCut
from avllm.adapters._instruction import Instruction
from avllm.adapters._qformer_text import QFormerText, Text, joint_mask
from avllm.adapters.base import Prompt, StreamAdapter
from avllm.errors import UserError, loading
from avllm.tokens import Grid, Tokens

# the text's feed-forwards in transformers' layers, beside `intermediate_query` and `output_query`
TEXT_LAYERS = re.compile(r"layer\.\d+\.(intermediate|output)\.")


class QFormer(StreamAdapter):
    r"""Read the tokens of each frame, window or clip with ``num_queries`` learned queries.

    Args:
        stream: the stream to read.
        num_queries: queries, hence tokens that each frame, window or clip becomes.
        per: ``frame`` (each time step by itself), ``window`` (needs ``seconds``) or ``clip``.
        seconds: length and distance of the windows.
        context: seconds that a window's queries see around its centre; more than ``seconds`` lets
            windows overlap.
        dim, layers, heads, intermediate: of the Q-Former; ``dim`` is the width that goes out.
        cross_every: every how many layers there is cross-attention (BLIP-2: 2; Video-LLaMA's second
            level: 1).
        dropout: of attention and hidden states.
        init: a hub name or folder of a transformers BLIP-2 or InstructBLIP checkpoint whose
            Q-Former and query tokens to start from; read by :meth:`load_init` only, never while a
            saved model is rebuilt.
        text: gives it BLIP-2's text side, for the objectives ``qformer_contrastive``,
            ``qformer_matching`` and ``qformer_captioning``: separate feed-forwards for text,
            embeddings and heads. ``llm``: texts are the LLM's tokens, embedded and written by the
            frozen LLM's own tables. A number: the size of a separate vocabulary, whose tokenizer
            the objectives name (BLIP-2's: 30523). Media become the same without it. A stage without
            these objectives should freeze it, or weight decay shrinks it:
            ``['connector\.\d+\.(text|.*layer\.\d+\.(intermediate|output))\.', null]``.
        instruction: lets the queries read the question that is asked (InstructBLIP, arXiv
            2305.06500; APT, arXiv 2312.00249): ``llm`` for the LLM's own tokens, or the hub name or
            folder of a tokenizer (InstructBLIP's checkpoints have BERT's). Rows then train one
            answer each, and every question makes its own tokens of a clip.
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
        text: str | int | None = None,
        instruction: str | None = None,
    ) -> None:
        super().__init__(widths, llm_dim, stream)
        self.cut = UnitCut(f"qformer on {stream!r}", per, seconds, context)
        _check_sizes(stream, num_queries, layers, text)
        reads_text = text is not None or instruction is not None
        sizes: dict[str, Any] = {
            "hidden_size": dim,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        }
        sizes |= {
            "intermediate_size": intermediate or 4 * dim,
            "cross_attention_frequency": cross_every,
        }
        config = Blip2QFormerConfig(
            **sizes,
            encoder_hidden_size=self.in_dim,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            vocab_size=2,  # transformers' Q-Former embeds no words itself
            use_qformer_text_input=reads_text,
        )
        self.init = init
        std, longest = config.initializer_range, config.max_position_embeddings
        self.query_tokens = nn.Parameter(torch.empty(1, num_queries, dim).normal_(std=std))
        self.qformer = Blip2QFormerModel(config)
        self.text: QFormerText | None = None
        if text is not None:
            vocabulary = None if text == "llm" else int(text)
            self.text = QFormerText(dim, llm_dim, vocabulary=vocabulary, longest=longest, std=std)
        self.instruction: Instruction | None = None
        if instruction is not None:
            self.instruction = Instruction(
                dim, llm_dim, source=instruction, longest=longest, std=std
            )
        self.conditioned = instruction is not None
        self.set_out_dim(dim)

    def adapt(self, tokens: Tokens, prompt: Prompt | None = None) -> Tokens:
        x, keep, span = self.cut.of(tokens)  # (B, G, M, D), (B, G, M), (B, G, 2)
        b, g = keep.shape[:2]
        real = keep.any(-1)  # (B, G)
        question: Text | None = None
        if self.instruction is not None and prompt is not None:
            clip = real.nonzero()[:, 0]  # (G_real,) the clip of each group
            question = self.instruction(prompt).pick(clip)
        queries = self.query_tokens.shape[1]
        # Units that hold something, (G_real, Q, D'); the others stay zero and masked.
        read = self.read(x[real], keep[real], question)[:, :queries]
        out = read.new_zeros(b, g, *read.shape[1:])
        out[real] = read
        if self._reads_text and torch.is_grad_enabled():
            # Where no text is read, the gradient of its weights is zero; ZeRO-3's are empty shells.
            weights = [p.sum() for p in self._text_parameters() if p.numel()]
            out = out + 0.0 * sum(weights)
        return Tokens(out, real[..., None].expand(b, g, read.shape[1]), span)  # (B, G, Q, D')

    def grid(self, grid: Grid) -> Grid:
        return self.cut.grid(grid, self.query_tokens.shape[1])

    def units(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the queries read at a time: the frames, windows or clips that hold something.

        Args:
            tokens: the stream as it enters, ``(B, T, P, D)``.

        Returns:
            ``(K, M, D)`` features, ``(K, M)`` their mask, and ``(K,)`` the clip of each unit.
        """
        x, keep, _ = self.cut.of(tokens)
        real = keep.any(-1)  # (B, G)
        return x[real], keep[real], real.nonzero()[:, 0]

    def read(
        self, x: Tensor, keep: Tensor, text: Text | None = None, causal: bool = False
    ) -> Tensor:
        """Read units with the queries, and with a text beside them.

        Args:
            x, keep: as :meth:`units` gives them.
            text: ``(K, L, D')`` one for each unit.
            causal: see :func:`~avllm.adapters._qformer_text.joint_mask`.

        Returns:
            ``(K, Q + L, D')``: the queries' outputs, then the text's.
        """
        if not len(x):
            # Processes run the same modules there and back, also one that has nothing to read.
            blank = x.new_zeros(1, 1, x.shape[-1]) + x.sum(), keep.new_ones(1, 1)
            return self.read(*blank, text.blank() if text else None, causal)[:0]
        queries = self.query_tokens.expand(x.shape[0], -1, -1)
        given: dict[str, Any] = {"encoder_hidden_states": x, "encoder_attention_mask": keep.long()}
        if text is not None:
            q = queries.shape[1]
            given["query_length"], given["attention_mask"] = q, joint_mask(q, text.mask, causal)
            # Of a mask (K, M) transformers would make one for the text, too; it has no use for it.
            given["encoder_attention_mask"] = keep[:, None, None].expand(-1, 1, q, -1)
            queries = torch.cat([queries, text.x.to(queries.dtype)], 1)
        return self.qformer(query_embeds=queries, **given).last_hidden_state

    def read_text(self, text: Text) -> Tensor:
        """Read texts by themselves, which see neither queries nor media, ``(K, L, D')``."""
        if not len(text.x):
            return self.read_text(text.blank())[:0]
        return self.qformer(
            query_embeds=text.x, query_length=0, attention_mask=text.mask.long()
        ).last_hidden_state

    @property
    def _reads_text(self) -> bool:
        return self.text is not None or self.instruction is not None

    def _text_parameters(self) -> list[nn.Parameter]:
        names = ("text.", "instruction.")
        return [
            p
            for name, p in self.named_parameters()
            if name.startswith(names) or TEXT_LAYERS.search(name)
        ]

    def load_init(self) -> None:
        """Start from the Q-Former, query tokens and text side of ``init``'s BLIP-2 checkpoint.

        Raises:
            UserError: it cannot be loaded, its sizes are not this adapter's, or it lacks a text
                side that is wanted.
        """
        if self.init is None:
            return
        with loading("qformer init", self.init):
            source = load_blip2(self.init, with_text=self._reads_text)
            self._check_source(source)
            self._copy(source)

    def _copy(self, source: Blip2Weights) -> None:
        """Take the weights of a checkpoint that fits."""
        self.qformer.load_state_dict(self._layers_of(source))
        with torch.no_grad():
            self.query_tokens.copy_(source.query_tokens)
        if self.text is not None:
            begins = None if self.text.vocabulary is None else text_begins(str(self.init))
            self.text.load_blip2(source.text, begins)
        if self.instruction is not None:
            self.instruction.load_instructblip(source.instruction)

    def _layers_of(self, source: Blip2Weights) -> dict[str, Tensor]:
        """Return the layers of a checkpoint that this Q-Former has."""
        if self._reads_text:
            return source.qformer
        return {key: x for key, x in source.qformer.items() if not TEXT_LAYERS.search(key)}

    def _check_source(self, source: Blip2Weights) -> None:
        """Refuse a checkpoint whose Q-Former has other sizes.

        Raises:
            UserError: names what differs.
        """
        theirs = self._layers_of(source)
        ours = self.qformer.state_dict()
        odd = sorted(set(theirs) ^ set(ours))
        odd += sorted(
            key for key in set(theirs) & set(ours) if theirs[key].shape != ours[key].shape
        )
        same_queries = source.query_tokens.shape == self.query_tokens.shape
        heads = self.qformer.config.num_attention_heads
        if odd or not same_queries or source.heads != heads:
            raise UserError(
                f"qformer init {self.init!r}: query tokens {tuple(source.query_tokens.shape)}, "
                f"{len(theirs)} tensors, {source.heads} heads; "
                f"expected {tuple(self.query_tokens.shape)}, {len(ours)} and {heads} (differing: "
                f"{odd[:3]}); set dim, layers, heads, cross_every and num_queries to the "
                "checkpoint's"
            )


def _check_sizes(stream: str, num_queries: int, layers: int, text: str | int | None) -> None:
    """Check numbers of queries and layers, and the vocabulary.

    Raises:
        ValueError: a number below 1, or a text side that is neither the LLM's nor of a size.
    """
    if num_queries < 1 or layers < 1:
        raise ValueError(
            f"qformer on {stream!r} has num_queries {num_queries} and layers {layers}; "
            "expected 1 or more"
        )
    is_size = isinstance(text, int) and not isinstance(text, bool) and text > 0
    if text not in (None, "llm") and not is_size:
        raise ValueError(
            f"qformer on {stream!r} has text {text!r}; expected 'llm' or the size of a vocabulary"
        )


def text_begins(name: str) -> tuple[int, int]:
    """Return the ids with which a BLIP-2 checkpoint's texts begin.

    Those that it reads begin with [CLS], those that it writes with [DEC].

    Raises:
        ValueError: its tokenizer has no such tokens.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    read, write = tokenizer.cls_token_id, tokenizer.bos_token_id
    if read is None or write is None:
        raise ValueError(
            f"qformer init {name!r}: its tokenizer has cls {read} and bos {write}; expected the "
            "ids of [CLS] and [DEC], with which BLIP-2's texts begin"
        )
    return int(read), int(write)
