"""One row's dead host is that row's fault; an outage ends the run and makes no row bad."""

from __future__ import annotations

import functools
import socket
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny import row, text

from avllm.data.schema import Sample
from avllm.data.store import access, http
from avllm.errors import OutageError
from avllm.inference.batch import answer_samples
from avllm.inference.chat import Chat
from avllm.inference.generation import Generation


class Files(SimpleHTTPRequestHandler):
    """Serve a folder without a word."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def serve(folder: Path, port: int = 0) -> ThreadingHTTPServer:
    handler = functools.partial(Files, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


def address_of(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def server(clips: list[Path]) -> Iterator[ThreadingHTTPServer]:
    server = serve(clips[0].parent)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def dead() -> str:
    """An address at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget servers that answered and URLs that are admitted; do not wait between tries."""
    monkeypatch.setenv(access.ROOTS, "")
    monkeypatch.setenv(access.URLS, "")
    monkeypatch.setattr(http, "_answered", {})
    monkeypatch.setattr(http, "_dead", {})
    monkeypatch.setattr(time, "sleep", lambda seconds, wait=time.sleep: wait(min(seconds, 0.01)))


@pytest.fixture(scope="module")
def chat(checkpoint: Path) -> Chat:
    return Chat.load(checkpoint)


def admit(*urls: str) -> None:
    """Let rows name the addresses of this machine that URLs have."""
    access.allow(urls=[url.rpartition("/")[0] for url in urls])


def ask(chat: Chat, *urls: str) -> list[dict[str, Any]]:
    admit(*urls)
    samples = []
    for number, url in enumerate(urls):
        part = {"type": "audio", "audio": url}
        samples.append(Sample.model_validate(row(str(number), [part, text("what ?")], "x")))
    short = Generation(max_new_tokens=2)
    return list(answer_samples(chat.model, chat.processor, samples, generation=short, batch_size=2))


def test_a_dead_host_among_others_is_one_bad_row(
    chat: Chat, clips: list[Path], server: ThreadingHTTPServer, dead: str
) -> None:
    good = f"{address_of(server)}/{clips[0].name}"
    answers = ask(chat, f"{dead}/0.mp4", good, good, f"{dead}/1.mp4", good)
    assert ["error" in answer for answer in answers] == [True, False, False, True, False]
    assert "unreachable" in answers[0]["error"]


def test_without_a_host_that_answers_it_is_an_outage(chat: Chat, dead: str) -> None:
    with pytest.raises(OutageError):
        ask(chat, f"{dead}/0.mp4", f"{dead}/1.mp4")


def test_a_host_that_answered_before_and_does_not_now_is_an_outage(
    chat: Chat, clips: list[Path], server: ThreadingHTTPServer
) -> None:
    other = serve(clips[0].parent)
    good = f"{address_of(server)}/{clips[0].name}"
    lost = f"{address_of(other)}/{clips[1].name}"
    admit(good, lost)
    http.fetch(good)
    http.fetch(lost)
    other.shutdown()
    other.server_close()
    with pytest.raises(OutageError):
        http.fetch(lost)


def test_without_network_a_new_host_is_an_outage(clips: list[Path], dead: str) -> None:
    other = serve(clips[0].parent)
    good = f"{address_of(other)}/{clips[0].name}"
    new = f"{dead}/0.mp4"
    admit(good, new)
    http.fetch(good)
    other.shutdown()
    other.server_close()
    with pytest.raises(OutageError):
        http.fetch(new)
