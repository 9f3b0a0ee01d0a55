"""A trained model grows by a stream: the rest stays bit-equal, the new part trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import World, make_world, settings
from tiny_runs import difference, kill_after, run, weights

from avllm.config import RunConfig
from avllm.data.manifest import read_manifest
from avllm.errors import UserError
from avllm.models.building.described import stage_processor
from avllm.models.checkpoint_format import read_manifest_of
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.training.start import build_parts

torch.set_num_threads(1)
EVENTS = {
    "medium": "audio",
    "type": "mel_conv",
    "config": {"num_mel_bins": 16, "hidden_size": 12, "max_frames": 64, "model_type": "mel_conv"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=4)


@pytest.fixture(scope="module")
def before(world: World) -> Path:
    """A trained model that sees and does not hear."""
    model = world.model | {
        "encoders": {"video": world.model["encoders"]["video"]},
        "connector": [{"type": "mlp", "stream": "video"}],
    }
    run(settings(world, world.root / "before", model=model, train__max_steps=2))
    return world.root / "before"


def extension(
    world: World, output: Path, init: Path, extend: dict[str, Any], **changes: Any
) -> dict[str, Any]:
    found = settings(
        world, output, init=str(init), init_from_scratch=True, extend=extend, **changes
    )
    found.pop("model")
    return found


AUDIO = {"encoders": {"events": EVENTS}, "connector": [{"type": "linear", "stream": "events"}]}


def test_rows_without_the_new_stream_keep_their_logits(
    world: World, before: Path, tmp_path: Path
) -> None:
    parts = build_parts(RunConfig.model_validate(extension(world, tmp_path / "run", before, AUDIO)))
    old, processor = AVLLM.from_pretrained(str(before)), AVProcessor.from_pretrained(before)
    rows, root = read_manifest(world.captions), world.captions.parent
    silent = [row for row in rows if row.answer is not None and "nothing" in row.answer]
    expected, batch = (
        processor(silent, root, answer=True),
        parts.processor(silent, root, answer=True),
    )
    assert torch.equal(batch.input_ids, expected.input_ids)
    with torch.no_grad():
        assert torch.equal(parts.model.eval()(batch).logits, old(expected).logits)
    heard = parts.processor(rows, root, answer=True)
    assert bool((heard.input_ids == parts.model.config.media_token_ids["events"]).any())


def test_only_the_new_part_trains_and_the_chain_knows(
    world: World, before: Path, tmp_path: Path
) -> None:
    rules = [["^connector\\.1", 1e-2], [".*", None]]
    run(extension(world, tmp_path / "run", before, AUDIO, trainable=rules, train__max_steps=2))
    old, new = (
        load_file(before / "trained.safetensors"),
        load_file(tmp_path / "run" / "trained.safetensors"),
    )
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    assert {
        name.rpartition(".")[0] for name in new.keys() - old.keys() if name.startswith("connector")
    } == {"connector.1.proj"}
    stages = read_manifest_of(tmp_path / "run")["stages"]
    assert [stage["settings"].get("extend") is not None for stage in stages] == [False, True]
    model, processor = (
        AVLLM.from_pretrained(str(tmp_path / "run")),
        AVProcessor.from_pretrained(tmp_path / "run"),
    )
    batch = processor(read_manifest(world.captions), world.captions.parent, answer=True)
    assert torch.isfinite(model(batch).logits).all()


def test_it_resumes(world: World, before: Path, tmp_path: Path) -> None:
    rules = [["^connector\\.1", 1e-2], [".*", None]]
    length = {"train__max_steps": 8, "train__save_every": 1, "trainable": rules}
    run(extension(world, tmp_path / "straight", before, AUDIO, **length))
    cut = extension(world, tmp_path / "cut", before, AUDIO, **length)
    kill_after(cut, 2)
    run(cut)
    assert difference(weights(tmp_path / "cut"), weights(tmp_path / "straight")) == 0.0


def test_adapters_take_their_places(world: World, before: Path, tmp_path: Path) -> None:
    extend = {"connector": [{"type": "position", "stream": "video", "place": 0}]}
    parts = build_parts(
        RunConfig.model_validate(extension(world, tmp_path / "run", before, extend))
    )
    assert [spec["type"] for spec in parts.model.config.connector] == ["position", "mlp"]
    old = AVLLM.from_pretrained(str(before)).connector[0].state_dict()
    assert all(
        torch.equal(tensor, old[name])
        for name, tensor in parts.model.connector[1].state_dict().items()
    )


def test_the_rows_are_shown_as_the_stage_reads_them(
    world: World, before: Path, tmp_path: Path
) -> None:
    config = RunConfig.model_validate(extension(world, tmp_path / "run", before, AUDIO))
    shown, trained = stage_processor(config), build_parts(config).processor
    rows, root = read_manifest(world.captions), world.captions.parent
    assert torch.equal(
        shown(rows, root, answer=True).input_ids, trained(rows, root, answer=True).input_ids
    )
    assert shown.widths == trained.widths


@pytest.mark.parametrize(
    "extend, word",
    [
        (
            {
                "encoders": {"video": {"type": "siglip"}},
                "connector": [{"type": "linear", "stream": "video"}],
            },
            "video",
        ),
        (AUDIO | {"connector": [{"type": "linear", "stream": "events", "place": 5}]}, "place"),
        (AUDIO | {"connector": [{"type": "linear", "stream": "smell"}]}, "smell"),
    ],
    ids=["clash", "place", "stream"],
)
def test_what_does_not_fit_is_a_users_mistake(
    world: World, before: Path, tmp_path: Path, extend: dict[str, Any], word: str
) -> None:
    if "video" in extend.get("encoders", {}):
        extend["encoders"]["video"] = world.model["encoders"]["video"]
    with pytest.raises(UserError, match=word):
        build_parts(RunConfig.model_validate(extension(world, tmp_path / "run", before, extend)))


def test_there_is_nothing_to_extend_without_init(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="init"):
        RunConfig.model_validate(settings(world, tmp_path, extend=AUDIO))
