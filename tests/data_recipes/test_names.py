"""Test that rows of two outputs share no ids: these begin with the name of the set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_recipes.sources_instructions import sharegpt as write_sharegpt
from making_fixtures import RATE, captioned_row, recipe_module, tone, write_clip, write_lines

from avllm.data.manifest import read_manifest
from avllm.data.media.write import write_wav
from avllm.data.schema import Sample
from avllm.recipes.frame import RecipeError, make

NAMES = {"compose_audio": "sound", "pu_valor": "pu", "describe_clean": "clean"}
OPTIONS: dict[str, dict[str, Any]] = {
    "compose_audio": {"rate": RATE},
    "pu_valor": {"shortest": 0.5, "longest": 1.0, "width": 48, "height": 32, "cluster_size": 9},
    "describe_clean": {"clean": False},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two sounds with captions, two videos, and the rules of a text model."""
    folder = tmp_path_factory.mktemp("source")
    rows, videos = [], []
    for number, hertz in enumerate((700.0, 1300.0)):
        write_wav(folder / f"{number}.wav", tone(hertz, 0.5).astype(np.float32), RATE)
        rows.append(
            captioned_row(f"s{number}", "audio", f"{number}.wav", f"A tone of {hertz:.0f} hertz.")
        )
        write_clip(folder / f"{number}.mp4", ("red", "blue")[number], hertz, 1.0)
        videos.append(
            captioned_row(
                f"v{number}", "video", f"{number}.mp4", f"A wall hums at {hertz:.0f} hertz."
            )
        )
    write_lines(folder / "train.jsonl", rows)
    write_lines(folder / "videos.jsonl", videos)
    (folder / "rules.yaml").write_text("rules: []")
    return folder


def made(recipe: str, source: Path, output: Path, **options: Any) -> list[Sample]:
    """Return the rows that a recipe makes of the manifest that fits it."""
    module = recipe_module(recipe)
    file = "videos.jsonl" if recipe == "pu_valor" else "train.jsonl"
    arguments = OPTIONS[recipe] | {"manifest": file} | options
    if recipe == "describe_clean":
        arguments["file"] = arguments.pop("manifest")
        arguments["model"] = f"rules:{source / 'rules.yaml'}"
    make(module.ABOUT, module.rows, source, output, name=recipe, **arguments)
    return read_manifest(output / f"{options.get('split', 'train')}.jsonl")


@pytest.mark.parametrize("recipe", NAMES)
def test_outputs_of_other_options_share_no_id_and_equal_ones_all(
    recipe: str, source: Path, tmp_path: Path
) -> None:
    other = {"longest_text": 400} if recipe == "describe_clean" else {"seed": 1}
    one, again, two = (
        made(recipe, source, tmp_path / str(n), **options)
        for n, options in enumerate(({}, {"workers": 1}, other))
    )
    assert [s.id for s in one] == [s.id for s in again]
    assert not {s.id for s in one} & {s.id for s in two}
    assert {s.source for s in (*one, *two)} == {recipe}
    assert all(s.id.startswith(f"{NAMES[recipe]}-") for s in one)


@pytest.mark.parametrize("recipe", NAMES)
def test_a_name_is_the_source_and_the_beginning_of_ids(
    recipe: str, source: Path, tmp_path: Path
) -> None:
    rows = made(recipe, source, tmp_path / "out", set_name="mine.v2")
    assert {s.source for s in rows} == {"mine.v2"}
    assert all(s.id.startswith("mine.v2-") for s in rows)
    with pytest.raises(RecipeError) as caught:
        made(recipe, source, tmp_path / "bad", set_name="../x")
    assert caught.value.reason == "bad_name"


def test_conversations_are_named_by_their_file_or_by_name(tmp_path: Path) -> None:
    module = recipe_module("sharegpt")
    source = tmp_path / "source"
    source.mkdir()
    write_sharegpt(source)
    outputs = []
    for number, options in enumerate(({}, {"file": "detail_23k.json"}, {"set_name": "mine"})):
        make(module.ABOUT, module.rows, source, tmp_path / str(number), name="sharegpt", **options)
        outputs.append(read_manifest(tmp_path / str(number) / "train.jsonl"))
    for samples, name in zip(outputs, ("llava_instruct_150k", "detail_23k", "mine"), strict=True):
        assert {s.source for s in samples} == {name}
        assert all(s.id.startswith(f"{name}-") for s in samples)
