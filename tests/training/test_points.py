"""Resume points: one run a folder, damage that is found, and what may change on the way."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from answering import make_checkpoint
from tiny import World, make_world, settings
from tiny_runs import FORK, difference, losses, rows, run, start, together, train, weights

from avllm.config import RunConfig
from avllm.errors import UserError, WriteError
from avllm.models import checkpoint
from avllm.models.loading.digests import ALL_FILES, compare_files
from avllm.training.points import inputs
from avllm.training.points.lock import RunInUseError, RunLock
from avllm.training.points.position import RunPosition
from avllm.training.points.record import ResumeError, read_record
from avllm.training.points.store import ResumePoints
from avllm.training.points.whole import SEAL, digest_of, newest_whole, points_of, seal


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny world for all tests of this file."""
    return make_world(tmp_path_factory.mktemp("world"), clips=4)


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The log of this test."""
    monkeypatch.setattr(logging.getLogger("avllm"), "handlers", [caplog.handler])
    return caplog


# ---- one run a folder ----------------------------------------------------------------------------


def hold(folder: Path, held: Any, with_worker: bool) -> None:
    """Lock a folder until this process is killed; a worker of it lives on for a while."""
    with RunLock(folder):
        if with_worker and os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        held.set()
        time.sleep(600)


def test_a_second_start_is_refused_before_anything_is_touched(world: World, tmp_path: Path) -> None:
    asked = settings(world, tmp_path / "run", train__max_steps=1)
    half_written = tmp_path / "run" / "checkpoints" / ".step_2.partial"
    half_written.mkdir(parents=True)
    held = FORK.Event()
    holder = start(hold, tmp_path / "run", held, True)
    assert held.wait(60)
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(RunInUseError, match=f"process {holder.pid} on .* since ") as raised:
        train(asked)
    assert raised.value.reason == "in_use"
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before
    os.kill(holder.pid or 0, signal.SIGKILL)
    holder.join()
    train(asked)  # although a worker of the killed run is still there
    assert not half_written.exists()


def test_a_process_starts_one_run_a_folder(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        with pytest.raises(RunInUseError, match=str(os.getpid())), RunLock(tmp_path):
            pass
        other = FORK.Process(target=_refused, args=(tmp_path,))
        other.start()
        other.join()
        assert other.exitcode == 0, "the refusal has not released the lock"
    with RunLock(tmp_path):
        pass


def _refused(folder: Path) -> None:
    lock_of_the_parent = RunLock(folder)
    from avllm.training.points import lock

    lock._own.clear()
    with pytest.raises(RunInUseError), lock_of_the_parent:
        pass


def refused_in_a_group(folder: Path) -> None:
    """Start as one of several processes that find each other, on a folder that is in use."""
    torch.distributed.init_process_group("gloo")
    with pytest.raises(RunInUseError), RunLock(folder):
        pass


def test_every_process_of_a_run_is_refused(tmp_path: Path) -> None:
    held = FORK.Event()
    holder = start(hold, tmp_path, held, False)
    assert held.wait(60)
    together(refused_in_a_group, tmp_path, ranks=2)
    holder.kill()
    holder.join()


def test_a_file_system_without_locks_costs_a_warning(
    tmp_path: Path, messages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with RunLock(tmp_path):
        assert "No locks available" in messages.text


# ---- damage --------------------------------------------------------------------------------------


def make_points(run: Path) -> list[Path]:
    """Two resume points with two files each."""
    folders = []
    for step in (2, 4):
        folder = run / "checkpoints" / f"step_{step}"
        (folder / "engine").mkdir(parents=True)
        torch.save({"model": torch.rand(50)}, folder / "trainable.pt")
        (folder / "engine" / "shard_0").write_bytes(b"0123456789" * 10)
        seal(folder, RunPosition(step=step), {"seed": 0})
        folders.append(folder)
    return folders


def flip(path: Path) -> None:
    """Change a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Leave half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("file", ["trainable.pt", "engine/shard_0", SEAL])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_point_is_named_and_the_one_before_taken(
    file: str, damage: Any, tmp_path: Path, messages: Any
) -> None:
    first, second = make_points(tmp_path)
    (tmp_path / "checkpoints" / "step_9_of_mine").mkdir()
    point = newest_whole(tmp_path)
    assert point is not None
    assert (point.folder, point.position.step, point.record) == (second, 4, {"seed": 0})
    damage(second / file)
    point = newest_whole(tmp_path)
    assert point is not None
    assert point.folder == first
    assert str(second / file) in messages.text
    damage(first / file)
    with pytest.raises(ResumeError, match=str(first / file)) as raised:
        newest_whole(tmp_path)
    assert raised.value.reason == "damaged"


