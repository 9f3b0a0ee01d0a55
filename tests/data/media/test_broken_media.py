"""A file of every class of `scripts/broken_media/make.py`: named by the check, left out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import World, make_world, settings
from tiny_runs import losses, run

from avllm.config import RunConfig
from avllm.data.check.files import ExamineOptions
from avllm.data.check.run import check
from avllm.inference.row_tokens import ProcessorTokens, reading
from avllm.models.building.described import stage_processor

ROOT = Path(__file__).resolve().parents[3]
CLASSES = 58


def make(out: Path, count: int, seed: int = 0) -> Path:
    """Run the script."""
    script = [sys.executable, str(ROOT / "scripts/broken_media/make.py"), str(out)]
    subprocess.run(
        [*script, "--count", str(count), "--seed", str(seed)],
        check=True,
        capture_output=True,
    )
    return out


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("broken") / "media", CLASSES)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=2)


def stage(world: World, media: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """An epoch over the media."""
    train = {"epochs": 1, "batch_size": 8, "log_every": 1, "trackers": []}
    data = {
        "train": str(media / "manifest.jsonl"),
        "num_workers": 0,
        "max_skip_rate": 1.0,
        **changes,
    }
    return settings(world, output, data=data, train=train)


@pytest.fixture(scope="module")
def checked(media: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a check that reads as the stage does."""
    output = tmp_path_factory.mktemp("checked")
    processor = stage_processor(RunConfig.model_validate(stage(world, media, output / "run")))
    options = ExamineOptions("sample", processor, reading(processor), workers=2)
    check(
        [media / "manifest.jsonl"],
        options=options,
        tokens=ProcessorTokens(processor),
        output=output,
    )
    return output


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def quarantine(folder: Path) -> dict[str, list[str]]:
    """The reasons of each id."""
    lines = (folder / "quarantine.txt").read_text(encoding="utf-8").splitlines()
    return {
        identity: reasons.split(",") for identity, reasons in (line.split("\t") for line in lines)
    }


def test_each_class_is_called_what_it_is(media: Path, checked: Path) -> None:
    expected = read(media / "expected.jsonl")
    assert len({row["class"] for row in expected}) == len(expected) == CLASSES
    bad, warned = quarantine(checked), {}
    for finding in read(checked / "findings.jsonl"):
        warned.setdefault(finding["id"], set()).add(finding["reason"])
    for row in expected:
        found = bad.get(row["id"], [])
        assert set(found) <= set(row["errors"]), (
            f"{row['id']}: {found}; expected one of {row['errors']}"
        )
        assert row["either"] or bool(found) == bool(row["errors"]), (
            f"{row['id']}: {found or 'good'}"
        )
        assert set(row["warnings"]) <= warned.get(row["id"], set()), (
            f"{row['id']}: {warned.get(row['id'])}"
        )
        assert row["errors"] or warned.get(row["id"], set()) == set(row["warnings"]), row["id"]


def test_no_file_takes_five_seconds_of_a_core(checked: Path) -> None:
    report = json.loads((checked / "check.json").read_text(encoding="utf-8"))
    assert report["files"] == CLASSES
    assert report["slowest"][0][0] < 5.0


def test_training_leaves_out_exactly_what_the_check_names(
    world: World,
    media: Path,
    checked: Path,
    tmp_path: Path,
) -> None:
    done = run(stage(world, media, tmp_path / "all"))
    skipped = {row["id"] for row in read(done / "skipped.jsonl")}
    assert skipped == quarantine(checked).keys()
    listed = run(
        stage(world, media, tmp_path / "listed", quarantine=str(checked / "quarantine.txt")),
    )
    assert {row["id"] for row in read(listed / "skipped.jsonl")} == skipped
    assert {row["step"] for row in read(listed / "skipped.jsonl")} == {
        0,
    }  # none of them was opened again
    assert losses(listed)


def test_the_same_seed_makes_the_same_files(tmp_path: Path) -> None:
    first, second, other = (
        make(tmp_path / "a", 12),
        make(tmp_path / "b", 12),
        make(tmp_path / "c", 12, 1),
    )
    names = sorted(p.name for p in first.iterdir())
    assert names == sorted(p.name for p in second.iterdir())
    assert all(
        (first / n).read_bytes() == (second / n).read_bytes()
        for n in names
        if (first / n).is_file()
    )
    assert any(
        (first / n).read_bytes() != (other / n).read_bytes() for n in names if (first / n).is_file()
    )
    with pytest.raises(subprocess.CalledProcessError) as refused:
        make(first, 12)
    assert b"is there already; name a folder that is not" in refused.value.stderr
