"""A kill leaves a checkpoint as it was, or the new one, and never half of each."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from answering import make_checkpoint

from avllm.errors import WriteError
from avllm.models import checkpoint, whole_folder
from avllm.models.checkpoint_format import MANIFEST
from avllm.models.loading import digests
from avllm.models.loading.digests import ALL_FILES, compare_files, write_manifest
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.models.whole_folder import replacing

FILES = ("config.json", "trained.safetensors", "lora/default/adapter_model.safetensors")


def write(folder: Path, content: str, files: tuple[str, ...] = FILES) -> None:
    """Write a checkpoint whose files all have one content."""
    with replacing(folder, ALL_FILES) as partial:
        for name in files:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text(content)
        write_manifest(partial, ALL_FILES, stages=[{"stage": content}])


def contents(folder: Path) -> set[str]:
    """Check a checkpoint with its manifest; return the contents of its files."""
    assert all(file.state == "same" for file in compare_files(folder, ALL_FILES))
    return {path.read_text() for name in FILES if (path := folder / name).is_file()}


def test_files_are_replaced_and_others_stay(tmp_path: Path) -> None:
    write(tmp_path / "best", "old", (*FILES, "objectives.safetensors", "tokenizer.json"))
    (tmp_path / "best" / "notes.txt").write_text("mine")
    write(tmp_path / "best", "new")
    assert contents(tmp_path / "best") == {"new"}
    names = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert names == {f"best/{name}" for name in (*FILES, MANIFEST, "notes.txt")}


def test_a_run_folder_keeps_its_other_folders(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step_1").mkdir(parents=True)
    (run / "logs").symlink_to(tmp_path)
    write(run, "old", (*FILES, "objectives.safetensors"))
    write(run, "new")
    assert contents(run) == {"new"}
    assert (run / "checkpoints" / "step_1").is_dir()
    assert (run / "logs").is_symlink()
    assert not (run / "objectives.safetensors").exists()
    assert not list(run.glob(".*"))


def test_an_error_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    def fill_the_disk() -> None:
        with replacing(tmp_path / "best", ALL_FILES) as partial:
            (partial / "config.json").write_text("new")
            raise OSError(28, "No space left on device")

    write(tmp_path / "best", "old")
    with pytest.raises(WriteError, match="best"):
        fill_the_disk()
    assert contents(tmp_path / "best") == {"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_without_an_exchange_two_renames_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(whole_folder, "_exchange_at_once", refuse)
    write(tmp_path / "best", "old")
    write(tmp_path / "best", "new")
    assert contents(tmp_path / "best") == {"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_the_working_directory_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "best", "old")
    monkeypatch.chdir(tmp_path / "best")
    write(Path(), "new")
    assert contents(Path()) == contents(tmp_path / "best") == {"new"}


class Killed(BaseException):
    """Ends a process at a certain call of the system, without any clean-up of ours."""


def fail_at(number: int, patch: pytest.MonkeyPatch) -> None:
    """Kill the writer at the n-th call that changes the disk; what follows is not done either."""
    calls = [0]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] > number:
                raise Killed
            return function(*args, **options)

        return call

    for owner, name in (
        (os, "link"),
        (Path, "replace"),
        (Path, "rename"),
        (Path, "unlink"),
        (Path, "mkdir"),
        (Path, "write_text"),
        (whole_folder, "_exchange_at_once"),
        (whole_folder.shutil, "rmtree"),
    ):
        patch.setattr(owner, name, counted(getattr(owner, name)))


def test_a_kill_at_any_call_leaves_one_of_both(tmp_path: Path) -> None:
    seen = set()
    for number in range(100):
        folder = tmp_path / str(number) / "best"
        write(folder, "old")
        with pytest.MonkeyPatch.context() as patch:
            fail_at(number, patch)
            try:
                write(folder, "new")
                ended = True
            except Killed:
                ended = False
        (content,) = contents(folder)
        seen.add((content, ended))
        if ended:
            break
    assert seen >= {("old", False), ("new", False), ("new", True)}


def test_a_kill_in_a_run_folder_leaves_no_mixture(tmp_path: Path) -> None:
    seen = set()
    for number in range(100):
        run = tmp_path / str(number) / "run"
        (run / "checkpoints").mkdir(parents=True)
        write(run, "old")
        with pytest.MonkeyPatch.context() as patch:
            fail_at(number, patch)
            try:
                write(run, "new")
                ended = True
            except Killed:
                ended = False
        if (run / MANIFEST).exists():
            (content,) = contents(run)
            seen.add(content)
        else:  # no checkpoint: nothing loads it
            seen.add("none")
        if ended:
            break
        write(run, "new")
        assert contents(run) == {"new"}
        assert not list(run.glob(".*"))
    assert seen == {"old", "none", "new"}


def write_for_ever(folder: Path, ready: Any) -> None:
    for number in range(100_000):
        write(folder, str(number))
        ready.set()


def test_sigkill_leaves_one_of_both(tmp_path: Path) -> None:
    drawn = random.Random(0)
    context = multiprocessing.get_context("fork")
    for _ in range(8):
        ready = context.Event()
        writer = context.Process(target=write_for_ever, args=(tmp_path / "best", ready))
        writer.start()
        assert ready.wait(60)
        time.sleep(drawn.uniform(0, 0.05))
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join()
        assert len(contents(tmp_path / "best")) == 1


def test_save_pretrained_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path)
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    model = AVLLM.from_pretrained(str(folder))
    processor = AVProcessor.from_pretrained(folder)
    with torch.no_grad():
        next(model.connector.parameters()).add_(1)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", refuse)
    monkeypatch.setattr(digests, "write_manifest", refuse)
    for save in (model.save_pretrained, processor.save_pretrained):
        with pytest.raises(WriteError, match=folder.name):
            save(str(folder))
        after = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        assert after == before
    monkeypatch.undo()
    model.save_pretrained(str(folder))
    assert {file.state for file in compare_files(folder, ALL_FILES)} == {"same"}
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted(before)


def test_links_beside_a_checkpoint_stay_links(tmp_path: Path) -> None:
    write(tmp_path / "best", "old")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "clip").write_text("large")
    links = {"folder": "../data", "file": "../data/clip", "nowhere": "../gone"}
    for name, target in links.items():
        (tmp_path / "best" / name).symlink_to(target)
    write(tmp_path / "best", "new")
    assert contents(tmp_path / "best") == {"new"}
    for name, target in links.items():
        assert (tmp_path / "best" / name).readlink() == Path(target)
