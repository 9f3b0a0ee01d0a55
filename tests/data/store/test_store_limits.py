"""Stores that fsspec opens are bounded in time and size, as http servers are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from avllm.data.store import limits, storage
from avllm.data.store.http import FetchError
from avllm.data.store.storage import open_bytes, size_of
from avllm.errors import OutageError

BODY = b"x" * 3000


class SlowStore(MemoryFileSystem):
    """A store that hangs, or loses its connection, where a file's name says so."""

    protocol = "slow"
    release = threading.Event()

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        if "mute" in path:
            self.release.wait()
        if "lost" in path:
            raise ConnectionResetError("reset")
        if "huge" in path:
            return {"name": path, "type": "file", "size": 2**40}
        if "gone" in path:
            raise FileNotFoundError(path)
        return {"name": path, "type": "file", "size": len(BODY)}

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        if "hang" in path:
            self.release.wait()
        return BODY[start:end]


@pytest.fixture(autouse=True)
def _store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fsspec.register_implementation("slow", SlowStore, clobber=True)
    monkeypatch.setattr(limits, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(storage, "ANSWER_SECONDS", 0.2)
    SlowStore.release.clear()
    storage._fetch.cache_clear()
    yield
    SlowStore.release.set()


def test_what_answers_is_read() -> None:
    assert open_bytes("slow://bucket/a.mp4").read() == BODY
    assert open_bytes("slow://bucket/a.tar#10+20/b.mp4").read() == BODY[10:30]
    assert size_of("slow://bucket/a.mp4") == len(BODY)
    assert size_of("slow://bucket/gone.mp4") is None
    with pytest.raises(FileNotFoundError):
        open_bytes("slow://bucket/gone.mp4")


@pytest.mark.parametrize("name", ["hang.mp4", "hang.tar#10+20/b.mp4"])
def test_a_body_that_does_not_come_is_a_bad_file(name: str) -> None:
    with pytest.raises(FetchError) as refused:
        open_bytes(f"slow://bucket/{name}")
    assert refused.value.reason == "timeout"


def test_a_file_that_is_too_large_is_not_fetched() -> None:
    with pytest.raises(FetchError) as refused:
        open_bytes("slow://bucket/huge-hang.mp4")
    assert refused.value.reason == "too_large"


@pytest.mark.parametrize("name", ["mute.mp4", "lost.mp4"])
def test_a_store_that_says_nothing_is_an_outage(name: str) -> None:
    with pytest.raises(OutageError):
        size_of(f"slow://bucket/{name}")


def test_time_grows_with_size_up_to_a_bound() -> None:
    assert limits.seconds_for(0) == pytest.approx(0.2)
    assert limits.seconds_for(10**6) == pytest.approx(50.2)
    assert limits.seconds_for(2**40) == limits.MOST_SECONDS
    assert limits.seconds_for(None) == limits.MOST_SECONDS
