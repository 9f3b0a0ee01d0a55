"""Settings: an unknown key names the right one, numbers are numbers, overrides reach everywhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from avllm.config import RunConfig, dump_config, load_config
from avllm.config_errors import ConfigError, PresetPlaces, sections_in
from avllm.data.index import Manifest
from avllm.data.manifest import ManifestError
from avllm.errors import UserError, about_setting
from avllm.yaml_files import parse_yaml

PRESET = """
stage: align
output: runs/x
model:
  llm: {name: some/llm}
  encoders:
    video: {type: siglip, name: some/eye}
  connector:
    - {type: mlp, stream: video}
    - {type: position, stream: video, longest: 1e4}
trainable:
  - [^connector, 1e-4]
  - [.*, null]
objectives:
  - {type: next_token}
data:
  train: a.jsonl
train:
  max_steps: 10
"""


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    path = tmp_path / "preset.yaml"
    path.write_text(PRESET)
    return path


def read(preset: Path, *overrides: str) -> RunConfig:
    return load_config(preset, list(overrides))


def test_numbers_without_a_dot_are_numbers(preset: Path) -> None:
    config = read(preset, "train.weight_decay=1e-2", "lora={r: 8, alpha: 1e1}")
    assert config.trainable[0] == ("^connector", 1e-4)
    assert read(preset, "train.max_steps=2e4").train.max_steps == 20_000
    assert config.trainable[1] == (".*", None)
    assert config.train.weight_decay == 0.01
    assert [lora.alpha for lora in config.lora] == [10.0]
    assert config.model is not None
    assert config.model.connector[1]["longest"] == 10_000.0
    config = read(preset, "objectives.0.temperature=7e-2", "model.encoders.video.layers=[1e0, 2]")
    assert config.objectives[0]["temperature"] == 0.07
    assert config.model is not None
    assert config.model.encoders["video"]["layers"] == [1.0, 2]


@pytest.mark.parametrize(
    "override, names",
    [
        ("train.batchsize=4", "train.batchsize.*'batch_size'"),
        ("trian.max_steps=4", "trian.*'train'"),
        ("data.num_worker=2", "data.num_worker.*'num_workers'"),
        ("model.llm.quantise=4bit", "model.llm.quantise.*'quantize'"),
        ("model.samplng={fps: 2}", "model.samplng.*'sampling'"),
        ("lora.rank=8", "lora.rank.*known: .*targets"),
        ("data.train=[{manifset: a.jsonl}]", "manifset.*'manifest'"),
        (
            "batch_size=4",
            "unknown key batch_size; it is train.batch_size .given on the command line.$",
        ),
        ("train.num_workers=4", "it is data.num_workers .given on the command line.$"),
        ("lora.dtype=float32", "it is model.llm.dtype .given on the command line.$"),
        ("lr=1e-4", "trainable"),
        ("train.learning_rate=1e-4", "trainable"),
    ],
)
def test_an_unknown_key_names_the_right_one(preset: Path, override: str, names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        read(preset, override)


@pytest.mark.parametrize(
    "override, place",
    [
        ("model.decoder=x", "decoders are chosen in --decoding"),
        ("model.adapters=[]", "adapters are chosen in model.connector"),
        ("encoders.video=x", "encoders are chosen in model.encoders"),
        ("model.lora={}", "it is lora"),
    ],
)
def test_a_kind_of_part_in_the_wrong_place_gets_its_place(
    preset: Path, override: str, place: str
) -> None:
    with pytest.raises(ConfigError, match=place):
        read(preset, override)


def test_an_error_names_the_line_of_the_preset(preset: Path) -> None:
    """Also of a setting that a stage refuses later, and of several at once."""
    lines = PRESET.splitlines()
    text = PRESET.replace("max_steps: 10", "max_step: 10").replace("longest: 1e4", "longest: []")
    preset.write_text(text.replace("type: mlp", "type: mpl"))
    with pytest.raises(ConfigError) as refused:
        read(preset)
    adapter = lines.index("    - {type: mlp, stream: video}") + 1
    steps = lines.index("  max_steps: 10") + 1
    said = str(refused.value)
    assert f"{preset} line {adapter}: model.connector.0: unknown adapter 'mpl'" in said
    assert f"{preset} line {steps}: unknown key train.max_step" in said
    places = PresetPlaces(preset, ["seed=1"])
    with pytest.raises(UserError) as raised, places.named(), about_setting("model.connector.1"):
        raise UserError("of no use")
    assert str(raised.value) == f"{preset} line {adapter + 1}: model.connector.1: of no use"
    assert places.label("seed", "no") == f"{preset}: no [given on the command line]"


def test_a_preset_that_is_not_there_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"looked in {tmp_path}"):
        load_config("absent.yaml")
    with pytest.raises(ManifestError, match=f"looked in {tmp_path}"):
        Manifest("absent.jsonl")


def test_a_misspelt_setting_or_part_is_refused_before_anything_heavy_is_imported(
    preset: Path,
) -> None:
    code = (
        "import sys; from avllm.training.stage_script import read_presets\n"
        f"for word in ['train.max_step=1', 'objectives.0.type=next_tokn']:\n"
        f"    try: read_presets([{str(preset)!r}, word])\n"
        "    except ValueError as error: print('did you mean' in str(error))\n"
        "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["True", "True", "[]"]


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.max_steps=ten", "train.max_steps.*seen: 'ten'"),
        ("train.max_steps=15e-1", "train.max_steps.*integer"),
        ("train.precision=fp8", "train.precision.*fp32.*seen: 'fp8'"),
        ("train.batch_size=0", "train.batch_size.*greater than 0"),
        ("data.max_skip_rate=2", "data.max_skip_rate"),
        ("stage=pretrain", "stage.*align"),
        ("trainable=[[connector]]", "trainable"),
        ("trainable.0.0='(connector'", r"trainable.0.0: .*seen: '\(connector'"),
        ("train.trackers=[", r"'train.trackers=\['"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_seen(
    preset: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(preset, override)


def test_overrides_reach_into_lists_and_new_sections(preset: Path) -> None:
    config = read(
        preset,
        "model.connector.0.depth=3",
        "objectives.0.weight=0.5",
        "lora.r=4",
        "trainable.0.1=2e-3",
    )
    assert config.model is not None
    assert config.model.connector[0]["depth"] == 3
    assert config.objectives[0]["weight"] == 0.5
    assert [(lora.name, lora.r) for lora in config.lora] == [("default", 4)]
    assert config.trainable[0][1] == 0.002
    assert read(preset, "train={epochs: 2}").train.epochs == 2.0  # YAML, whole sections too
    assert read(preset, "data.train=b.jsonl").data.train[0].manifest == "b.jsonl"


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.connector.5.depth=3", "'5'.* 2; .*0 to 1"),
        ("model.connector.first.depth=3", "'first'"),
        ("seed.x=3", "seed"),
        ("seed", "section.key=value"),
        ("stage.x=3", "stage is 'align'"),
    ],
)
def test_an_override_that_leads_nowhere(preset: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(preset, override)


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.epochs=2", "max_steps is 10 and epochs is 2.0"),
        ("train.max_steps=null", "max_steps is None and epochs is None"),
        ("init=runs/y", "model and init"),
        ("model=null", "model nor init"),
        ("model.sampling={fps: 2, num_frames: 4}", "num_frames is 4 and fps is 2"),
        ("model.sampling={max_frames: 2}", "num_frames is None and fps is None"),
        ("model.encoders={}", "encoders"),
        ("model.encoders={smell: {type: nose}}", "smell"),
    ],
)
def test_one_of_rules(preset: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(preset, override)


def test_a_list_or_a_string_of_sources(preset: Path) -> None:
    config = read(preset, "data.train=[a.jsonl, {manifest: b.jsonl, weight: 5e-1}]")
    assert [(s.manifest, s.weight) for s in config.data.train] == [
        ("a.jsonl", 1.0),
        ("b.jsonl", 0.5),
    ]


def test_settings_written_are_settings_read(preset: Path, tmp_path: Path) -> None:
    config = read(preset, "train.betas=[0.9, 0.95]", "lora.targets=[q_proj]")
    dump_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    "text, message",
    [("- a\n", "odd.yaml.*list"), ("a: [\n", "odd.yaml.*YAML"), ("{}", "odd.yaml.*stage")],
)
def test_files_that_are_no_presets(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


def test_the_preset_of_these_tests_is_yaml_that_reads_numbers_as_strings() -> None:
    loaded: dict[str, Any] = yaml.safe_load(PRESET)
    assert loaded["trainable"][0][1] == "1e-4"  # the trap that the settings undo


def sections_of(section: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield section
    for field in section.model_fields.values():
        for inner in sections_in(field.annotation):
            yield from sections_of(inner)


@pytest.mark.parametrize("section", sections_of(RunConfig), ids=lambda section: section.__name__)
def test_every_setting_has_a_description(section: type[BaseModel]) -> None:
    assert [name for name, field in section.model_fields.items() if not field.description] == []


def _nine_of_nine(levels: int) -> str:
    """Lines of YAML that mean 9 ** levels values by their aliases."""
    text = "a0: &a0 x"
    for number in range(1, levels):
        text += f"\na{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 9)}]"
    return text


ODD_YAML = {
    "a date": "stage: 2024-13-45",
    "a long number": "seed: " + "1" * 5000,
    "a type": "seed: !!int x",
    "a word of no type": "a: !!bool x",
    "deep": "[" * 5000,
    "itself": "a: &a [*a]",
    "aliases of aliases": _nine_of_nine(12),
    "a key twice": "seed: 1\nseed: 2",
    "a key twice, within": "train: {max_steps: 1, lr: 2, max_steps: 3}",
}


@pytest.mark.parametrize("text", ODD_YAML.values(), ids=ODD_YAML.keys())
def test_values_that_yaml_cannot_hold_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "preset.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="no YAML") as refused:
        load_config(path)
    assert "\n" not in str(refused.value)


def test_merged_keys_may_be_given_again() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, x: 4}"
    assert parse_yaml(text)["c"] == {"x": 4, "y": 2}


@pytest.mark.parametrize("override", ["seed=2024-13-45", "seed=" + "[" * 5000])
def test_an_override_that_yaml_cannot_hold_is_named(preset: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="no YAML"):
        read(preset, override)


@pytest.mark.parametrize("key", ["train.warmup", "train.weight_decay", "train.epochs"])
@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_numbers_are_finite(preset: Path, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=key):
        load_config(preset, [f"{key}={value}"])
