"""Stream text while it is generated: the LLM runs in a thread and hands over tokens one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

REPLACEMENT = "\ufffd"  # a tokenizer's sign for a character whose last bytes are still to come


class StopOn(StoppingCriteria):
    """Ends the generation of all rows as soon as an event is set."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return for each row whether it ends: ``(R,)`` bool."""
        rows = input_ids.shape[0]
        return torch.full((rows,), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class TokenQueue(BaseStreamer):
    """Hands generated token ids from the generating thread to the reading one; None is the end."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[list[int] | None] = SimpleQueue()

    def put(self, value: Tensor) -> None:
        """Queue token ids; ``generate`` puts the (empty) prompt first, then one token a step."""
        self.queue.put(value.flatten().tolist())

    def end(self) -> None:
        """Do nothing: the generating thread puts the end itself, also after an error."""

    def __iter__(self) -> Iterator[list[int]]:
        while (ids := self.queue.get()) is not None:
            yield ids


def stream_text(
    generate: Callable[..., Any],
    decode: Callable[[list[int], bool], str],
    stop: Event,
    **arguments: Any,
) -> Iterator[str]:
    """Run ``generate`` in a thread and yield its text in pieces; joined, they are the whole answer.

    All ids are decoded each time, since some tokenizers decode a token differently when more
    follow: the text of transformers' own streamer can differ from the answer that is not streamed.
    Closing the iterator stops the thread.

    Args:
        generate: takes ``streamer``, ``stopping_criteria`` and ``arguments``.
        decode: returns the text of token ids without surrounding white space; its second argument
            says whether the ids are complete. Until they are, it may leave out what the next ones
            can change.
        stop: set it to end the answer early.

    Raises:
        Exception: whatever ``generate`` raised, in the reading thread.
    """
    tokens = TokenQueue()
    failure: list[BaseException] = []

    def work() -> None:
        criteria = StoppingCriteriaList([StopOn(stop)])
        try:
            generate(streamer=tokens, stopping_criteria=criteria, **arguments)
        except BaseException as error:  # noqa: BLE001 - raised again by the reader, below
            failure.append(error)
        finally:
            tokens.queue.put(None)

    thread = Thread(target=work, name="generate", daemon=True)
    thread.start()
    try:
        yield from _pieces(tokens, decode)
    finally:
        stop.set()
        thread.join()
    if failure:
        raise failure[0]


def _pieces(tokens: TokenQueue, decode: Callable[[list[int], bool], str]) -> Iterator[str]:
    """Yield the text by which each new token extends the text that was sent before."""
    ids: list[int] = []
    sent = ""
    for new in tokens:
        ids += new
        text = decode(ids, False)
        grown = text.startswith(sent) and len(text) > len(sent)
        if grown and not text.endswith(REPLACEMENT):
            yield text[len(sent) :]
            sent = text
    rest = decode(ids, True)[len(sent) :]
    if rest:
        yield rest
