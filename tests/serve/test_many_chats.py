"""Many visitors of the demo who ask at once wait for their turn; none is sent away."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from avllm.inference.chat import Chat

pytest.importorskip("gradio", reason="gradio is not installed")
httpx = pytest.importorskip("httpx")
ROOT = Path(__file__).resolve().parents[2]
VISITORS = 45


@pytest.fixture
def demo(checkpoint: Path) -> Iterator[tuple[Any, str]]:
    spec = importlib.util.spec_from_file_location("chat_demo", ROOT / "serve/chat_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    demo = module.Demo(Chat.load(checkpoint), "tiny")
    hosts = ["127.0.0.1"]
    _, url, _ = module.serve(demo, "127.0.0.1", None, 5, hosts, prevent_thread_lock=True)
    yield demo, url.rstrip("/")
    demo.page.close()


def ask(url: str, function: int, visitor: int) -> tuple[int, list[dict[str, Any]]]:
    """Ask as the page does; return the status of the request and the events that follow."""
    data = [None, None, True, f"question {visitor} ?", [], 0.0, 1.0, 2, "none"]
    visit = {"data": data, "fn_index": function, "session_hash": f"visitor{visitor}"}
    with httpx.Client(base_url=f"{url}/gradio_api", timeout=120) as client:
        joined = client.post("/queue/join", json=visit)
        events = []
        if joined.status_code == 200:
            parameters = {"session_hash": visit["session_hash"]}
            with client.stream("GET", "/queue/data", params=parameters) as stream:
                for line in stream.iter_lines():
                    if line.startswith("data:"):
                        events.append(json.loads(line.removeprefix("data:")))
                    if events and events[-1]["msg"] in ("process_completed", "close_stream"):
                        break
        return joined.status_code, events


def test_visitors_wait_for_their_turn(demo: tuple[Any, str]) -> None:
    page, url = demo
    (function,) = [
        number
        for number, block in page.page.fns.items()
        if getattr(block.fn, "__name__", "") == "ask"
    ]
    with ThreadPoolExecutor(VISITORS) as pool:
        replies = list(pool.map(lambda visitor: ask(url, function, visitor), range(VISITORS)))
    assert [status for status, _ in replies] == [200] * VISITORS
    for visitor, (_, events) in enumerate(replies):
        assert events[-1]["msg"] == "process_completed"
        assert events[-1]["success"], events[-1]
        assert f"question {visitor} ?" in json.dumps(events)
