"""``avllm ask`` and the API example, on tiny clips and on real media."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from answering import KIND, REAL_MEDIA, WHY_NOT
from tiny import row, text, write_rows

from avllm.cli import main as cli
from avllm.inference.chat import Chat

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "what colour is it ?"


def ask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """Run ``avllm ask`` in this process; its output."""
    monkeypatch.setattr(sys, "argv", ["avllm", "ask", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    assert end.value.code == 0, err
    return out.strip()


def test_ask_prints_the_answer(
    checkpoint: Path,
    clips: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--video", str(clips[0]), "--audio", str(clips[2]), "--max-new-tokens", "12"]
    found = ask(monkeypatch, capsys, str(checkpoint), *options, QUESTION)
    said = Chat.load(checkpoint).ask(QUESTION, video=clips[0], audio=clips[2], max_new_tokens=12)
    assert found == "".join(said)


def test_ask_takes_a_decoder(
    checkpoint: Path,
    clips: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--video", str(clips[0]), "--max-new-tokens", "12", "--decoding"]
    found = ask(
        monkeypatch,
        capsys,
        str(checkpoint),
        *options,
        "{type: contrastive, noise: 0.9, alpha: 2}",
        QUESTION,
    )
    decoding = {"type": "contrastive", "noise": 0.9, "alpha": 2}
    chat = Chat.load(checkpoint)
    assert found == "".join(
        chat.ask(QUESTION, video=clips[0], max_new_tokens=12, decoding=decoding)
    )
    assert found != "".join(Chat.load(checkpoint).ask(QUESTION, video=clips[0], max_new_tokens=12))


def test_a_mistake_is_one_line(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments, message in [
        ([str(checkpoint), "--video", str(tmp_path / "no.mp4"), "what ?"], "no.mp4"),
        ([str(tmp_path), "what ?"], str(tmp_path)),
        ([str(checkpoint), "what ?", "--sound", "loud"], "loud"),
        ([str(checkpoint), "what ?", "--decoding", "{type: contrastive, alpa: 1}"], "'alpha'"),
    ]:
        monkeypatch.setattr(sys, "argv", ["avllm", "ask", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        err = capsys.readouterr().err
        assert end.value.code == 1
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1


def test_help_is_quick() -> None:
    code = (
        "import sys, avllm.cli.main; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'gradio')))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1


def test_api_example_runs(checkpoint: Path, clips: list[Path]) -> None:
    command = [sys.executable, "serve/api.py", str(checkpoint), str(clips[0]), QUESTION, "and ?"]
    found = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    first = "".join(Chat.load(checkpoint).ask(QUESTION, video=clips[0], max_new_tokens=64))
    assert found[:3] == [f"> {QUESTION}", first, "> and ?"]
    assert found[4].endswith(
        "1.00 s, 2 frames of (32, 32), 1.00 s of sound, tokens {'audio': 50, 'video': 32}"
    )


@pytest.mark.skipif(not REAL_MEDIA, reason=WHY_NOT)
def test_real_media(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each of the real files is answered, and the batch's answers are the command's."""
    from avllm.inference.batch import answer_file
    from avllm.inference.generation import Generation

    options = [str(checkpoint), "--max-new-tokens", "32"]
    asked = [
        ask(monkeypatch, capsys, *options, f"--{KIND[p.suffix]}", str(p), QUESTION)
        for p in REAL_MEDIA
    ]
    assert all(asked)
    assert len(set(asked)) > len(asked) // 2
    rows = [
        row(p.name, [{"type": KIND[p.suffix], KIND[p.suffix]: str(p)}, text(QUESTION)], "x")
        for p in REAL_MEDIA
    ]
    requests = write_rows(tmp_path / "requests.jsonl", rows)
    chat = Chat.load(checkpoint)
    output = tmp_path / "answers.jsonl"
    answer_file(
        lambda: (chat.model, chat.processor),
        checkpoint,
        requests,
        output,
        Generation(32),
        batch_size=5,
    )
    found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    answers = [{"id": line["id"], "answer": line["answer"]} for line in found]
    assert answers == [{"id": p.name, "answer": a} for p, a in zip(REAL_MEDIA, asked, strict=True)]