@pytest.mark.parametrize("change", [{"position": {"epoch": 3}}, {"files": None}, {"run": 3}])
def test_a_point_of_another_version_is_named_and_the_one_before_taken(
    change: dict[str, Any], tmp_path: Path, messages: Any
) -> None:
    first, second = make_points(tmp_path)
    content = json.loads((second / SEAL).read_text())["content"] | change
    sealed = {"content": content, "sha256": digest_of(content)}
    (second / SEAL).write_text(json.dumps(sealed))
    point = newest_whole(tmp_path)
    assert point is not None
    assert point.folder == first
    assert str(second / SEAL) in messages.text


def test_a_long_text_among_the_options_of_a_part_is_no_file(tmp_path: Path) -> None:
    weights_file = tmp_path / "qformer.safetensors"
    weights_file.write_bytes(b"weights")
    options = [{"type": "linear", "stream": "x" * 5000}, {"type": "mlp", "init": str(weights_file)}]
    config = RunConfig.model_construct(objectives=options, model=None, extend=None, init=None)
    assert list(inputs.weights(config)) == [str(weights_file)]


def test_a_run_goes_on_from_the_point_before_a_damaged_one(
    world: World, tmp_path: Path, messages: Any
) -> None:
    asked = settings(world, tmp_path / "run", train__save_every=2, train__warmup=0)
    folder = run(asked)
    before = weights(folder)
    before_rows = rows(folder)
    (folder / "finished.json").unlink()
    cut(folder / "checkpoints" / "step_4" / "trainable.pt")
    train(asked | {"train": asked["train"] | {"save_every": 3}})
    assert "step_4/trainable.pt" in messages.text
    assert difference(weights(folder), before) == 0.0
    assert rows(folder) == before_rows
    assert [point.name for point in points_of(folder)] == ["step_3", "step_4"]
    assert newest_whole(folder) is not None


def test_a_full_disk_is_one_line_and_the_point_before_stays(world: World, tmp_path: Path) -> None:
    child = start(save_on_a_full_disk, settings(world, tmp_path / "run", train__save_every=2))
    child.join()
    assert child.exitcode == 0
    folders = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert folders == ["step_2"]
    assert newest_whole(tmp_path / "run") is not None
    assert not (tmp_path / "run" / "finished.json").exists()


def save_on_a_full_disk(asked: dict[str, Any]) -> None:
    """Train; the second resume point meets the end of the disk in the middle of its weights."""

    def save(self: ResumePoints, position: RunPosition) -> None:
        if position.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        unchanged(self, position)

    unchanged = ResumePoints.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResumePoints, "save", save)
        with pytest.raises(WriteError, match=r"step_4") as raised:
            train(asked)
    assert "\n" not in str(raised.value)


def test_a_failure_between_the_files_of_the_best_model_leaves_the_old_one(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"train__validate_every": 2, "data__validation": str(world.captions)}
    asked = settings(world, tmp_path / "run", train__max_steps=4, **changes)
    asked |= {"lora": {"r": 2}, "trainable": [["^connector", 1e-3], ["lora_", 1e-3], [".*", None]]}
    written: list[Path] = []

    def save_sets(llm: Any, folder: Path) -> None:
        written.append(folder)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        unchanged(llm, folder)

    unchanged = checkpoint.save_sets
    monkeypatch.setattr(checkpoint, "save_sets", save_sets)
    with pytest.raises(WriteError, match="best"):
        train(asked)
    best = tmp_path / "run" / "best"
    stages = json.loads((best / "manifest.json").read_text())["stages"]
    assert stages[-1]["steps"] == 2
    assert {file.state for file in compare_files(best, ALL_FILES)} == {"same"}
    assert list((tmp_path / "run").glob(".best*")) == []


# ---- what may change on the way ------------------------------------------------------------------


