"""Retrieval: recalls by hand, and a stage-1 run whose projections come back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import World, make_world, row, settings, write_rows
from tiny_runs import run
from typer.testing import CliRunner

from avllm.cli.main import app
from avllm.data.row import Row
from avllm.errors import UserError
from avllm.evaluation.retrieval import Embedded, contrastive_of, distinct, recall, retrieval
from avllm.models.checkpoint_format import CheckpointError


def test_recall_by_hand() -> None:
    scores = np.eye(4)
    scores[3] = [0.9, 0.8, 0.1, 0.5]  # the fourth caption finds its clip third
    found = recall(scores, np.eye(4, dtype=bool))
    assert (found["n"], found["r1"], found["r5"], found["r10"]) == (4, 0.75, 1.0, 1.0)
    assert (found["among"], found["median_rank"], found["chance"]) == (4, 1.0, 0.25)
    assert found["r1_low"] < 0.75 < found["r1_high"]


def test_several_captions_of_a_clip_by_hand() -> None:
    own = np.array(
        [[1, 0], [1, 0], [0, 1]], dtype=bool
    )  # two captions of the first clip, one of the second
    scores = np.array([[0.9, 0.1], [0.2, 0.3], [0.8, 0.7]])
    assert recall(scores, own)["r1"] == pytest.approx(
        1 / 3
    )  # the second and the third caption miss theirs
    back = recall(scores.T, own.T)
    assert (back["n"], back["among"], back["r1"]) == (
        2,
        3,
        1.0,
    )  # each clip finds one of its captions first
    assert back["chance"] == pytest.approx((2 / 3 + 1 / 3) / 2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("retrieval"), clips=6)


@pytest.fixture(scope="module")
def aligned(world: World) -> Path:
    rules = [["^connector", 1e-2], ["^objectives", 1e-2], [".*", None]]
    chosen = settings(
        world,
        world.root / "align",
        "align",
        train__max_steps=12,
        train__batch_size=6,
        trainable=rules,
    )
    return run(chosen)


def test_a_stage_1_run_is_searched_with_what_it_learned(world: World, aligned: Path) -> None:
    found = retrieval(aligned, world.captions, limit=200)
    assert found == retrieval(aligned, world.captions, limit=200, batch_size=2)
    assert found["n"] == 5  # two of the six captions are equal
    assert found["r10"] == 1.0
    assert found["r1"] > found["chance"]
    assert found["clip_to_text"]["n"] == found["clip_to_text"]["among"] == 5
    assert retrieval(aligned, world.captions, limit=4)["n"] == 4
    small = retrieval(
        aligned, world.captions, clips_at_once=2
    )  # other batches: the same but for rounding
    assert {k: small[k] for k in ("r1", "r5", "median_rank")} == {
        k: found[k] for k in ("r1", "r5", "median_rank")
    }


def test_the_command_prints_a_table_and_json(world: World, aligned: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "figures.json"
    done = CliRunner().invoke(
        app,
        ["retrieve", str(aligned), str(world.captions), "--json", "--output", str(output)],
        catch_exceptions=False,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads(output.read_text())
    assert found["retrieval"] == retrieval(aligned, world.captions, limit=None)
    assert found["environment"]["torch"]
    assert found["manifest"]["sha256"]
    assert "text to clip" in done.stderr
    assert "clip to text" in done.stderr
    assert len(done.stdout.splitlines()) == 1
    plain = CliRunner().invoke(
        app, ["retrieve", str(aligned), str(world.captions)], catch_exceptions=False
    )
    assert "text to clip" in plain.stdout
    assert plain.stderr == ""


def test_recalls_do_not_depend_on_the_order_of_the_captions(world: World, aligned: Path) -> None:
    rows = [json.loads(line) for line in world.captions.read_text().splitlines()]
    backwards = write_rows(world.captions.with_name("backwards.jsonl"), rows[::-1])
    for limit in (None, 3):
        assert retrieval(aligned, backwards, limit=limit) == retrieval(
            aligned, world.captions, limit=limit
        )


def test_several_captions_of_a_clip_share_it(world: World, aligned: Path, tmp_path: Path) -> None:
    clips = [{"type": "video", "video": str(world.captions.parent / f"00{n}.mp4")} for n in (0, 1)]
    said = [
        ("a", 0, "red and a low sound"),
        ("b", 1, "green and a high sound"),
        ("c", 0, "a low sound and red"),
    ]
    manifest = write_rows(
        tmp_path / "captions.jsonl", [row(id, [clips[n]], words) for id, n, words in said]
    )
    found = retrieval(aligned, manifest)
    assert (found["n"], found["among"]) == (3, 2)
    assert (found["clip_to_text"]["n"], found["clip_to_text"]["among"]) == (2, 3)
    write_rows(manifest, [row("a", [{"type": "video", "video": "gone.mp4"}], "red")])
    with pytest.raises(UserError, match=r"row 'a': .*gone.mp4: missing"):
        retrieval(aligned, manifest)


def test_projections_and_temperature_come_back(aligned: Path) -> None:
    from avllm.models.modeling_avllm import AVLLM

    objective = contrastive_of(AVLLM.from_pretrained(str(aligned)), aligned)
    assert objective.log_temperature.item() != pytest.approx(np.log(0.07))
    assert all(torch.isfinite(p).all() for p in objective.parameters())


def test_a_run_without_projections_says_so(aligned: Path, world: World, tmp_path: Path) -> None:
    for file in aligned.iterdir():
        if file.is_file() and not file.name.startswith("objectives"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="objectives.safetensors"):
        retrieval(tmp_path, world.captions)


def test_equal_captions_count_once(world: World) -> None:
    from avllm.data.manifest import parse_row

    rows = [json.loads(line) for line in world.captions.read_text().splitlines()]
    samples = [parse_row(json.dumps(r), "test") for r in rows]
    assert distinct(samples) == [
        s for i, s in enumerate(samples) if i != 4
    ]  # the fifth says what the first says


def test_captions_of_a_kind_are_captions(world: World, aligned: Path, tmp_path: Path) -> None:
    """An objective of captions alone gave other rows no text, and all of them the same rank."""
    run_folder = shutil.copytree(aligned, tmp_path / "align")
    objectives = json.loads((run_folder / "manifest.json").read_text())
    for spec in objectives["stages"][-1]["settings"]["objectives"]:
        spec["captions_only"] = True
    (run_folder / "manifest.json").write_text(json.dumps(objectives))
    rows = [
        json.loads(line) | {"kind": "heard.kind"}
        for line in Path(world.captions).read_text().splitlines()
    ]
    named = Path(world.captions).with_name("named.jsonl")
    named.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert retrieval(run_folder, named) == retrieval(aligned, world.captions)


def test_embeddings_that_are_not_finite_are_no_result(
    world: World, aligned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(model: object, processor: object, objective: object, rows: list[Row]) -> Embedded:
        vectors = torch.full((len(rows), 4), torch.nan)
        return Embedded(vectors, vectors)

    monkeypatch.setattr("avllm.evaluation.retrieval.embed_rows", diverged)
    with pytest.raises(UserError, match="not finite"):
        retrieval(aligned, world.captions)
