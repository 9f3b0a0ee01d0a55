"""A user's mistake ends a command with one line; a bug keeps its traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import SafetensorError

from avllm.errors import DEBUG, UserError, WriteError, exit_on_user_error, loading, writing


@pytest.mark.parametrize(
    "error",
    [UserError("seen; expected; do"), FileNotFoundError(2, "No such file or directory", "/x/y")],
)
def test_a_users_mistake_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, exit_on_user_error():
        raise error
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize(
    "error", [ValueError("of numpy"), RuntimeError("of torch"), KeyError("x"), TypeError("y")]
)
def test_a_bug_is_not_hidden(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(error)), exit_on_user_error():
        raise error
    assert capsys.readouterr().err == ""


def test_ctrl_c_ends_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, exit_on_user_error():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == ""


def test_the_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEBUG, "1")
    with pytest.raises(UserError), exit_on_user_error():
        raise UserError("seen; expected; do")


def test_one_of_several_processes_says_which(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(SystemExit), exit_on_user_error():
        raise UserError("seen")
    assert capsys.readouterr().err == "error in process 2 of 4: seen\n"


def test_what_a_library_says_of_a_name_gets_the_name(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="the LLM.*a/b.*not on the hub") as refused,
        loading("the LLM", "a/b"),
    ):
        raise OSError("not on the hub")
    assert refused.value.reason == "loading"
    folder = f"{tmp_path}/x"
    with (
        pytest.raises(UserError, match=f"the LLM.*{folder}") as refused,
        loading("the LLM", folder),
    ):
        pytest.fail("nothing is tried")
    assert refused.value.reason == "missing"
    with pytest.raises(UserError, match=r"^seen$"), loading("the LLM", str(tmp_path)):
        raise UserError("seen")
    for damaged in (
        RuntimeError("sizes differ"),
        KeyError("layer"),
        TypeError("no dict"),
        RecursionError(),
    ):
        with pytest.raises(UserError) as refused, loading("the LLM", str(tmp_path)):
            raise damaged
        assert refused.value.reason == "loading"
    with pytest.raises(ImportError), loading("the LLM", str(tmp_path)):
        raise ImportError("a package is missing")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        RuntimeError("[enforce fail at inline_container.cc:664] .\nunexpected pos 64 vs 0"),
        Exception("No space left on device (os error 28)"),  # tokenizers
    ],
)
def test_a_file_that_cannot_be_written_is_named(error: Exception, tmp_path: Path) -> None:
    path = tmp_path / "not_made" / "trainable.pt"
    with pytest.raises(WriteError) as raised, writing(path):
        raise error
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "GB are free" in str(raised.value)
    with pytest.raises(TypeError), writing(path):
        raise TypeError("a bug")
