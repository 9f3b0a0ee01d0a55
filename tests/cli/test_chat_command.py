"""`avllm chat`: one model for many questions, from a pipe and from a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest
from answering import make_checkpoint
from tiny import COLOURS, write_clip
from typer.testing import CliRunner

from avllm.cli.chat import COMMANDS, complete
from avllm.cli.main import app
from avllm.errors import UserError
from avllm.inference.chat import Chat

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "what colour is it ?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    return [
        write_clip(folder / "a red one.mp4", COLOURS["red"], 300.0),
        write_clip(folder / "blue.mp4", COLOURS["blue"], None),
    ]


def command(checkpoint: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "avllm", "chat", str(checkpoint), *options]


def test_a_script_of_questions(checkpoint: Path, clips: list[Path]) -> None:
    """Answers alone are on stdout, our lines alone on stderr, and they are the chat's."""
    lines = [
        f"/video {clips[0]}",
        QUESTION,
        "",
        "and do you hear it ?",
        "/video no.mp4",
        "/video a\0b.mp4",
        "/vidoe x",
        f"/audio '{clips[0]}'",
        f"/video {clips[1]}",
        QUESTION,
        "/clear",
        QUESTION,
        "/quit",
        "never asked",
    ]
    done = subprocess.run(
        command(checkpoint, "--max-new-tokens", "12"),
        input="\n".join(lines),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    chat = Chat.load(checkpoint)
    files = {"video": clips[0]}
    expected = ["".join(chat.ask(QUESTION, **files, max_new_tokens=12))]
    expected.append("".join(chat.ask("and do you hear it ?", max_new_tokens=12)))
    more = {"video": clips[1], "audio": clips[0]}
    expected.append("".join(chat.ask(QUESTION, **more, max_new_tokens=12)))
    chat.clear()
    expected.append("".join(chat.ask(QUESTION, max_new_tokens=12)))
    assert done.stdout.splitlines() == expected
    errors = done.stderr.splitlines()
    notes = [line.partition(",")[0] for line in errors if not line.startswith("error")]
    silent = ["(the model said nothing)"] * expected.count("")
    assert notes == ["a red one.mp4", "a red one.mp4", "blue.mp4", *silent]
    (missing, nameless, unknown) = [line for line in errors if line.startswith("error: ")]
    assert "no.mp4: missing" in missing
    assert "b.mp4: missing" in nameless
    assert "'/video'" in unknown
    assert done.returncode == 1  # three lines failed


def test_ctrl_c_stops_an_answer_and_ctrl_d_ends(checkpoint: Path, clips: list[Path]) -> None:
    whole = "".join(Chat.load(checkpoint).ask(QUESTION, video=clips[0], max_new_tokens=200))
    assert len(whole.split()) > 100, "the model's answer is too short to be stopped"
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        command(checkpoint, "--max-new-tokens", "100000"),
        stdin=follower,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=lambda: _take_terminal(follower),
    )
    os.close(follower)
    assert process.stdout is not None
    answers = process.stdout.fileno()
    try:
        os.write(leader, f"/video {clips[0]}\n{QUESTION}\n".encode())
        said = read_until(answers, b" ")  # the answer has begun
        os.write(leader, b"\x03")
        said += read_until(answers, b"\n")
        stopped = said.decode().strip()
        assert whole.startswith(stopped[: len(whole)])
        assert process.poll() is None  # the chat goes on
        os.write(leader, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)


def _take_terminal(follower: int) -> None:
    """Make the pseudo terminal that of this process, so that Ctrl-C reaches it."""
    import fcntl
    import termios

    fcntl.ioctl(follower, termios.TIOCSCTTY, 0)


def read_until(descriptor: int, end: bytes, seconds: float = 60.0) -> bytes:
    """Read until some bytes have come."""
    content = b""
    while end not in content:
        ready, _, _ = select.select([descriptor], [], [], seconds)
        assert ready, f"nothing came for {seconds} s after {content!r}"
        content += os.read(descriptor, 2**16)
    return content


def test_tab_completes_commands_and_paths(clips: list[Path]) -> None:
    assert [complete("/cl", 0), complete("/cl", 1)] == ["/clear ", None]
    assert {complete("/", n) for n in range(len(COMMANDS))} == {f"{name} " for name in COMMANDS}
    folder = clips[0].parent
    assert complete(f"/video {folder}/a re", 0) == f"/video {clips[0]}"
    assert complete(f"/video {folder.parent}/{folder.name}", 0) == f"/video {folder}/"


def test_a_word_of_an_option_is_checked_first() -> None:
    for arguments in (["chat", "no-model"], ["ask", "no-model", "what ?"]):
        error = CliRunner().invoke(app, [*arguments, "--sound", "loud"]).exception
        assert isinstance(error, UserError)
        assert error.reason == "sound"
