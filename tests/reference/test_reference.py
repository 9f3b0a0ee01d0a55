"""Settings, fields of rows and parts are explained by the code that reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from avllm.cli.main import app
from avllm.config_errors import ConfigError
from avllm.models.encoders import check_encoder
from avllm.reference.page import page
from avllm.reference.parts import arguments_of, describe, parts
from avllm.reference.settings import Setting, find_setting, preset_settings, row_fields
from avllm.registry import CHOSEN_IN, UnknownPartError, check, choices, kinds

ROOT = Path(__file__).resolve().parents[2]
INVOKE = CliRunner().invoke
PARTS = [(kind, name) for kind in kinds() for name in choices(kind)]


def all_settings() -> list[Setting]:
    roots = (*preset_settings(), *row_fields())
    return [setting for root in roots for setting in root.walk()]


def test_the_page_is_the_one_that_the_code_makes() -> None:
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == page(), "run: python -m avllm.reference.page docs/settings.md"


@pytest.mark.parametrize("setting", all_settings(), ids=lambda setting: setting.key)
def test_every_key_has_a_meaning_and_finds_itself(setting: Setting) -> None:
    assert setting.about
    assert setting.type
    assert setting.default
    assert find_setting(setting.key) == setting


@pytest.mark.parametrize(
    "key, kind, allowed, default",
    [
        ("train.max_steps", "whole number or null", "above 0", "null"),
        ("train.schedule", "one of cosine, constant", "", "cosine"),
        ("train.betas", "[number, number]", "", "[0.9, 0.98]"),
        ("stage", "one of align, caption, instruct, prefer", "", "required"),
        ("data.max_skip_rate", "number", "at least 0, at most 1", "0.01"),
        ("trainable", "list of [text, number or null]", "not empty", "required"),
        ("lora.0.r", "whole number", "above 0", "16"),
        ("model.sampling", "section", "", "{num_frames: 8}"),
        ("row.messages.content.video.sound", "one of auto, 'on', 'off'", "", "auto"),
        ("row.kind", "text or null", "", "null"),
    ],
)
def test_a_key_is_described(key: str, kind: str, allowed: str, default: str) -> None:
    setting = find_setting(key)
    assert (setting.type, setting.allowed, setting.default) == (kind, allowed, default)


@pytest.mark.parametrize(
    "key, example",
    [
        ("train.schedule", {"train": {"schedule": "cosine"}}),
        ("data.train.weight", {"data": {"train": [{"weight": 1.0}]}}),
        ("lora.r", {"lora": [{"r": 16}]}),
        (
            "row.messages.content.video.sound",
            {"messages": [{"content": [{"type": "video", "sound": "auto"}]}]},
        ),
    ],
)
def test_the_place_of_a_key_is_shown(key: str, example: object) -> None:
    assert find_setting(key).example == example


@pytest.mark.parametrize(
    "key, reason, nearest",
    [
        ("train.max_step", "unknown_setting", "train.max_steps"),
        ("model.lora", "unknown_setting", "did you mean lora?"),
        ("row.sound", "unknown_setting", "row.messages.content.video.sound"),
        ("model.connector.0.depth", "option_of_part", "avllm parts adapters"),
    ],
)
def test_an_unknown_key_gets_the_nearest(key: str, reason: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=nearest.replace("?", r"\?")) as refused:
        find_setting(key)
    assert refused.value.reason == reason


def test_the_kinds_of_a_part_are_its_choices() -> None:
    setting = find_setting("model.layout")
    assert setting.kind == "layouts"
    assert setting.allowed.startswith(", ".join(choices("layouts")))


def test_the_commands_print_what_is_described() -> None:
    tree = INVOKE(app, ["config"], catch_exceptions=False).stdout
    assert "stage: one of align, caption, instruct, prefer (required)" in tree
    assert "  max_steps: whole number or null, above 0 = null" in tree
    one = INVOKE(app, ["config", "train.schedule"], catch_exceptions=False).stdout
    assert find_setting("train.schedule").about in one
    assert "    train:\n      schedule: cosine" in one
    answered = INVOKE(app, ["config", "data", "--json"], catch_exceptions=False).stdout
    (data,) = json.loads(answered)["settings"]
    assert "manifest" in {inner["key"].rpartition(".")[2] for inner in data["inner"][0]["inner"]}
    told = INVOKE(app, ["parts", "encoders", "mel_conv"], catch_exceptions=False).stdout
    assert "file:  avllm/encoders/mel_conv.py" in told
    assert "  config.masks: whole number = 0\n" in told
    assert "config: {}" in told


@pytest.mark.parametrize("kind, name", PARTS, ids=[f"{kind}-{name}" for kind, name in PARTS])
def test_every_option_of_every_part_is_explained(kind: str, name: str) -> None:
    part = describe(kind, name)
    references = ("see ", "as in ")
    unclear = [o.name for o in part.options if not o.about or o.about.startswith(references)]
    assert unclear == []
    assert part.about
    assert (ROOT / part.file).is_file()


@pytest.mark.parametrize("kind, name", PARTS, ids=[f"{kind}-{name}" for kind, name in PARTS])
def test_the_example_of_a_part_is_accepted(kind: str, name: str) -> None:
    part = describe(kind, name)
    if kind in ("benchmarks", "importers"):
        assert name in part.example.split()
        return
    if kind == "decoders":
        check(kind, yaml.safe_load(part.example.partition("--decoding ")[2].strip("'")))
        return
    spec = yaml.safe_load(part.example)
    medium = "video"
    while "type" not in spec:
        ((medium, spec),) = spec.items() if isinstance(spec, dict) else enumerate(spec)
    if kind == "encoders":
        check_encoder(medium, spec)
    else:
        check(kind, spec)


def test_every_kind_of_part_is_chosen_somewhere() -> None:
    assert CHOSEN_IN.keys() == set(kinds())


def test_an_unknown_kind_of_parts_gets_the_nearest() -> None:
    with pytest.raises(UnknownPartError, match="'encoders'") as refused:
        parts("encoder")
    assert refused.value.reason == "unknown_kind"


def test_arguments_are_read_from_docstrings() -> None:
    doc = (
        "Do.\n\nArgs:\n    a, b: first\n        and more.\n    c: third: x.\n\nRaises:\n    d: no."
    )
    assert arguments_of(doc) == {"a": "first and more.", "b": "first and more.", "c": "third: x."}
