"""Serve chats to visitors of a page: bounded memory, answers that grow, errors without folders."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from avllm.data.schema import RowError
from avllm.errors import OutageError, UserError
from avllm.inference.chat import Chat

NOTHING = "(the model said nothing)"
REDRAW = 0.04  # seconds between two drawings of an answer that grows


class Visits:
    """Bound the memory that the media of all visitors' chats take.

    Args:
        most_bytes: of one chat.
        most_bytes_in_all: of all chats; the media of those that asked least recently are released
            first, and read again with their next question.
    """

    def __init__(self, most_bytes: int = 2**28, most_bytes_in_all: int = 2**31) -> None:
        self.most_bytes = most_bytes
        self.most_bytes_in_all = most_bytes_in_all
        self._chats: dict[str, Chat] = {}  # by visit, the one that asked last at the end
        self._lock = threading.Lock()

    def note(self, visit: str, chat: Chat) -> None:
        """Note that a visit's chat was used, and release what does not fit.

        Raises:
            UserError: this chat's media alone are too large; they are released.
        """
        with self._lock:
            self._chats.pop(visit, None)
            self._chats[visit] = chat
            size = chat.media_bytes
            if size > self.most_bytes:
                chat.release_media()
                raise UserError(
                    f"the files of this chat take {size / 1e6:.0f} MB of memory, and "
                    f"{self.most_bytes / 1e6:.0f} are allowed; press Clear and ask about a shorter "
                    "file",
                    reason="too_large",
                )
            total = sum(other.media_bytes for other in self._chats.values())
            for other in self._chats.values():
                if total <= self.most_bytes_in_all:
                    return
                if other is not chat:
                    total -= other.media_bytes
                    other.release_media()

    def end(self, visit: str) -> None:
        """Forget the chat of a visit that has ended."""
        with self._lock:
            chat = self._chats.pop(visit, None)
        if chat is not None:
            chat.clear()


def growing_answer(chat: Chat, question: str, options: dict[str, Any]) -> Iterator[str]:
    """Yield the answer as often as it is drawn, longer each time.

    Warnings about it, or an error, are put at its end.
    """
    answer = ""
    drawn_at = 0.0
    try:
        for piece in chat.ask(question, **options):
            answer += piece
            if time.monotonic() - drawn_at > REDRAW:
                drawn_at = time.monotonic()
                yield answer
        warnings = [f"⚠️ {warning}" for warning in chat.warnings]
        yield "\n\n".join([answer or NOTHING, *warnings])
    except (ValueError, OSError, RuntimeError, OutageError) as error:  # also out of memory
        yield answer + failed(error, chat)
    finally:
        chat.stop()


def readable(error: BaseException) -> str:
    """Return an error's message for a visitor, without the server's folders."""
    text = str(error).strip() or type(error).__name__
    path = getattr(error, "path", None)
    if path:
        text = text.replace(path, Path(path).name)
    return f"⚠️ {text}"


def failed(error: BaseException, chat: Chat) -> str:
    """Return the message that is shown in place of an answer."""
    advice = "This question is not part of the chat; ask again, or drop another file."
    if isinstance(error, RowError) and error.reason == "too_long" and chat.messages:
        advice = "The chat is full, and this question is not part of it; Clear begins a new one."
    return f"{readable(error)}\n\n{advice}"


def hosts_of(host: str, more: Collection[str] = ()) -> list[str]:
    """Return the values of the ``Host`` header that a server on an address answers to.

    Any page that a visitor opens can send requests to this machine under a name of its choice (DNS
    rebinding); its name is none of these.

    Args:
        host: the address that the server listens on.
        more: further names, of a proxy for example.
    """
    names = {"localhost", "127.0.0.1", "[::1]", host, *more}
    if host in ("0.0.0.0", "::"):  # noqa: S104 (compared, not listened on)
        names.add(socket.gethostname())
        names.update(_own_addresses())
    return sorted(names)


def _own_addresses() -> set[str]:
    try:
        found = socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        return set()
    return {str(address[4][0]) for address in found}
