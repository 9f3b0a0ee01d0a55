"""The chat demo in a real browser: drop a file, ask, a second turn, stop, clear, errors."""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from answering import KIND, REAL_MEDIA, WHY_NOT

from avllm.inference.chat import Chat

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
pytest.importorskip("gradio", reason="gradio is not installed")
screenshots = importlib.import_module("scripts.screenshots")
BROWSER = screenshots.find_browser()
PATIENCE = screenshots.PATIENCE
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
QUESTION = "what colour is it ?"
WATCH = """() => {
    window.seen = [];
    const look = () => {
        const last = [...document.querySelectorAll('#chat .bot.message')].pop();
        const size = last ? last.innerText.trim().length : 0;
        if (size && size !== window.seen.at(-1)) window.seen.push(size);
        if (window.seen.length === 4) document.querySelector('#stop').click();
    };
    new MutationObserver(look).observe(document.querySelector('#chat'),
        {childList: true, subtree: true, characterData: true});
}"""  # the lengths of the last answer; the fourth stops it: a look from outside may be too late
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def address(checkpoint: Path) -> Iterator[str]:
    """The demo as its command starts it."""
    with screenshots.demo(checkpoint, "--max-file-mb", "5") as started:
        yield started


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=screenshots.FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """A fresh visit; at its end nothing was asked of any other machine."""
    visit = browser.new_page(viewport={"width": 1280, "height": 1000})
    visit.set_default_timeout(PATIENCE)
    asked: list[str] = []
    visit.on("request", lambda request: asked.append(request.url))
    visit.goto(address)
    visit.wait_for_selector("#question textarea")
    yield visit
    assert [u for u in asked if not u.startswith((address, "blob:", "data:"))] == []
    visit.close()


# The page's parts change one after the other: whatever is read of it is waited for.


def drop(page: Any, path: Path) -> None:
    page.set_input_files("#file input[type=file]", path)
    tells(page, path.name)


def tells(page: Any, words: str) -> None:
    """Wait until the line about the file has these words."""
    expect(page.locator("#facts")).to_contain_text(words, use_inner_text=True)


def shows(page: Any, frames: int, spectrograms: int) -> None:
    """Wait until so many pictures of what the model gets are there."""
    for selector, count in (("#frames img", frames), ("#spectrogram img", spectrograms)):
        expect(page.locator(selector)).to_have_count(count)


def ask(page: Any, question: str, nth: int = 1) -> Any:
    """Ask the chat's nth question and wait until the next may be asked; where the answer stands."""
    page.fill("#question textarea", question)
    page.press("#question textarea", "Enter")
    answers = page.locator("#chat .bot.message")
    expect(answers).to_have_count(nth)
    expect(page.locator("#send")).to_be_enabled()
    return answers.last


def answers(page: Any, question: str, answer: str | re.Pattern[str], nth: int = 1) -> None:
    """Ask, and wait until the answer is this one."""
    expect(ask(page, question, nth)).to_have_text(answer, use_inner_text=True)


def clear(page: Any) -> None:
    """Forget the turns and the file."""
    page.click("#clear")
    expect(page.locator("#chat .message")).to_have_count(0)
    expect(page.locator("#frames")).to_have_count(0)


def longest_answer(page: Any, tokens: int) -> None:
    """Set the limit in the advanced settings, again until it stays: they begin with defaults."""
    field = page.get_by_label("number input for Longest answer, in tokens")
    if not field.is_visible():
        page.click("#advanced button")
    deadline = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < deadline:
        field.fill(str(tokens))
        field.press("Enter")
        page.wait_for_timeout(1000)
        if field.input_value() == str(tokens):
            return
    raise AssertionError(f"the longest answer does not stay at {tokens}")