def test_other_weights_of_a_backbone_are_refused_wherever_they_are(
    world: World, tmp_path: Path
) -> None:
    before = make_checkpoint(tmp_path)
    llm = Path(shutil.copytree(before.parent / "backbones" / "llm", tmp_path / "llm"))
    asked = settings(world, tmp_path / "run", train__max_steps=1)
    del asked["model"]
    asked["init"] = str(before)
    folder = run(asked)
    (folder / "finished.json").unlink()
    asked["backbones"] = {"llm": str(llm)}
    train(asked)  # moved, but the same
    (folder / "finished.json").unlink()
    with (llm / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ResumeError, match=r"inputs\.weights\.llm") as raised:
        train(asked)
    assert raised.value.reason == "weights"


def test_other_media_are_refused_and_may_be_accepted(
    world: World, tmp_path: Path, messages: Any
) -> None:
    data = Path(shutil.copytree(world.captions.parent, tmp_path / "data"))
    asked = settings(world, tmp_path / "run", train__max_steps=1)
    asked["data"]["train"] = str(data / world.captions.name)
    folder = run(asked)
    clip = data / "001.mp4"
    content = clip.read_bytes()
    shutil.copy(data / "002.mp4", clip)
    with pytest.raises(ResumeError, match=str(clip)) as raised:
        train(asked)
    assert raised.value.reason == "files"
    asked["data"]["accept_changes"] = True
    asked["train"]["max_steps"] = 2
    train(asked)
    assert f"going on although inputs.media.{clip}" in messages.text
    assert len(losses(folder)) == 2
    train(asked)  # the change is recorded now
    asked["data"]["accept_changes"] = False
    train(asked)
    clip.write_bytes(content)
    with pytest.raises(ResumeError):
        train(asked)


def test_the_settings_of_the_point_count(world: World, tmp_path: Path) -> None:
    asked = settings(world, tmp_path / "run", train__max_steps=1)
    folder = run(asked)
    (folder / "finished.json").unlink()
    (folder / "run.json").unlink()
    with pytest.raises(ResumeError, match="train.batch_size: 2 then, 3 now") as raised:
        train(settings(world, tmp_path / "run", train__max_steps=1, train__batch_size=3))
    assert raised.value.reason == "settings"
    free = {"data__num_workers": 1, "train__keep": 5, "train__log_every": 2}
    train(settings(world, tmp_path / "run", train__max_steps=1, **free))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"train": 3}', "[" * 100_000])
def test_a_damaged_record_of_a_finished_run_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ResumeError, match=r"run\.json is damaged") as raised:
        read_record(tmp_path)
    assert raised.value.reason == "damaged"


# ---- longer --------------------------------------------------------------------------------------


def test_a_finished_run_is_continued_for_longer(
    world: World, tmp_path: Path, messages: Any
) -> None:
    changes: dict[str, Any] = {"train__schedule": "constant", "train__warmup": 0.5}
    asked = settings(world, tmp_path / "run", **changes)
    train(asked)
    train(asked)
    assert "is finished: nothing to do" in messages.text
    messages.clear()
    asked["train"]["max_steps"] = 6
    train(asked)
    line = next(r.getMessage() for r in messages.records if "is not repeated" in r.getMessage())
    assert "train.max_steps: 4 then, 6 now" in line
    assert json.loads((tmp_path / "run" / "finished.json").read_text())["steps"] == 6
    straight = run(
        settings(world, tmp_path / "straight", **changes | {"train__warmup": 2}, train__max_steps=6)
    )
    assert difference(weights(tmp_path / "run"), weights(straight)) == 0.0
    assert rows(tmp_path / "run") == rows(straight), "the warm-up has the steps of the beginning"
    with pytest.raises(UserError, match="train.max_steps: 6 then, 4 now"):
        train(asked | {"train": asked["train"] | {"max_steps": 4}})


def test_the_rate_of_a_longer_run_falls_to_its_new_end(
    world: World, tmp_path: Path, messages: Any
) -> None:
    asked = settings(world, tmp_path / "run", train__warmup=0, train__max_steps=2)
    train(asked)
    asked["train"]["max_steps"] = 4
    config = RunConfig.model_validate(asked)
    (tmp_path / "run" / "trained.safetensors").unlink()
    train(asked)
    rates = [row["lr"] for row in rows(tmp_path / "run")]
    assert rates[2:] == pytest.approx([0.5e-3, 0.1464e-3], rel=1e-3)
    line = next(r.getMessage() for r in messages.records if "is not repeated" in r.getMessage())
    assert "step 3 is 5.00e-04, and was to be 0.00e+00" in line
    assert config.train.schedule == "cosine"
