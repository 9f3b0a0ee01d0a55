"""Trackers get the run's name, its settings and its figures, and fail before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate.tracking import GeneralTracker, get_available_trackers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import World, make_world, settings
from tiny_runs import run, train

from avllm.config import RunConfig
from avllm.config_errors import ConfigError
from avllm.models.modeling_avllm import AVLLM
from avllm.training.accelerator import check_trackers, hyper_parameters, run_name
from avllm.training.points.record import FREE_KEYS, LENGTHS

ABSENT = {"wandb", "mlflow", "swanlab", "trackio"} - {
    str(kind) for kind in get_available_trackers()
}


class Lines(GeneralTracker):
    """Write what it is given into the run's folder."""

    name = "lines"
    requires_logging_directory = False

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.path = run / "tracked.jsonl"

    @property
    def tracker(self) -> Path:
        return self.path

    def store_init_configuration(self, values: dict[str, object]) -> None:
        self.append({"settings": values})

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.append({"step": step, **values})

    def finish(self) -> None:
        self.append({"finished": True})

    def append(self, content: dict[str, object]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")


class Locked(Lines):
    """Ask for a key, as wandb does without a terminal."""

    def start(self) -> None:
        raise RuntimeError("no API key configured")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), clips=4)


def test_settings_and_figures_of_objectives_reach_trackers_and_log(
    world: World, tmp_path: Path
) -> None:
    names = [f"{__name__}:Lines", "tensorboard"]
    asked = settings(world, tmp_path / "run", "align", train__trackers=names, train__max_steps=2)
    train(asked)
    first, *steps, last = [
        json.loads(line) for line in (tmp_path / "run" / "tracked.jsonl").read_text().splitlines()
    ]
    config = RunConfig.model_validate(asked)
    expected = hyper_parameters(config, "lines")
    del expected["model.llm.date"]  # set when the run begins
    assert first["settings"].items() >= expected.items()
    assert [row["step"] for row in steps] == [1, 2]
    assert steps[0].keys() >= {"loss", "contrastive/loss", "contrastive/hits", "lr"}
    assert last == {"finished": True}
    logged = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(logged[0])["contrastive/hits"] == steps[0]["contrastive/hits"]
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "avllm")).Reload()
    assert [event.step for event in events.Scalars("contrastive/hits")] == [1, 2]


def test_several_processes_have_one_tracker(world: World, tmp_path: Path) -> None:
    names = [f"{__name__}:Lines"]
    run(settings(world, tmp_path / "run", train__trackers=names, train__max_steps=1), ranks=2)
    lines = (tmp_path / "run" / "tracked.jsonl").read_text().splitlines()
    assert len(lines) == 3  # settings, a step, the end


def test_settings_are_numbers_and_texts_that_stay_the_same_on_the_way(
    world: World, tmp_path: Path
) -> None:
    config = RunConfig.model_validate(settings(world, tmp_path / "mine" / "stage1"))
    values = hyper_parameters(config, "tensorboard")
    assert values["train.max_steps"] == 4
    assert values["model.connector.0.type"] == "mlp"
    assert values["trainable.0"] == '["^connector", 0.001]'
    assert values["data.cache"] == "null"
    assert not values.keys() & FREE_KEYS
    assert not hyper_parameters(config, "mlflow").keys() & {*FREE_KEYS, *LENGTHS}
    assert all(isinstance(value, str | int | float) for value in values.values())
    assert all(len(str(value)) <= 500 for value in values.values())  # MLflow's older limit
    assert run_name(config) == "mine-stage1"


@pytest.mark.parametrize("name", [f"{__name__}:Locked", "abacus", *sorted(ABSENT)])
def test_a_tracker_that_cannot_start_is_refused_before_the_model_is_loaded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(AVLLM, "from_backbones", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ConfigError) as refused:
        train(settings(world, tmp_path / "run", train__trackers=[name]))
    reasons = {f"{__name__}:Locked": "tracker", "abacus": "unknown_tracker"}
    assert refused.value.reason == reasons.get(name, "not_installed")
    assert refused.value.setting == "train.trackers"


@pytest.mark.parametrize("name", sorted(ABSENT))
def test_a_tracker_that_is_not_installed_names_its_package(name: str) -> None:
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        check_trackers([name])
