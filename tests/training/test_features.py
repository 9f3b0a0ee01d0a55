"""Features made before a stage trains: the same as those that it would make itself."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import World, make_world, row, settings, write_preset, write_rows
from tiny_runs import difference, rows, run, together, train, weights
from typer.testing import CliRunner

from avllm.cli.main import app
from avllm.config import RunConfig, load_config
from avllm.config_errors import ConfigError
from avllm.data.cache.fill import CacheError, recipe
from avllm.models.checkpoint import save_checkpoint
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.training.accelerator import make_accelerator
from avllm.training.features import encode_stage
from avllm.training.start import Parts, build_parts


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=4)


def encode(preset: Path, told: Path) -> None:
    """`avllm data encode PRESET --json` in this process; its last line goes to a file."""
    result = CliRunner().invoke(app, ["data", "encode", str(preset), "--workers", "1", "--json"])
    assert result.exit_code == 0, result.output
    if result.stdout:  # the main process speaks
        told.write_text(result.stdout.splitlines()[-1])


def test_encoded_beforehand_a_run_makes_nothing_and_says_the_same(
    world: World, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    cached = settings(
        world, tmp_path / "cached", data__cache=cache, data__validation=str(world.questions)
    )
    together(encode, write_preset(tmp_path / "stage.yaml", cached), tmp_path / "told.json", ranks=2)
    told = json.loads((tmp_path / "told.json").read_text())
    assert (told["wanted"], told["found"], told["encoded"], told["failed"]) == (4, 0, 4, {})
    assert told["bytes"] == sum(p.stat().st_size for p in Path(cache).glob("*.safetensors")) > 0
    before = {p.name: p.stat().st_mtime_ns for p in Path(cache).iterdir()}
    first = run(cached)
    plain = run(
        cached | {"output": str(tmp_path / "plain"), "data": cached["data"] | {"cache": None}}
    )
    assert {p.name: p.stat().st_mtime_ns for p in Path(cache).iterdir()} == before
    assert difference(weights(first), weights(plain)) < 1e-5
    assert [r["padding"] for r in rows(first)] == [r["padding"] for r in rows(plain)]
    assert all(0 <= r["padding"] < 1 for r in rows(first))


def test_a_bit_that_changes_in_the_cache_changes_no_weight(world: World, tmp_path: Path) -> None:
    cached = settings(world, tmp_path / "first", data__cache=str(tmp_path / "cache"))
    first = run(cached)
    (shard,) = (tmp_path / "cache").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-len(content) // 4] ^= 1  # far behind the header
    shard.write_bytes(content)
    second = run(cached | {"output": str(tmp_path / "second")})
    assert difference(weights(second), weights(first)) == 0.0


def test_a_run_says_what_its_cache_saves(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = settings(
        world, tmp_path / "run", data__cache=str(tmp_path / "cache"), train__max_steps=2
    )
    monkeypatch.setattr(logging.getLogger("avllm"), "handlers", [caplog.handler])
    train(cached)
    train(cached | {"output": str(tmp_path / "again")})
    messages = dict.fromkeys(record.getMessage() for record in caplog.records)
    accounts = [message for message in messages if "features of" in message]
    for line, (cached, rate) in zip(accounts, ((0, 0.0), (4, 100.0)), strict=True):
        numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", line)]
        assert len(numbers) == 8, "clips, size, clips in the cache, rate, and four times"
        assert (numbers[0], numbers[2], numbers[3]) == (4, cached, rate)


def test_what_the_run_never_draws_is_not_encoded(world: World, tmp_path: Path) -> None:
    """One clip of the captions, none of a source without weight, two of validation."""
    clips = [
        {"type": "video", "video": str(p)} for p in sorted(world.captions.parent.glob("*.mp4"))
    ]
    whole = [row(str(n), [clip], "red") for n, clip in enumerate(clips)]
    train = write_rows(tmp_path / "train.jsonl", whole)
    never = write_rows(tmp_path / "never.jsonl", [row("never", [{**clips[0], "end": 0.3}], "red")])
    seen = write_rows(
        tmp_path / "seen.jsonl",
        [row(str(n), [{**c, "end": 0.4}], "red") for n, c in enumerate(clips)],
    )
    asked = settings(
        world, tmp_path / "run", data__cache=str(tmp_path / "cache"), data__validation=str(seen)
    )
    asked["data"]["train"] = [
        {"manifest": str(train), "max_rows": 2},
        {"manifest": str(never), "weight": {0: 0.0, 9: 1.0}},
    ]
    asked["train"] |= {"max_steps": 1, "batch_size": 1, "accumulate": 1, "validate_rows": 2}
    preset = write_preset(tmp_path / "stage.yaml", asked)

    def encoded(*more: str) -> tuple[int, int]:
        done = CliRunner().invoke(
            app, ["data", "encode", str(preset), *more, "--json"], catch_exceptions=False
        )
        told = json.loads(done.stdout.splitlines()[-1])
        return told["wanted"], told["encoded"]

    assert encoded() == (1 + 2, 3)
    before = {p.name for p in (tmp_path / "cache").iterdir()}
    run(asked)
    assert {p.name for p in (tmp_path / "cache").iterdir()} == before
    assert encoded("--processes", "3") == (3 + 2, 2)


def shards(cache: Path) -> dict[str, bytes]:
    """The shards of a cache by name."""
    return {path.name: path.read_bytes() for path in cache.glob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'avllm[ray]'"
)
def test_ray_makes_the_same_files(
    world: World, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Three shards, the last with a bad file: refused for want of room, continued, done."""
    import ray

    request.addfinalizer(ray.shutdown)
    clips = sorted(world.captions.parent.glob("*.mp4"))
    (tmp_path / "bad.mp4").write_bytes(clips[0].read_bytes()[:900])
    parts = [{"type": "video", "video": str(clips[n % 4]), "end": 0.3 + n / 100} for n in range(69)]
    parts.append({"type": "video", "video": "bad.mp4"})
    manifest = write_rows(
        tmp_path / "many.jsonl", [row(str(n), [part], "red") for n, part in enumerate(parts)]
    )
    whole = settings(
        world, tmp_path / "run", data__train=str(manifest), train__max_steps=len(parts)
    )
    preset = write_preset(tmp_path / "stage.yaml", whole)

    def encoded(cache: str, *more: str) -> dict[str, Any]:
        given = [str(preset), f"data.cache={tmp_path / cache}", *more, "--json"]
        result = CliRunner().invoke(app, ["data", "encode", *given], catch_exceptions=False)
        return json.loads(result.stdout.splitlines()[-1])

    here = encoded("here")
    assert (here["encoded"], len(here["failed"]), len(shards(tmp_path / "here"))) == (69, 1, 3)
    on_ray = ("--engine", "ray", "--workers", "2")
    with pytest.raises(CacheError, match="Raise it to at least"):
        encoded("ray", "data.cache_max_gb=0.000001", *on_ray)
    assert len(shards(tmp_path / "ray")) == 1
    there = encoded("ray", *on_ray)
    assert (there["found"], there["encoded"], there["failed"]) == (32, 37, here["failed"])
    assert shards(tmp_path / "ray") == shards(tmp_path / "here")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "ray").iterdir()}
    assert (encoded("ray", *on_ray)["found"], encoded("ray")["encoded"]) == (69, 0)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "ray").iterdir()} == before


