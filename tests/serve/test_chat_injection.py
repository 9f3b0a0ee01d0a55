"""The chat shows what people and the model write as text: nothing runs, loads or is styled."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from avllm.inference.chat import Chat
from avllm.inference.drawing import as_html, escaped

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
pytest.importorskip("gradio", reason="gradio is not installed")
ROOT = Path(__file__).resolve().parents[2]
BROWSER = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
]
ELSEWHERE = "http://127.0.0.1:9"
TEXTS = [
    f"<img src='{ELSEWHERE}/a.png' onerror='window.hit=1'>",
    "<script>window.hit=1</script><b>bold</b><thinking>x</thinking>",
    f"![picture]({ELSEWHERE}/b.png) [link](javascript:window.hit=1) {ELSEWHERE}/c",
    "2*3*4 and _a_ `b` $x^2$ # no heading",
    "one\ntwo",
    "a < b & c &lt; d &copy",
]


class Parrot(Chat):
    """A chat whose answer is the question: no tiny model writes such texts by itself."""

    def ask(self, question: Any, **options: Any) -> Iterator[str]:
        """Yield the question in two pieces."""
        yield from (question[:5], question[5:])


@pytest.fixture(scope="module")
def address(checkpoint: Path) -> Iterator[str]:
    spec = importlib.util.spec_from_file_location("chat_demo", ROOT / "serve/chat_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    chat = Chat.load(checkpoint)
    demo = module.Demo(chat, "tiny")
    demo.new_chat = lambda: Parrot(chat.model, chat.processor)
    _, url, _ = module.serve(demo, "127.0.0.1", None, 5, ["127.0.0.1"], prevent_thread_lock=True)
    yield url
    demo.page.close()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_questions_answers_and_names_are_shown_as_text(
    address: str, clips: list[Path], tmp_path: Path
) -> None:
    named = tmp_path / "<img src=x onerror=window.hit=1>*b*.mp4"
    shutil.copy(clips[0], named)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page()
        page.set_default_timeout(120_000)
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        page.wait_for_selector("#question textarea")
        page.set_input_files("#file input[type=file]", named)
        expect(page.locator("#facts")).to_contain_text("2 frames of 32 x 32", timeout=120_000)
        for number, text in enumerate(TEXTS, start=1):
            page.fill("#question textarea", text)
            page.click("#send")
            expect(page.locator("#chat .bot.message")).to_have_count(number, timeout=120_000)
            expect(page.locator("#send")).to_be_enabled(timeout=120_000)
            assert page.locator("#chat .bot.message").last.inner_text().strip() == text
            question = page.locator("#chat .user.message").last.inner_text().strip()
            assert question.endswith(text)
            assert number > 1 or question.startswith(page.locator("#facts strong").inner_text())
        inside = "#chat .message :is(img, script, a, b, em, strong, h1, code), "
        inside += "#facts :is(img, script, a, em)"
        assert page.locator(inside).count() == 0
        assert page.evaluate("window.hit") is None
        assert [url for url in requests if not url.startswith((address, "blob:", "data:"))] == []
        browser.close()


def test_markdown_shows_escaped_text_unchanged() -> None:
    from markdown_it import MarkdownIt

    assert as_html("a < b & c") == "a < b & c"  # what is copied is what was said
    for text in [*TEXTS[:4], "<img src=x onerror=window.hit=1>*b*.mp4", "a&lt;b", "\\*"]:
        (inline,) = [token for token in MarkdownIt().parse(escaped(text)) if token.type == "inline"]
        assert {token.type for token in inline.children} <= {"text", "text_special"}
        assert "".join(token.content for token in inline.children) == text
