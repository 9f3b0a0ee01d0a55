"""Answer the same when what does not matter changes: Modality interference (arXiv 2505.19616).

A question about the sound has the same answer whatever is seen. The answer's distribution with the
irrelevant stream disturbed is drawn towards the one with the clip as it is (section 4.2 there).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from avllm.distributed import sum_over_processes
from avllm.objectives.base import Objective
from avllm.objectives.next_token import targets
from avllm.precision import at_least_float32
from avllm.tokens import Tokens

if TYPE_CHECKING:
    from avllm.data.collate import Batch


class Consistency(Objective):
    """Sum, over the answers' tokens, the divergence between the clean and the disturbed answer.

    It goes beside ``next_token``, which teaches the clean answer: that one is the fixed target.

    Args:
        model: an AVLLM.
        irrelevant: by kind of question, the streams that do not matter to it:
            ``{heard: [video], seen: [audio]}``. ``heard`` is ``heard.pitch``, too.
        noise: share of the variance of the stream's features that becomes Gaussian noise, from
            above 0 to 1 (only noise). The variance as a whole stays.
    """

    compares = False
    figures = ("same",)

    def __init__(self, model: Any, *, irrelevant: dict[str, list[str]], noise: float = 1.0) -> None:
        super().__init__(model)
        known = set(model.connector[0].in_widths)
        named = [stream for streams in irrelevant.values() for stream in streams]
        unknown = sorted(set(named) - known)
        if unknown or not named:
            raise ValueError(
                f"consistency has irrelevant {irrelevant}; expected streams of the encoders by "
                f"kind of question: {sorted(known)}"
            )
        if not 0 < noise <= 1:
            raise ValueError(f"consistency has noise {noise}; expected more than 0, at most 1")
        self.irrelevant = {kind: set(streams) for kind, streams in irrelevant.items()}
        self.streams = sorted(set(named))
        self.noise = noise

    def weight(self, batch: Batch) -> float:
        """Count the answers' tokens to which a stream does not matter, once for each stream."""
        return float(sum(self._concerned(batch, stream).sum() for stream in self.streams))

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the divergence; ``same``: tokens whose likeliest word stays the same."""
        places = {stream: self._concerned(batch, stream) for stream in self.streams}  # (R, L) each
        # Processes run the LLM equally often: where its weights are spread, they wait for others.
        counts = torch.stack([places[stream].sum() for stream in self.streams])  # (S,)
        needed = sum_over_processes(counts).tolist()
        streams = [stream for stream, count in zip(self.streams, needed, strict=True) if count]
        features = model.media_steps(batch)[0]
        zero = torch.zeros((), device=batch.input_ids.device)
        loss, same = zero, zero
        if not streams:
            return loss, {"same": same}
        with torch.no_grad():
            clean = at_least_float32(model(batch).logits)  # (R, L, V)
        for stream in streams:
            disturbed = {**features, stream: self.disturb(features[stream])}
            embeds = model.merge_media(batch.input_ids, model.connect_for(batch, disturbed), batch)
            at = places[stream]
            logits = at_least_float32(model.run_llm(embeds, batch).logits[at])  # (n, V)
            loss = loss + divergence(clean[at], logits)
            same = same + (clean[at].argmax(-1) == logits.detach().argmax(-1)).float().sum()
        return loss, {"same": same}

    def disturb(self, tokens: Tokens) -> Tokens:
        """Mix noise into the real tokens of a stream; clock and mask stay.

        A clip's noise follows from its content and one number that is drawn, so that packing, by
        which rows share a clip, changes nothing.
        """
        drawn = int(torch.randint(2**31, ()))
        x = tokens.x.clone()  # (B, T, P, D)
        for clip in range(len(x)):
            real = tokens.x[clip][tokens.mask[clip]]  # (N, D)
            if not len(real):
                continue
            seed = drawn + hash(float(real.double().sum())) % 2**31
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(real.shape, generator=generator).to(real)
            noise = noise * real.std(correction=0)
            mixed = (1 - self.noise) ** 0.5 * real + self.noise**0.5 * noise
            x[clip][tokens.mask[clip]] = mixed
        return tokens.with_x(x)

    def _concerned(self, batch: Batch, stream: str) -> Tensor:
        """Return the places before the answer tokens to which a stream does not matter, (R, L)."""
        parts = batch.parts
        is_irrelevant = [self._is_irrelevant(stream, part.kind or "") for part in parts.items]
        chosen = parts.is_true(is_irrelevant) & parts.role_is("answer", "chosen")
        if stream in batch.streams:
            present = batch.streams[stream].mask.flatten(1).any(1)  # (B,)
            chosen = chosen & parts.set_clips.any(present)[parts.clip_set]
        else:
            chosen = torch.zeros_like(chosen)
        of_answer = torch.zeros_like(batch.labels, dtype=torch.bool)
        of_answer.view(-1)[parts.trained.pick(chosen).at] = True
        at, _ = targets(batch.labels)
        following = torch.zeros_like(of_answer)
        following[:, :-1] = of_answer[:, 1:]
        return at & following

    def _is_irrelevant(self, stream: str, kind: str) -> bool:
        streams: set[str] = set()
        for named, of_kind in self.irrelevant.items():
            if kind == named or kind.startswith(f"{named}."):
                streams |= of_kind
        return stream in streams


def divergence(clean: Tensor, logits: Tensor) -> Tensor:
    """Sum the Kullback-Leibler divergence of logits ``(n, V)`` from fixed clean ones."""
    target = clean.log_softmax(-1)
    result: Tensor = (target.exp() * (target - logits.log_softmax(-1))).sum()
    return result
