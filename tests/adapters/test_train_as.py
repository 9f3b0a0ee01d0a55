"""A branch that is trained on sight alone hears, where the two encoders share a space."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import World, make_world, settings, write_rows
from torch import Tensor, nn

from avllm.adapters.base import Adapter, in_variant
from avllm.config import RunConfig
from avllm.data.schema import Sample
from avllm.models.building.described import stage_processor
from avllm.registry import build
from avllm.tokens import Grid, Tokens
from avllm.training.trainer import run_stage

torch.set_num_threads(1)
CLASSES, WIDTH = 16, 32


def clips(x: Tensor, steps: int, seconds: float) -> Tokens:
    """Clips ``(B, D)`` whose steps all show the same, one token a step."""
    edges = torch.arange(steps + 1) * seconds
    span = torch.stack([edges[:-1], edges[1:]], -1).expand(len(x), -1, -1)
    mask = torch.ones(len(x), steps, 1, dtype=torch.bool)
    return Tokens(x[:, None, None].expand(-1, steps, 1, -1), mask, span)


def heard_after_seeing(shared: bool, seed: int) -> float:
    """Train a linear branch on sight alone and return its accuracy on sound alone."""
    generator = torch.Generator().manual_seed(seed)
    seen_as = torch.randn(CLASSES, WIDTH, generator=generator)
    heard_as = seen_as if shared else torch.randn(CLASSES, WIDTH, generator=generator)
    labels = torch.arange(CLASSES).repeat(8)

    def noisy(prototypes: Tensor) -> Tensor:
        noise = 0.3 * torch.randn(len(labels), WIDTH, generator=generator)
        return prototypes[labels] + noise

    widths = {"audio": WIDTH, "video": WIDTH}
    spec = {"type": "train_as", "stream": "audio", "by": "video", "seconds": 2.0}
    adapter: Adapter = build("adapters", spec, widths, 8)
    torch.manual_seed(seed)
    branch = nn.Linear(WIDTH, CLASSES)
    optimizer = torch.optim.Adam(branch.parameters(), lr=0.05)
    for _ in range(40):
        with in_variant("train_as"):
            audio = adapter({"video": clips(noisy(seen_as), 4, 1.5)})["audio"]
        assert audio.x.shape == (len(labels), 3, 1, WIDTH)  # 6 s in steps of 2 s
        loss = nn.functional.cross_entropy(branch(audio.x.mean((1, 2))), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    audio = adapter({"audio": clips(noisy(heard_as), 3, 2.0)})["audio"]
    return float((branch(audio.x.mean((1, 2))).argmax(-1) == labels).float().mean())


def test_a_shared_space_carries_over_and_another_does_not() -> None:
    shared = [heard_after_seeing(True, seed) for seed in range(3)]
    apart = [heard_after_seeing(False, seed) for seed in range(6)]
    assert min(shared) > 0.95
    assert sum(apart) / 6 < 3 / CLASSES  # chance is 1/16


@pytest.mark.parametrize("instead", [False, True])
@pytest.mark.parametrize("over", [False, True])
def test_each_clip_of_a_batch_by_hand(over: bool, instead: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    video = clips(torch.randn(3, 4, generator=generator), 3, 1.0)
    audio = clips(torch.randn(3, 4, generator=generator), 2, 1.5)
    audio.mask[0] = False  # the first clip is silent
    video.mask[2] = False  # the third has no pictures
    streams = {"audio": audio, "video": video}
    adapter: Adapter = build(
        "adapters",
        {"type": "train_as", "stream": "audio", "by": "video", "over": over, "instead": instead},
        {"audio": 4, "video": 4},
        4,
    )
    assert adapter(streams) is streams
    with in_variant("train_as"):
        made = adapter(streams)
        assert list(made) == ["audio", "video"]
        for number in range(3):
            one = {name: Grid(t.span[number], t.mask[number]) for name, t in streams.items()}
            for name, grid in adapter.output_grid(one).items():
                assert grid.places == int(made[name].mask[number].sum())
    given = [True, over, False]
    for number, is_given in enumerate(given):
        source = video if is_given else audio
        steps = source.x.shape[1]
        assert torch.equal(made["audio"].x[number, :steps], source.x[number])
        assert torch.equal(made["audio"].mask[number, :steps], source.mask[number])
        assert not made["audio"].mask[number, steps:].any()
        hidden = is_given and instead
        assert torch.equal(made["video"].mask[number], video.mask[number] & (not hidden))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=6)


def test_a_stage_trains_the_audio_branch_on_silent_clips(world: World, tmp_path: Path) -> None:
    """Whisper and SigLIP of the tiny world have one width; the third clip is silent."""
    captions = [json.loads(line) for line in world.captions.read_text().splitlines()]
    (silent,) = [caption for caption in captions if caption["id"] == "caption-2"]
    manifest = write_rows(world.captions.with_name("silent.jsonl"), [silent])
    train_as = {"type": "train_as", "stream": "audio", "by": "video", "instead": True}
    section = settings(world, tmp_path / "run", data__train=str(manifest))
    section["model"] = world.model | {"connector": [train_as, *world.model["connector"]]}
    section["data"] |= {"rows": {"type": "train_as"}, "validation": str(manifest)}
    section["train"] |= {"batch_size": 1, "max_steps": 2}
    section["trainable"] = [["^connector", 1e-3], [".*", None]]
    config = RunConfig.model_validate(section)

    processor = stage_processor(config)
    (part,) = Sample.model_validate(silent).media
    (clip,) = processor.load_clips([part], manifest.parent)
    inputs = processor.prepare(clip)
    assert set(processor.order(inputs)) == {"video"}
    assert set(processor.order(inputs, "train_as")) == {"audio"}

    run_stage(config)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    norms = [step["grad_norm"] for step in steps if "loss" in step]
    assert len(norms) == 2
    assert min(norms) > 0  # sight is hidden, so that the gradients are those of the audio branch
