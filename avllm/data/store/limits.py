"""Bound the time of calls to stores, whose libraries may wait for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from avllm.data.store.http import CONNECT_SECONDS, GRACE_SECONDS, LEAST_RATE, MOST_SECONDS, TRIES
from avllm.errors import OutageError, one_line

T = TypeVar("T")
ANSWER_SECONDS = CONNECT_SECONDS * TRIES
"""In which a store has to say what it knows of a file."""
UNREACHABLE = ("ConnectionError", "ClientConnectionError", "HTTPClientError", "TimeoutError")
"""Base classes of the errors by which Python, botocore, aiohttp and requests report no answer."""


class NoAnswer(Exception):
    """A call did not end in time."""


def seconds_for(size: int | None) -> float:
    """Return the most seconds that so many bytes may take, as for http; None = not known."""
    if size is None:
        return MOST_SECONDS
    return min(MOST_SECONDS, GRACE_SECONDS + size / LEAST_RATE)


def within(seconds: float, url: str, call: Callable[[], T]) -> T:
    """Return a call's result, or its error, within some seconds.

    A call that does not end is left to its thread, which ends with the process.

    Raises:
        NoAnswer: it took longer. OutageError: the store cannot be reached.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller, below
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True, name="store")
    thread.start()
    thread.join(seconds)
    if results:
        return results[0]
    if not errors:
        raise NoAnswer(f"{url}: no answer within {seconds:.0f} s")
    names = {base.__name__ for base in type(errors[0]).__mro__}
    if names & set(UNREACHABLE):
        raise OutageError(f"{url}: {one_line(errors[0])}") from errors[0]
    raise errors[0]
