"""Rows may name what they are allowed to, and no server holds a reader or fills its memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny import row, text, write_rows

from avllm.data.media.load import MediaError
from avllm.data.media.part import load_parts
from avllm.data.schema import AudioPart, ImagePart
from avllm.data.store import access, http
from avllm.data.store.access import AccessError, allow, check_file, check_url
from avllm.data.store.http import FetchError, fetch, size_of_url
from avllm.data.store.shards import pack_shards
from avllm.data.store.storage import check_access, open_bytes, size_of
from avllm.errors import OutageError, UserError

BODY = bytes(range(256)) * 40


class Server(BaseHTTPRequestHandler):
    """Serve a file, redirects, errors and bodies that never end."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """Answer with headers alone."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer by the path."""
        getattr(self, "serve_" + self.path.strip("/").partition("/")[0])()

    def start(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def serve_file(self) -> None:
        span = self.headers.get("Range")
        body = BODY
        if span:
            first, last = map(int, span.removeprefix("bytes=").split("-"))
            body = BODY[first : last + 1]
        self.start(206 if span else 200, Content_Length=len(body))
        if self.command == "GET":
            self.wfile.write(body)

    def serve_whole(self) -> None:
        """Serve the whole file, whatever range is asked for."""
        self.start(200, Content_Length=len(BODY))
        self.wfile.write(BODY)

    def serve_gone(self) -> None:
        self.start(404)

    def serve_down(self) -> None:
        self.start(503)

    def serve_away(self) -> None:
        self.start(302, Location=self.path.removeprefix("/away/"))

    def serve_circle(self) -> None:
        self.start(302, Location="/circle")

    def serve_claims(self) -> None:
        self.start(200, Content_Length=3 * 2**30)

    def serve_endless(self) -> None:
        self.start(200)
        self.pour(b"0" * 2**16, 0)

    def serve_drips(self) -> None:
        self.start(200, Content_Length=10**6)
        self.pour(b"0", 0.02)

    def pour(self, piece: bytes, pause: float) -> None:
        try:
            while True:
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(pause)
        except OSError:
            pass  # the reader has gone


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(autouse=True)
def _limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the settings after each test; use small limits; forget servers that answered."""
    monkeypatch.setattr(http, "_answered", {})
    monkeypatch.setenv(access.ROOTS, "")
    monkeypatch.setenv(access.URLS, "")
    monkeypatch.setattr(http, "MOST_BYTES", 2**20)
    monkeypatch.setattr(http, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(time, "sleep", lambda seconds, wait=time.sleep: wait(min(seconds, 0.05)))


def test_bytes_and_ranges(address: str) -> None:
    allow(urls=[address])
    assert fetch(f"{address}/file") == BODY
    assert fetch(f"{address}/file", 100, 50) == BODY[100:150]
    assert fetch(f"{address}/whole", 100, 50) == BODY[100:150]
    assert size_of_url(f"{address}/file") == size_of(f"{address}/file") == len(BODY)
    assert open_bytes(f"{address}/file").read() == BODY
    assert size_of_url(f"{address}/gone") is None
    with pytest.raises(FileNotFoundError):
        fetch(f"{address}/gone")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/a",
        "http://localhost/a",
        "http://[::1]/a",
        "http://169.254.169.254/latest/meta-data",
        "http://10.0.0.1/a",
        "http://192.168.1.1/a",
        "http://0.0.0.0/a",
        "http://2130706433/a",
        "http://[::ffff:127.0.0.1]/a",
    ],
)
def test_private_addresses_are_refused_unless_named(url: str) -> None:
    with pytest.raises((AccessError, FileNotFoundError)):
        fetch(url)


def test_a_redirect_is_checked_as_the_first_url_is(address: str) -> None:
    allow(urls=[address])
    assert fetch(f"{address}/away/{address}/file") == BODY
    for target in (
        "http://127.0.0.1:9/x",
        "file:///etc/passwd",
        "http://169.254.169.254/",
        "ftp://a/b",
    ):
        with pytest.raises(AccessError):
            fetch(f"{address}/away/{target}")
    with pytest.raises(FetchError):
        fetch(f"{address}/circle")


@pytest.mark.parametrize(
    ("path", "reason"), [("claims", "too_large"), ("endless", "too_large"), ("drips", "timeout")]
)
def test_bodies_are_bounded_in_size_and_time(address: str, path: str, reason: str) -> None:
    allow(urls=[address])
    began = time.monotonic()
    with pytest.raises(FetchError) as caught:
        fetch(f"{address}/{path}")
    assert caught.value.reason == reason
    assert time.monotonic() - began < 10


def test_an_outage_is_no_fault_of_a_row(address: str) -> None:
    allow(urls=[address, "http://127.0.0.1:9"])
    for url in (f"{address}/down", "http://127.0.0.1:9/nobody/listens"):
        with pytest.raises(OutageError):
            fetch(url)
        with pytest.raises(OutageError):
            size_of(url)
    assert not issubclass(OutageError, (ValueError, OSError))  # what boundaries of rows catch


def test_allowed_urls() -> None:
    allow(urls=["https://a.org/clips", "s3://bucket", "gs"])
    for url in ("https://a.org/clips/1.mp4", "https://a.org/clips", "s3://bucket/x", "gs://any/x"):
        check_url(url)
    for url in (
        "https://a.org/other",
        "https://a.org/clips/../other",
        "https://a.org/clipsize",
        "https://a.org@b.org/clips/1",
        "http://a.org/clips/1.mp4",
        "https://b.org/clips/1.mp4",
        "s3://bucket2/x",
    ):
        with pytest.raises(AccessError):
            check_url(url)


def test_media_roots(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "inner"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "a.wav").touch()
    (inside / "link.wav").symlink_to(outside / "a.wav")
    check_file(outside / "a.wav")  # without settings, any
    allow(roots=[inside])
    check_access(inside / "a.wav")
    check_access(f"{inside}/a.tar#0+5/a.wav")
    for path in (outside / "a.wav", inside / ".." / "inner" / "a.wav", inside / "link.wav"):
        for spelling in (path, f"file://{path}", f"{path}.tar#0+5/x.wav"):
            if "link" not in str(spelling) or spelling == path:
                with pytest.raises(AccessError):
                    check_access(spelling)
    with pytest.raises(AccessError):  # roots alone admit no URL
        check_access("https://a.org/x")
    with pytest.raises(UserError):
        allow(roots=[tmp_path / "nowhere"])


def test_packing_takes_no_file_from_outside(tmp_path: Path) -> None:
    data, secret = tmp_path / "data", tmp_path / "secret.wav"
    data.mkdir()
    secret.write_bytes(b"secret")
    (data / "own.wav").write_bytes(b"own")
    (data / "link.wav").symlink_to(secret)
    names = ["own.wav", "../secret.wav", str(secret), f"file://{secret}", "link.wav"]
    rows = [
        row(f"r{number}", [{"type": "audio", "audio": name}, text("what ?")], "red")
        for number, name in enumerate(names)
    ]
    manifest = write_rows(data / "rows.jsonl", rows)
    (packed,) = pack_shards([manifest], tmp_path / "out")
    assert (packed.rows, packed.dropped) == (1, {"outside": 4})
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "out").glob("*.tar"))
    (packed,) = pack_shards([manifest], tmp_path / "more", roots=[tmp_path])
    assert (packed.rows, packed.dropped) == (5, {})


def test_a_forbidden_file_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    allow(roots=[tmp_path / "in"])
    part = AudioPart.model_validate({"audio": "../out.wav"})
    (tmp_path / "out.wav").write_bytes(b"x")
    with pytest.raises(MediaError) as caught:
        load_parts([part], tmp_path / "in", sampling=None, rate=16_000)
    assert caught.value.reason == "forbidden"


def test_an_outage_ends_the_reading_of_rows(address: str, tmp_path: Path) -> None:
    allow(urls=[address])
    for kind, part in (("image", ImagePart), ("audio", AudioPart)):
        asked = part.model_validate({kind: f"{address}/down"})
        with pytest.raises(OutageError):
            load_parts([asked], None, sampling=None, rate=16_000)


def test_settings_reach_child_processes(tmp_path: Path) -> None:
    allow(roots=[tmp_path])
    assert os.environ[access.ROOTS] == os.path.realpath(tmp_path)
