"""Make docs/chat.png: start the chat on a trained model, ask about a clip, picture the page.

    python scripts/screenshots.py CHECKPOINT CLIP --output docs/chat.png

Needs Chromium and the extras `serve` and `test`. Without --ask, it asks what the quickstart's
model knows.
"""

from __future__ import annotations

import argparse
import io
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = ["Which colour does the ring have?", "Is there a click at every bounce?"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
]
PATIENCE = 120_000  # milliseconds: a page is quick, a busy machine is not
LONGEST_START = 600  # seconds: a busy machine imports slowly
SIZE = {"width": 1180, "height": 860}


@contextmanager
def demo(checkpoint: Path, *options: str) -> Iterator[str]:
    """Serve the chat, with options of its command, on a free port and yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "serve/chat_demo.py", str(checkpoint.resolve()), "--port", str(port)]
    server = subprocess.Popen([*command, *options], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/", server)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(30)


def wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until the page is served.

    Raises:
        SystemExit: the demo ended before, or takes too long.
    """
    deadline = time.monotonic() + LONGEST_START
    while server.poll() is None:
        if time.monotonic() > deadline:
            raise SystemExit(f"the chat did not serve its page within {LONGEST_START} s")
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.3)
    raise SystemExit("the chat ended before it served its page; its message is above")


def find_browser() -> str | None:
    """Return the path of a Chromium, or None when none is installed."""
    for name in BROWSERS:
        path = shutil.which(name)
        if path is not None:
            return path
    return None


def converse(page: Any, clip: Path, questions: list[str]) -> None:
    """Drop a file and ask the questions, one after the other."""
    page.set_input_files("#file input[type=file]", clip)
    expect(page.locator("#facts")).to_contain_text(clip.name, use_inner_text=True)
    page.wait_for_timeout(1500)  # frames and spectrogram are drawn after the line of facts
    for number, question in enumerate(questions, start=1):
        page.fill("#question textarea", question)
        page.press("#question textarea", "Enter")
        expect(page.locator("#chat .bot.message")).to_have_count(number)
        expect(page.locator("#send")).to_be_enabled()
        print(f"{question} {page.locator('#chat .bot.message').last.inner_text().strip()}")
    page.wait_for_timeout(1500)


def save(picture: bytes, output: Path) -> None:
    """Write a picture with 128 colours, which keeps a page's text sharp and the file small."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.quantize(128, dither=Image.Dither.NONE).save(output, optimize=True)
    print(f"{output}: {output.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Read the command line, chat, and write the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="folder of a trained model")
    parser.add_argument("clip", type=Path, help="video, sound or picture")
    parser.add_argument("--ask", nargs="+", default=QUESTIONS, help="the questions")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "chat.png")
    arguments = parser.parse_args()
    browser = find_browser()
    if browser is None:
        raise SystemExit(f"no browser is installed; expected one of {', '.join(BROWSERS)}")
    expect.set_options(timeout=PATIENCE)
    with demo(arguments.checkpoint) as address, sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser, args=FLAGS)
        page = started.new_page(viewport=SIZE, color_scheme="light")
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.wait_for_selector("#question textarea")
        converse(page, arguments.clip, arguments.ask)
        save(page.screenshot(), arguments.output)
        started.close()


if __name__ == "__main__":
    main()
