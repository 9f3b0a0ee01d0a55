"""The literature's parts in one real stage: each trains, and a killed run ends the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tiny import World, make_regions, make_world, settings
from tiny_runs import difference, kill_after, rows, run, weights

STEPS = 4


def asked_of(world: World, folder: Path, **changes: Any) -> dict[str, Any]:
    """Marked regions, latent queries, and five objectives on rows with drawn marks."""
    video, audio = world.model["connector"]
    latents = {"num_queries": 3, "layers": 1, "heads": 2, "per": "frame"}
    asked = settings(world, folder, data__train=str(make_regions(world)))
    asked["model"] = world.model | {
        "connector": [
            video,
            {"type": "token_marks", "stream": "video", "n": 4, "steps": "first"},
            {"type": "perceiver", "stream": "video", **latents},
            audio,
        ]
    }
    asked["objectives"] = [
        {"type": "next_token"},
        {"type": "assignment", "words": 20},
        {"type": "consistency", "irrelevant": {"heard": ["video"], "seen": ["audio"]}},
        {"type": "query_diversity", "stream": "video", "adapter": 2},
        {"type": "region_guide", "stream": "video", "adapter": 1, "n": 4, "hidden": 8},
    ]
    asked["data"]["rows"] = {"type": "token_marks", "n": 4}
    learn = ("^connector", "^objectives", "^words")
    asked["trainable"] = [*([part, 1e-2] for part in learn), [".*", None]]
    asked["train"] |= {"max_steps": STEPS, "batch_size": 4, "warmup": 0, **changes}
    return asked


def test_all_train_and_a_killed_run_ends_the_same(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", clips=6)
    straight = run(asked_of(world, tmp_path / "straight"))
    killed = asked_of(world, tmp_path / "killed", save_every=1)
    kill_after(killed, 2)
    again = run(killed)
    assert rows(again) == rows(straight)
    assert len(rows(straight)) == STEPS
    assert difference(weights(again), weights(straight)) == 0.0
    objectives = load_file(straight / "objectives.safetensors")
    assert difference(load_file(again / "objectives.safetensors"), objectives) == 0.0
    # The answers' words were counted step by step, and the head of a guide is left in the run.
    assert objectives["assignment.word_counts"].sum() > 0
    assert "region_guide.head.0.weight" in objectives
    first = rows(straight)[0]
    assert all(first[spec["type"]] > 0 for spec in killed["objectives"])
