"""Put a stream into the space of another's embeddings: SoundCLIP (arXiv 2506.10416, 3)."""

from __future__ import annotations

from torch import nn
from torch.nn.functional import pad

from avllm.adapters.base import Prompt, StreamAdapter
from avllm.tokens import Tokens


class SharedSpaceProjector(StreamAdapter):
    """Project a stream to the width of another encoder's space, such as sound to CLIP's.

    Train it with the objective ``contrastive`` between the two streams, then let the projected
    one take the other's place with the layout ``substitute``.

    Args:
        stream: the stream to project.
        like: the stream into whose space it goes, before any adapter has changed that one's width.
        mode: ``mlp``: two layers. ``raw``: the features unchanged, cut or filled with zeros to
            the width, for comparison.
        hidden: width inside the MLP; None: that of the result.
        normalize: bring the result to length 1, as CLIP's embeddings are.
    """

    def __init__(
        self,
        widths: dict[str, int],
        llm_dim: int,
        *,
        stream: str,
        like: str,
        mode: str = "mlp",
        hidden: int | None = None,
        normalize: bool = False,
    ) -> None:
        super().__init__(widths, llm_dim, stream)
        if mode not in ("mlp", "raw"):
            raise ValueError(
                f"shared_space_projector on {stream!r} has mode {mode!r}; expected 'mlp' or 'raw'"
            )
        self.dim = self.require(like)
        self.normalize = normalize
        self.mlp: nn.Sequential | None = None
        if mode == "mlp":
            inside = hidden or self.dim
            self.mlp = nn.Sequential(
                nn.Linear(self.in_dim, inside), nn.GELU(), nn.Linear(inside, self.dim)
            )
        self.set_out_dim(self.dim)

    def adapt(self, tokens: Tokens, prompt: Prompt | None = None) -> Tokens:
        if self.mlp is not None:
            x = self.mlp(tokens.x)
        else:
            x = pad(tokens.x[..., : self.dim], (0, max(0, self.dim - self.in_dim)))
        if self.normalize:
            x = nn.functional.normalize(x, dim=-1)
        return tokens.with_x(x)  # (B, T, P, D')
