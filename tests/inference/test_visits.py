"""Visitors' chats keep no decoded clips, share a bounded memory, and end with the visit."""

from __future__ import annotations

import http.client
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from tiny import COLOURS, write_clip
from tiny_runs import free_port

from avllm.data.schema import RowError
from avllm.errors import UserError
from avllm.inference.chat import Chat
from avllm.inference.visits import Visits, failed, hosts_of

DEMO = Path(__file__).resolve().parents[2] / "serve" / "chat_demo.py"
QUESTION = "what colour is it ?"


@pytest.fixture(scope="module")
def chat(checkpoint: Path) -> Chat:
    return Chat.load(checkpoint)


def test_a_long_clip_is_kept_as_its_encoders_take_it(chat: Chat, tmp_path: Path) -> None:
    visit = Chat(chat.model, chat.processor)
    sizes = []
    for seconds in (1.0, 20.0):
        visit.clear()
        visit.look(video=write_clip(tmp_path / f"{seconds}.mp4", COLOURS["red"], None, seconds))
        sizes.append(visit.media_bytes)
    assert 0 < sizes[1] <= sizes[0]  # two frames of each, whatever the length
    assert not visit._reader._clips


def test_files_that_were_only_looked_at_are_dropped(chat: Chat, clips: list[Path]) -> None:
    visit = Chat(chat.model, chat.processor)
    for clip in clips * 3:
        visit.look(video=clip)
    assert len(visit.perceived) == 1


def test_released_media_are_read_again(chat: Chat, clips: list[Path]) -> None:
    visit = Chat(chat.model, chat.processor)
    "".join(visit.ask(QUESTION, video=clips[0], max_new_tokens=4))
    said = "".join(visit.ask("describe the clip", max_new_tokens=8))
    other = Chat(chat.model, chat.processor)
    "".join(other.ask(QUESTION, video=clips[0], max_new_tokens=4))
    other.release_media()
    assert other.media_bytes == 0
    assert "".join(other.ask("describe the clip", max_new_tokens=8)) == said


def test_memory_is_bounded_in_all_and_for_each(chat: Chat, clips: list[Path]) -> None:
    chats = [Chat(chat.model, chat.processor) for _ in range(3)]
    for visit in chats:
        visit.look(video=clips[0])
    size = chats[0].media_bytes
    visits = Visits(most_bytes=2 * size, most_bytes_in_all=2 * size)
    for number, visit in enumerate(chats):
        visits.note(str(number), visit)
    assert [visit.media_bytes for visit in chats] == [0, size, size]  # the oldest one is released
    visits.end("1")
    assert [visit.media_bytes for visit in chats] == [0, 0, size]
    with pytest.raises(UserError) as caught:
        Visits(most_bytes=size - 1).note("2", chats[2])
    assert caught.value.reason == "too_large"
    assert chats[2].media_bytes == 0


def test_a_full_history_says_that_clear_helps(chat: Chat, clips: list[Path]) -> None:
    visit = Chat(chat.model, chat.processor)
    error = RowError("too_long", "2000 tokens")
    assert "Clear" not in failed(error, visit)
    "".join(visit.ask(QUESTION, video=clips[0], max_new_tokens=2))
    assert "Clear" in failed(error, visit)


def test_hosts() -> None:
    assert "evil.org" not in hosts_of("127.0.0.1")
    assert {"demo.org", "127.0.0.1", "localhost"} <= set(hosts_of("0.0.0.0", ["demo.org"]))


def test_foreign_host_headers_are_refused(chat: Chat) -> None:
    pytest.importorskip("gradio")
    spec = spec_from_file_location("chat_demo", DEMO)
    assert spec is not None
    assert spec.loader is not None
    demo = module_from_spec(spec)
    spec.loader.exec_module(demo)
    page = demo.Demo(chat, "tiny")
    port = free_port()
    demo.serve(page, "127.0.0.1", port, 5, hosts_of("127.0.0.1"), prevent_thread_lock=True)
    try:
        answers = {}
        for host in (f"127.0.0.1:{port}", "localhost", "evil.org", f"evil.org:{port}"):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/config", headers={"Host": host})
            answers[host.partition(":")[0]] = connection.getresponse().status
            connection.close()
        assert answers == {"127.0.0.1": 200, "localhost": 200, "evil.org": 400}
        assert page.page.run_history is False
    finally:
        page.page.close()