def test_upload_ask_second_turn_clear(page: Any, checkpoint: Path, clips: list[Path]) -> None:
    chat = Chat.load(checkpoint)
    drop(page, clips[0])
    tells(page, "2 frames of 32 x 32 · 1.00 s of sound at 16 kHz")
    shows(page, frames=2, spectrograms=1)
    for nth, (question, media) in enumerate(
        [(QUESTION, {"video": clips[0]}), ("and do you hear it ?", {})], 1
    ):
        answers(page, question, "".join(chat.ask(question, **media, max_new_tokens=128)), nth)
    expect(page.locator("#chat .user.message")).to_have_count(2)
    clear(page)
    fresh = Chat(chat.model, chat.processor)
    said = "".join(fresh.ask(QUESTION, max_new_tokens=128))  # without the clip
    answers(page, QUESTION, said or "(the model said nothing)")


def test_sound_can_be_switched_off(page: Any, checkpoint: Path, clips: list[Path]) -> None:
    drop(page, clips[2])
    page.click("#sound input")
    shows(page, frames=2, spectrograms=0)
    tells(page, "no sound")
    said = Chat.load(checkpoint).ask(QUESTION, video=clips[2], sound="off", max_new_tokens=128)
    answers(page, QUESTION, "".join(said))


def test_the_answer_streams_and_stops(page: Any, checkpoint: Path, clips: list[Path]) -> None:
    whole = "".join(Chat.load(checkpoint).ask(QUESTION, video=clips[0], max_new_tokens=1024))
    assert len(whole.split()) > 200, "the model's answer is too short to be stopped"
    drop(page, clips[0])
    longest_answer(page, 1024)
    page.evaluate(WATCH)
    page.fill("#question textarea", QUESTION)
    page.click("#send")
    page.wait_for_function("window.seen.length > 3")
    expect(page.locator("#send")).to_be_enabled()
    stopped = (
        page.locator("#chat .bot.message").last.inner_text().strip()
    )  # at any moment the next lines hold of it
    assert whole.startswith(stopped)
    assert len(stopped) < len(whole)
    seen = page.evaluate("window.seen")
    assert seen == sorted(set(seen))  # it only grew
    longest_answer(page, 8)
    answers(page, "and ?", re.compile(r"^\s*\S+(\s+\S+){0,7}\s*$"), nth=2)


def test_errors_are_words_and_the_page_lives_on(
    page: Any, clips: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(clips[0].read_bytes()[:900])
    drop(page, broken)
    tells(page, "broken.mp4: truncated")
    answer = ask(page, QUESTION)
    expect(answer).to_contain_text("broken.mp4: truncated")
    expect(answer).not_to_contain_text("Traceback")
    expect(answer).not_to_contain_text(str(tmp_path))
    clear(page)
    expect(ask(page, "<|video|>")).to_contain_text(re.compile(r"\S"))  # a text like any other
    expect(ask(page, "red " * 3000, nth=2)).to_contain_text(re.compile(r"\d{4} tokens"))
    large = tmp_path / "large.mp4"
    large.write_bytes(bytes(6 * 2**20))
    page.set_input_files("#file input[type=file]", large)
    page.wait_for_selector(".toast-wrap, .toast-body", state="attached")
    page.reload()
    page.wait_for_selector("#question textarea")
    drop(page, clips[1])
    answers(page, QUESTION, re.compile(r"\S"))


@pytest.mark.skipif(not REAL_MEDIA, reason=WHY_NOT)
def test_real_media(page: Any, checkpoint: Path) -> None:
    """Each is shown as the model gets it, and answered as the API answers."""
    chat = Chat.load(checkpoint)
    longest_answer(page, 16)
    for path in REAL_MEDIA:
        drop(page, path)
        chat.clear()
        said = "".join(chat.ask(QUESTION, **{KIND[path.suffix]: path}, max_new_tokens=16))
        (seen,) = chat.perceived
        shows(page, 0 if seen.frames is None else len(seen.frames), int(seen.sound is not None))
        answers(page, QUESTION, said)
        clear(page)