def test_options_of_an_encoder_decide_its_features_and_its_checkpoint_does_not(
    world: World, tmp_path: Path
) -> None:
    def made_by(parts: Any) -> str:
        return json.dumps(
            recipe(parts.processor, parts.model.freeze().encoders, "fp32"), sort_keys=True
        )

    def stage(**options: object) -> Any:
        asked = settings(world, tmp_path / "run")
        asked["model"]["encoders"]["video"] |= options
        return build_parts(RunConfig.model_validate(asked))

    parts = stage()
    save_checkpoint(parts.model, parts.processor, tmp_path / "saved", [])
    again = Parts(
        AVLLM.from_pretrained(tmp_path / "saved"),
        AVProcessor.from_pretrained(tmp_path / "saved"),
        [],
    )
    assert made_by(again) == made_by(parts), "a later stage finds what the one before has made"
    assert made_by(stage(layers=[-2])) != made_by(parts), "same weights, same shape, another layer"


def test_refused_where_it_would_be_wrong(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def filling(ray_workers: int = 0, **changes: object) -> None:
        config = RunConfig.model_validate(settings(world, tmp_path / "run", **changes))
        encode_stage(config, make_accelerator(config, tmp_path / "run"), ray_workers)

    cache = {"data__cache": str(tmp_path / "cache")}
    with pytest.raises(CacheError, match="no cache to fill"):
        filling()
    with pytest.raises(CacheError, match="trains encoders.audio"):
        filling(**cache, trainable=[["^encoders.audio", 1e-4], ["^connector", 1e-3], [".*", None]])
    with pytest.raises(CacheError, match=r"cache_max_gb is 0.000001 GB\. Raise it to at least"):
        filling(**cache, data__cache_max_gb=1e-6)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "ray", None)
        with pytest.raises(CacheError, match=r"needs Ray; expected: pip install 'avllm\[ray\]'"):
            filling(2, **cache)
    preset = write_preset(
        tmp_path / "a.yaml",
        settings(world, tmp_path / "run", **cache, data__augment={"roll": True}),
    )
    with pytest.raises(ConfigError, match="both augment and cache are given"):
        load_config(preset)
