"""A chat server on this machine for tests: real requests over HTTP, replies that a test decides."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[dict[str, Any], int], tuple[int, Any]]
"""(request, how often this prompt came before) -> (status, JSON or text)."""


class _Http(ThreadingHTTPServer):
    request_queue_size = 256  # connections that come at once


class Server:
    """A real server on this machine whose replies a test decides; it keeps what it was asked."""

    def __init__(self, reply: Reply) -> None:
        self.reply, self.requests, self.headers = reply, [], []
        self.now = self.most = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = _Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            before = sum(r["messages"] == request["messages"] for r in self.requests)
            self.requests.append(request)
            self.headers.append(dict(handler.headers))
            self.now += 1
            self.most = max(self.most, self.now)
        status, body = self.reply(request, before)
        with self._lock:
            self.now -= 1
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        try:
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(data)))
            if status == 429:
                handler.send_header("Retry-After", "0")
            handler.end_headers()
            handler.wfile.write(data)
        except OSError:
            pass  # the client's time was out


def said(text: str, finish: str = "stop") -> dict[str, Any]:
    return {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]
    }


def stop(server: Server) -> None:
    """End a server."""
    server.http.shutdown()
    server.http.server_close()
