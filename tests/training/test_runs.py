"""A stage on a tiny model and real media: runs that have to be equal, runs that have to stop."""

from __future__ import annotations

import json
import logging
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import World, make_world, row, settings, text, write_rows
from tiny_runs import difference, kill_after, losses, rows, run, together, train, weights

from avllm import distributed
from avllm.config import RunConfig
from avllm.config_data import SourceConfig
from avllm.errors import Stopped, UserError
from avllm.training.accounting import BestByError, chosen_figure, is_better
from avllm.training.start import Parts, build_datasets, name_unclear
from avllm.training.trainer import Trainer

LORA = {"r": 2, "alpha": 4, "dropout": 0.3}
RULES = [["^connector", 1e-3], ["lora_", 1e-3], [".*", None]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny world for all tests of this file."""
    return make_world(tmp_path_factory.mktemp("world"))


def stage(
    world: World, folder: Path, name: str, kind: str = "caption", **changes: Any
) -> dict[str, Any]:
    """A stage of four steps on the questions."""
    return settings(
        world,
        folder / name,
        kind,
        **{"data__train": str(world.questions), "train__warmup": 0, **changes},
    )


@pytest.fixture(scope="module")
def straight(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs, with LoRA, dropout and validation."""
    return run(validated(world, tmp_path_factory.mktemp("straight")))


def validated(world: World, folder: Path) -> dict[str, Any]:
    """Return a stage of eight steps that chooses its best model by right answers."""
    changes = {"lora": LORA, "trainable": RULES, "train__max_steps": 8, "train__validate_every": 2}
    changes |= {"data__validation": str(world.questions), "train__best_by": "next_token/answers"}
    return stage(world, folder, "run", **changes)


def test_eight_times_one_is_one_times_eight(world: World, tmp_path: Path) -> None:
    one = run(stage(world, tmp_path, "one", train__batch_size=8))
    eight = run(stage(world, tmp_path, "eight", train__batch_size=1, train__accumulate=8))
    assert losses(one) == pytest.approx(losses(eight), abs=1e-6)
    assert difference(weights(one), weights(eight)) < 1e-6
    assert losses(one)[0] != losses(one)[-1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_run_goes_on_bit_identically(
    world: World, straight: Path, tmp_path: Path, num_workers: int
) -> None:
    asked = validated(world, tmp_path)
    asked["train"]["save_every"], asked["data"]["num_workers"] = 3, num_workers
    kill_after(asked, 4)
    killed = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert 4 <= killed < 8
    run(asked)
    assert rows(tmp_path / "run") == rows(straight)
    finished = (tmp_path / "run" / "finished.json").read_text()
    assert finished == (straight / "finished.json").read_text()
    assert difference(weights(tmp_path / "run"), weights(straight)) == 0.0
    assert difference(weights(tmp_path / "run" / "best"), weights(straight / "best")) == 0.0
    assert len(list((tmp_path / "run" / "checkpoints").glob("*"))) == 2


def test_a_finished_run_is_left_alone(world: World, tmp_path: Path) -> None:
    asked = stage(world, tmp_path, "run", train__max_steps=1)
    before = (run(asked) / "trained.safetensors").stat().st_mtime_ns
    assert (run(asked) / "trained.safetensors").stat().st_mtime_ns == before


def test_other_settings_are_refused_on_resume(world: World, tmp_path: Path) -> None:
    asked = stage(world, tmp_path, "run", train__max_steps=1)
    run(asked)
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())
    del recorded["data"]["batches"], recorded["train"]["optimizer"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(recorded))
    train(asked)  # a run from before these settings existed
    with pytest.raises(Exception, match=r"train.batch_size: 2 then, 3 now"):
        train(stage(world, tmp_path, "run", train__max_steps=1, train__batch_size=3))


def test_other_data_are_refused_on_resume_and_a_failed_start_is_forgotten(
    world: World, tmp_path: Path
) -> None:
    manifest = tmp_path / "rows.jsonl"
    asked = stage(world, tmp_path, "run", train__max_steps=1, data__train=str(manifest))
    with pytest.raises(Exception, match=r"rows.jsonl"):
        train(asked)
    bare = [
        row("a", [text("what colour is it ?")], "red"),
        row("b", [text("what colour is it ?")], "blue"),
    ]
    write_rows(manifest, bare)
    with pytest.raises(Exception, match="none of the 1 steps .* nothing was trained"):
        train(stage(world, tmp_path, "run", "align", train__max_steps=1, data__train=str(manifest)))
    (tmp_path / "run" / "finished.json").touch()
    write_rows(manifest, bare[:1])
    with pytest.raises(Exception, match=r"inputs.*rows.jsonl: '\w{64}' then, '\w{64}' now"):
        train(stage(world, tmp_path, "run", "align", train__max_steps=1, data__train=str(manifest)))


def test_a_run_that_cannot_train_says_so(world: World, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no rule of `trainable` trains its set 'default'"):
        train(stage(world, tmp_path, "frozen", lora=LORA))
    with pytest.raises(UserError, match=r"lora.targets is \['nothing'\]: Target modules"):
        train(
            stage(
                world, tmp_path, "untargeted", lora=LORA | {"targets": ["nothing"]}, trainable=RULES
            )
        )
    with pytest.raises(Exception, match=r"train.trackers: tracker \w+ is not installed"):
        train(stage(world, tmp_path, "blind", train__trackers=[absent_tracker()]))
    with pytest.raises(Exception, match=r"step 2: the gradient's norm is (nan|inf)[^:]*: \w+-\d"):
        train(stage(world, tmp_path, "burst", trainable=[["^connector", 1e30], [".*", None]]))
    assert not (tmp_path / "burst" / "finished.json").exists()


def absent_tracker() -> str:
    """A tracker that accelerate knows and that is not installed here."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    absent = sorted(
        {str(name) for name in LOGGER_TYPE_TO_CLASS} - {str(t) for t in get_available_trackers()}
    )
    if not absent:
        pytest.skip("every tracker is installed")
    return absent[0]


def test_cached_and_uncached_are_equal_and_a_second_run_decodes_nothing(
    world: World, tmp_path: Path
) -> None:
    plain = run(stage(world, tmp_path, "plain"))
    cache = str(tmp_path / "cache")
    first = run(stage(world, tmp_path, "first", data__cache=cache))
    shards = {p.name: p.stat().st_mtime_ns for p in Path(cache).iterdir()}
    second = run(stage(world, tmp_path, "second", data__cache=cache, data__num_workers=2))
    assert losses(plain) == pytest.approx(losses(first), abs=1e-5)
    assert losses(first) == losses(second)
    assert {p.name: p.stat().st_mtime_ns for p in Path(cache).iterdir()} == shards


def test_the_cache_is_refused_when_an_encoder_trains(world: World, tmp_path: Path) -> None:
    rules = [["^connector", 1e-3], ["^encoders.audio", 1e-4], [".*", None]]
    with pytest.raises(
        Exception, match=r"data.cache is set, but `trainable` trains encoders.audio"
    ):
        train(stage(world, tmp_path, "run", data__cache=str(tmp_path / "cache"), trainable=rules))


def test_bad_rows_are_named_counted_and_left_out(world: World, tmp_path: Path) -> None:
    good = [json.loads(line) for line in world.questions.read_text().splitlines()]
    for sample in good:
        part = sample["messages"][0]["content"][0]
        part["video"] = str(world.questions.parent / part["video"])
    clip = Path(good[0]["messages"][0]["content"][0]["video"])
    (tmp_path / "zero.mp4").touch()
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:300])
    ask = text("what colour is it ?")
    bad = [
        row("gone", [{"type": "video", "video": "gone.mp4"}, ask], "red"),
        row("zero", [{"type": "video", "video": "zero.mp4"}, ask], "red"),
        row("cut", [{"type": "video", "video": "cut.mp4"}, ask], "red"),
        row("mute", [{"type": "video", "video": str(clip)}, ask], " "),
        row("long", [{"type": "video", "video": str(clip)}, ask], "red " * 400),
    ]
    manifest = str(write_rows(tmp_path / "mixed.jsonl", good + bad))
    changes = {"data__train": manifest, "data__max_length": 200, "train__max_steps": 15}
    found = run(stage(world, tmp_path, "run", data__max_skip_rate=0.3, **changes))
    skipped = [json.loads(line) for line in (found / "skipped.jsonl").read_text().splitlines()]
    reasons = {entry["id"]: entry["reason"] for entry in skipped}
    assert reasons.keys() == {"gone", "zero", "cut", "mute", "long"}
    assert reasons["gone"] == "missing"
    assert reasons["zero"] == "zero_byte"
    assert reasons["long"] == "too_long"
    assert reasons["mute"] == "empty_answer"
    assert all(entry["source"] == "tiny" for entry in skipped)
    with pytest.raises(Exception, match=r"more than max_skip_rate = 1.0%"):
        train(stage(world, tmp_path, "strict", **changes))


def test_validation_rows_without_a_target_are_no_figure(world: World, tmp_path: Path) -> None:
    nothing = write_rows(
        tmp_path / "text.jsonl", [row("text", [text("what ?")], "red")]
    )  # no clip to align it with
    changes = {"data__validation": str(nothing), "train__validate_every": 1, "train__max_steps": 2}
    found = run(settings(world, tmp_path / "align", "align", **changes))
    assert json.loads((found / "finished.json").read_text())["best_validation"] is None
    assert not (found / "best").exists(), "a loss of nothing would be the best for ever"


def test_rows_in_quarantine_are_left_out_and_written_down(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [json.loads(line)["id"] for line in world.questions.read_text().splitlines()]
    (tmp_path / "q.txt").write_text(f"{ids[0]}\tsilent\n{ids[1]}\tzero byte\nnobody\tmissing\n")
    changes = {"data__quarantine": str(tmp_path / "q.txt"), "train__max_steps": 1}
    monkeypatch.setattr(logging.getLogger("avllm"), "handlers", [caplog.handler])
    train(stage(world, tmp_path, "run", data__max_skip_rate=0.2, **changes))
    skipped = [
        json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    ]
    assert [(s["step"], s["id"], s["reason"]) for s in skipped] == [
        (0, ids[0], "silent"),
        (0, ids[1], "zero byte"),
    ]
    assert "in quarantine: 1 tiny/silent, 1 tiny/zero byte" in caplog.text
    assert "no manifest of this run has nobody" in caplog.text
    with pytest.raises(
        Exception,
        match=rf"2 of {len(ids)} rows are in quarantine .* more than max_skip_rate = 1.0%",
    ):
        train(stage(world, tmp_path, "strict", **changes))


def test_a_leaked_row_leaves_training_and_its_test_row_stays(world: World, tmp_path: Path) -> None:
    ids = [json.loads(line)["id"] for line in world.questions.read_text().splitlines()]
    (tmp_path / "q.txt").write_text(f"{ids[0]}\ttest_id,test_media\n{ids[1]}\tmissing,test_id\n")
    changes = {
        "data__quarantine": str(tmp_path / "q.txt"),
        "data__validation": str(world.questions),
    }
    config = RunConfig.model_validate(stage(world, tmp_path, "run", "align", **changes))
    config.data.rows = {
        "type": "each_turn"
    }  # the default asks the model whether it reads questions
    parts = Parts(None, None, [])  # type: ignore[arg-type]
    datasets = filter(None, build_datasets(config, parts))
    left_out = [{bad.id: bad.reason for bad in dataset.items.quarantined} for dataset in datasets]
    assert left_out == [
        {ids[0]: "test_id,test_media", ids[1]: "missing,test_id"},
        {ids[1]: "missing"},
    ]


def in_other_manifests(world: World, folder: Path) -> tuple[Path, Path]:
    """Manifests of training and validation whose ids are 0, 1, 2, ... in both, on other files."""
    asked = text("what colour is it ?")
    paths = []
    for first, name in ((0, "train"), (6, "validation")):
        clips = [str(world.captions.parent / f"{n:03d}.mp4") for n in range(first, first + 4)]
        rows = [
            row(str(n), [{"type": "video", "video": clip}, asked], "red")
            for n, clip in enumerate(clips)
        ]
        paths.append(
            write_rows(folder / f"{name}.jsonl", [*rows, row(f"{name}-only", [asked], "red")])
        )
    return paths[0], paths[1]


def test_a_listed_training_row_is_no_validation_row_with_the_same_id(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, validation = in_other_manifests(world, tmp_path)
    reasons = {
        "1": "missing",
        "2": "test_id",
        "3": "timeout,test_media",
        "validation-only": "crashed",
        "nobody": "x",
    }
    (tmp_path / "q.txt").write_text("".join(f"{id}\t{reason}\n" for id, reason in reasons.items()))
    changes = {"data__quarantine": str(tmp_path / "q.txt"), "data__train": str(training)}
    config = RunConfig.model_validate(
        stage(world, tmp_path, "run", **changes, data__validation=str(validation))
    )
    config.data.rows = {
        "type": "each_turn"
    }  # the default asks the model whether it reads questions
    parts = Parts(None, None, [])  # type: ignore[arg-type]
    datasets = [dataset for dataset in build_datasets(config, parts) if dataset]
    left_out = [[bad.id for bad in dataset.items.quarantined] for dataset in datasets]
    assert left_out == [["1", "2", "3"], ["validation-only"]]
    monkeypatch.setattr(logging.getLogger("avllm"), "handlers", [caplog.handler])
    name_unclear(config, datasets)
    assert "no manifest of this run has nobody" in caplog.text
    assert "several" not in caplog.text
    config.data.train = [
        SourceConfig(manifest=str(training)),
        SourceConfig(manifest=str(validation)),
    ]
    datasets = [dataset for dataset in build_datasets(config, parts) if dataset]
    name_unclear(config, datasets)
    assert "1, 2, 3 left several manifests, since lists go by ids" in caplog.text, (
        "two sources of training have them"
    )


def test_validation_names_the_rows_that_it_goes_without(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, validation = in_other_manifests(world, tmp_path)
    gone = row("gone", [{"type": "video", "video": "gone.mp4"}], "red")
    write_rows(
        validation, [json.loads(line) for line in validation.read_text().splitlines()] + [gone]
    )
    changes = {
        "data__train": str(training),
        "data__validation": str(validation),
        "train__validate_every": 2,
    }
    monkeypatch.setattr(logging.getLogger("avllm"), "handlers", [caplog.handler])
    train(stage(world, tmp_path, "run", **changes))
    named = {
        id(r)
        for r in caplog.records
        if r.getMessage().startswith("validation goes without gone (tiny): missing")
    }
    assert len(named) == 1, "validated twice, named once"
    entries = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [e["validation/left_out"] for e in entries if "validation/loss" in e] == [1, 1]
    assert not (tmp_path / "run" / "skipped.jsonl").exists(), "the account of training rows"


@pytest.mark.parametrize(
    ("save_every", "said"), [(1, "goes on from step 2"), (9, "goes on from the beginning")]
)
def test_ctrl_c_says_from_where_it_goes_on(
    save_every: int,
    said: str,
    world: World,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def pressed(self: Trainer, *step: Any) -> float:
        if self.position.step == 2:
            raise KeyboardInterrupt
        return update(self, *step)

    update = Trainer.update
    monkeypatch.setattr(Trainer, "update", pressed)
    monkeypatch.setattr(logging.getLogger("avllm"), "handlers", [caplog.handler])
    with pytest.raises(KeyboardInterrupt):
        train(stage(world, tmp_path, "run", train__save_every=save_every))
    assert "stopped at step 2" in caplog.text
    assert said in caplog.text


def train_until_a_signal(settings: dict[str, Any], number: int, rank: int) -> None:
    """Train a stage that gets a signal in its third step, in one of its processes."""

    def update(self: Trainer, *step: Any) -> float:
        if self.position.step == 2 and distributed.rank() == rank:
            signal.raise_signal(number)
        return unchanged(self, *step)

    unchanged = Trainer.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "update", update)
        with pytest.raises(Stopped) as raised:
            train(settings)
    assert raised.value.number in (number, signal.SIGTERM)


@pytest.mark.parametrize(
    ("number", "ranks"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)]
)
def test_a_signal_ends_the_step_and_writes_a_resume_point(
    number: int, ranks: int, world: World, tmp_path: Path
) -> None:
    whole = run(stage(world, tmp_path, "whole"), ranks=ranks)
    stopped = stage(world, tmp_path, "stopped", data__num_workers=1)
    together(train_until_a_signal, stopped, number, ranks - 1, ranks=ranks)
    points = [point.name for point in (tmp_path / "stopped" / "checkpoints").iterdir()]
    assert points == ["step_3"]
    assert difference(weights(run(stopped, ranks=ranks)), weights(whole)) == 0.0


def test_a_budget_of_tokens_changes_no_number(world: World, tmp_path: Path) -> None:
    whole = run(stage(world, tmp_path, "whole", train__batch_size=6))
    budget = {"train__batch_size": 6, "train__max_tokens": 100, "data__max_length": 100}
    cut = run(stage(world, tmp_path, "cut", **budget))
    assert losses(cut) == pytest.approx(losses(whole), abs=1e-6)
    assert difference(weights(cut), weights(whole)) < 1e-6
    assert rows(cut) != rows(whole), "no batch was cut"


def test_stages_follow_each_other(world: World, tmp_path: Path) -> None:
    align = run(settings(world, tmp_path / "align", "align", train__max_steps=2))
    follow = {"model": None, "init_from_scratch": False, "train__max_steps": 1}
    with pytest.raises(
        Exception, match=r"stage instruct starts from a finished caption or instruct run"
    ):
        train(settings(world, tmp_path / "early", "instruct", init=str(align), **follow))
    caption = run(settings(world, tmp_path / "caption", "caption", init=str(align), **follow))
    rules = {"lora": LORA, "trainable": RULES}
    instruct = run(
        settings(world, tmp_path / "instruct", "instruct", init=str(caption), **follow, **rules)
    )
    chain = json.loads((instruct / "manifest.json").read_text())["stages"]
    assert [s["stage"] for s in chain] == ["align", "caption", "instruct"]
    with pytest.raises(Exception, match="no init is given"):
        train(settings(world, tmp_path / "none", init_from_scratch=False))
    with pytest.raises(Exception, match="is no checkpoint"):
        train(settings(world, tmp_path / "empty", init=str(tmp_path), **follow))


def shuffled(manifest: Path, seed: int | None) -> str:
    """Write the rows sorted by their answers, or shuffled; return the path."""
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows.sort(key=lambda row: json.dumps(row["messages"][-1]))
    if seed is not None:
        random.Random(seed).shuffle(rows)
    return str(write_rows(manifest.with_name(f"{manifest.stem}_{seed}.jsonl"), rows))


@pytest.mark.parametrize("rows", [None, 3])
def test_validation_is_the_same_for_every_order_of_its_rows(
    world: World, tmp_path: Path, rows: int | None
) -> None:
    """The negatives of a row are those of its batch, which follows from the rows' ids."""
    figures = []
    for seed in (None, 1):
        changes = {"data__validation": shuffled(world.captions, seed), "train__max_steps": 1}
        changes |= {"train__validate_rows": rows, "train__batch_size": 2}
        align = run(settings(world, tmp_path / f"{rows}-{seed}", "align", **changes))
        figures.append([entry for entry in metrics(align) if "validation/loss" in entry])
    assert len(figures[0]) == 1
    assert figures[0] == figures[1]


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_best_by_names_a_figure_of_validation(world: World, tmp_path: Path) -> None:
    changes = {"data__validation": str(world.questions), "train__validate_every": 1}
    found = run(settings(world, tmp_path / "run", train__best_by="next_token/answers", **changes))
    shares = [
        entry["validation/next_token/answers"]
        for entry in metrics(found)
        if "validation/loss" in entry
    ]
    assert all(0 <= share <= 1 for share in shares)
    assert json.loads((found / "finished.json").read_text())["best_validation"] == max(shares)
    for name, validation, reason in (
        ("contrastive/hits", str(world.questions), "unknown_figure"),
        ("next_token/answer", str(world.questions), "unknown_figure"),
        ("accuracy", str(world.questions), "unknown_figure"),
        ("next_token/answers", [], "no_validation"),
    ):
        changes = {"train__best_by": name, "data__validation": validation}
        with pytest.raises(BestByError) as error:
            train(settings(world, tmp_path / "not", **changes))
        assert error.value.reason == reason
        if reason == "unknown_figure":
            for right in ("loss", "next_token", "next_token/hits", "next_token/answers"):
                assert right in str(error.value)
        assert not (tmp_path / "not" / "metrics.jsonl").exists(), "before the first step"


def test_losses_fall_and_other_figures_rise() -> None:
    assert is_better(0.4, 0.5, "loss")
    assert not is_better(0.5, 0.5, "contrastive")
    assert is_better(0.6, 0.5, "contrastive/hits")
    assert not is_better(0.5, 0.5, "next_token/answers")
    assert is_better(0.0, None, "next_token/answers")
    with pytest.raises(BestByError):
        chosen_figure({"loss": 1.0}, "next_token/answer")


def test_the_run_folder_tells_what_was_done(world: World, tmp_path: Path) -> None:
    changes = {
        "train__validate_every": 2,
        "data__validation": str(world.captions),
        "train__trackers": ["tensorboard"],
    }
    found = run(stage(world, tmp_path, "run", **changes))
    recorded = yaml.safe_load((found / "config.yaml").read_text())
    given = stage(world, tmp_path, "run", **changes)
    given["model"]["llm"]["date"] = recorded["model"]["llm"]["date"]  # the day on which it began
    assert RunConfig.model_validate(recorded) == RunConfig.model_validate(given)
    assert (found / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list(found.glob("logs/**/events*"))
    entries = [json.loads(line) for line in (found / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if "validation/loss" in e] == [2, 4]
    assert (found / "best" / "trained.safetensors").is_file()


def test_bf16_and_gradient_checkpointing_train(world: World, tmp_path: Path) -> None:
    plain = run(stage(world, tmp_path, "plain"))
    fine = run(stage(world, tmp_path, "fine", train__gradient_checkpointing=True))
    rough = run(stage(world, tmp_path, "rough", train__precision="bf16"))
    assert losses(fine) == pytest.approx(losses(plain), abs=1e-6)
    assert losses(rough) == pytest.approx(losses(plain), abs=0.05)
    assert losses(rough) != losses(plain)
