"""Ask an OpenAI-compatible server: several requests at a time, time-outs, growing pauses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import tenacity

from avllm.text_models.base import Answer, ModelPrompt, TextModelError, spoken

PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Status codes of failures that may be over soon."""
LONGEST_PAUSE = 300.0  # seconds, whatever a server asks for
REFUSALS = ("content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation")
TOO_LONG = (
    "context_length_exceeded",
    "context length",
    "context size",
    "too many tokens",
    "prompt is too long",
)


class _PassingError(Exception):
    """A failure that may be over soon; ``pause``: seconds that the server asked for."""

    def __init__(self, seen: str, pause: float = 0.0) -> None:
        super().__init__(seen)
        self.pause = pause


class ServerModel:
    """The model of a server that speaks the OpenAI API (``/chat/completions``), at temperature 0.

    Args:
        url: up to and with ``/v1``.
        model: its name on the server.
        max_new_tokens: longest answer, in tokens; a longer one counts as ``cut_off``.
        batch_size: requests at a time.
        timeout: seconds until a request counts as failed.
        attempts: how often a request is made before the job stops; the answers of earlier batches
            are kept.
        pause: seconds before the second attempt; they double from one to the next. A server's
            Retry-After is respected.
        key_variable: environment variable that holds the key, if the server needs one. The key is
            never written down.
        identity: answers are cached under this name instead of the address, which may change from
            day to day.
        extra: further fields of the request; null takes one out
            (``{max_tokens: null, max_completion_tokens: 200}``).

    Raises:
        TextModelError: ``no_model`` is named.
    """

    def __init__(
        self,
        url: str,
        model: str,
        max_new_tokens: int = 128,
        batch_size: int = 8,
        timeout: float = 120.0,
        attempts: int = 6,
        pause: float = 1.0,
        key_variable: str = "OPENAI_API_KEY",
        identity: str | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        if not model:
            raise TextModelError(f"{url}: no model named; expected {url}#MODEL", reason="no_model")
        self.url = url.rstrip("/")
        self.model = model
        self.batch_size = batch_size
        self.name = identity or self.url
        fields = {
            "model": model,
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "seed": 0,
            **(extra or {}),
        }
        self.fields = {key: value for key, value in fields.items() if value is not None}
        key = os.environ.get(key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(
            timeout=timeout,
            headers=headers,
            follow_redirects=False,
            # The batch is the limit; by default it is 100, and more requests time out waiting.
            limits=httpx.Limits(max_connections=None),
        )
        self.attempts = attempts
        self.pause = pause

    @property
    def identity(self) -> dict[str, Any]:
        """The server and the fields of the request."""
        return {"type": "server", "server": self.name, **self.fields}

    def answer(self, prompts: Sequence[ModelPrompt]) -> list[Answer]:
        """Answer each prompt, see :class:`avllm.text_models.base.TextModel`."""
        with ThreadPoolExecutor(max(1, self.batch_size), thread_name_prefix="ask") as pool:
            futures = [pool.submit(self._ask, prompt) for prompt in prompts]
            try:
                return [future.result() for future in futures]
            finally:
                for future in futures:
                    future.cancel()

    def _ask(self, prompt: ModelPrompt) -> Answer:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_PassingError),
            stop=tenacity.stop_after_attempt(self.attempts),
            wait=self._pause,
            reraise=True,
        )
        try:
            return retrying(self._once, prompt)
        except _PassingError as error:
            raise TextModelError(
                f"{self.url} did not answer in {self.attempts} attempts; the last one: {error}. "
                "Is the server up? Start again when it is: what is answered is kept",
                reason="no_answer",
            ) from error

    def _pause(self, state: tenacity.RetryCallState) -> float:
        """Return the seconds until the next attempt."""
        growing = tenacity.wait_exponential_jitter(initial=self.pause, max=60.0, jitter=self.pause)
        pause = growing(state)
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, _PassingError):
            pause = max(pause, error.pause)
        return min(pause, LONGEST_PAUSE)

    def _once(self, prompt: ModelPrompt) -> Answer:
        try:
            reply = self.client.post(
                f"{self.url}/chat/completions",
                json={**self.fields, "messages": prompt.messages},
            )
        except httpx.TransportError as error:  # time-outs too
            raise _PassingError(f"{type(error).__name__}: {error}") from error
        if reply.status_code in PASSING:
            seen = f"status {reply.status_code}: {reply.text[:200]}"
            raise _PassingError(seen, _retry_after(reply))
        if reply.status_code != 200:
            return self._refused(reply)
        return self._read(reply)

    def _refused(self, reply: httpx.Response) -> Answer:
        """Return why this prompt was refused; raise where the status concerns all prompts."""
        seen = f"status {reply.status_code}: {reply.text[:300]}"
        if reply.status_code in (400, 413, 422):
            if any(word in reply.text for word in REFUSALS):
                return Answer(reason="refused", detail=seen)
            if any(word in reply.text.lower() for word in TOO_LONG):
                return Answer(reason="prompt_too_long", detail=seen)
        raise TextModelError(f"{self.url}, model {self.model!r}: {seen}", reason="refused_request")

    def _read(self, reply: httpx.Response) -> Answer:
        try:
            choice = reply.json()["choices"][0]
            message = choice["message"]
            reason = choice.get("finish_reason")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            seen = reply.text[:200]
            raise TextModelError(
                f"{self.url} answered {seen!r}; expected the JSON of /chat/completions",
                reason="no_json",
            ) from error
        if message.get("refusal") or reason == "content_filter":
            return Answer(reason="refused", detail=str(message.get("refusal") or "content filter"))
        if reason == "length":
            return Answer(reason="cut_off", detail="the answer was longer than the limit of tokens")
        return Answer(spoken(message.get("content") or ""))


def _retry_after(reply: httpx.Response) -> float:
    """Return the seconds of a Retry-After header; 0 for a date or none."""
    text = reply.headers.get("retry-after", "")
    return float(text) if text.isdigit() else 0.0
