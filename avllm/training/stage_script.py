"""Run the command line that the stage scripts in ``train/`` share, and presets one by one.

Nothing heavy is imported before the presets are read: a misspelt setting is refused in a second.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from avllm.config import RunConfig, Stage, load_config
from avllm.config_errors import ConfigError, PresetPlaces
from avllm.errors import exit_on_user_error, looked_in
from avllm.yaml_files import read_mapping

STAGES: tuple[str, ...] = get_args(Stage)
OWN_KEYS = ("output", "init", "stage")
"""Settings that no two stages share."""


@dataclass(frozen=True)
class Preset:
    """Hold the settings of a stage with the file and the overrides that they come from."""

    path: Path
    overrides: list[str]
    config: RunConfig

    def train(self) -> Path:
        """Train the stage, and return the run's folder; see :func:`~.trainer.run_stage`."""
        from avllm.log import hush_libraries

        hush_libraries()  # before the libraries are imported
        from avllm.training.trainer import run_stage

        with PresetPlaces(self.path, self.overrides).named():
            return run_stage(self.config)


def run_script(stage: Stage, about: str) -> None:
    """Read a preset and overrides from the command line, train, and print the run's folder.

    Args:
        stage: the stage that the script trains; a preset of another stage is refused.
        about: the help text.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", help="a YAML file, e.g. one of train/presets/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. train.max_steps=100 output=runs/x"
    )
    args = parser.parse_args()
    with exit_on_user_error():
        config = load_config(args.preset, args.overrides)
        if config.stage != stage:
            raise ConfigError(
                f"{args.preset} is a preset of stage {config.stage}; this script trains stage "
                f"{stage}. Give a preset of that stage, or run the other script"
            )
        print(Preset(Path(args.preset), args.overrides, config).train())


def read_presets(words: Sequence[str], only: Sequence[str] = ()) -> list[Preset]:
    """Read the presets of a command line, with their overrides, in the order in which they train.

    Args:
        words: preset files or folders of them, and ``key=value`` for every stage or
            ``STAGE.key=value`` for one. The files of a folder are sorted by name.
        only: names of stages; the others are left out. Empty for all.

    Raises:
        ConfigError: no preset, a setting that is wrong in any of them, or a setting for several
            stages that only one can have.
    """
    files = [file for word in words if "=" not in word for file in _files_of(Path(word))]
    if not files:
        raise ConfigError("no preset is given; expected a YAML file, or a folder of them")
    written = {file: read_mapping(file, "a preset", ConfigError) for file in files}
    present = [settings.get("stage") for settings in written.values()]
    for name in only:
        if name not in present:
            raise ConfigError(f"no preset is of stage {name}; there are {present}")
    chosen = [file for file in files if not only or written[file].get("stage") in only]
    given = [word for word in words if "=" in word]
    if len(files) > 1:
        _check_stages(given, [written[file].get("stage") for file in chosen])
    presets = []
    for file in chosen:
        overrides = given
        if len(files) > 1:
            overrides = _overrides_of(written[file], given, is_alone=len(chosen) == 1)
        presets.append(Preset(file, overrides, load_config(file, overrides)))
    _check_chain(presets)
    return presets


def _files_of(path: Path) -> list[Path]:
    """Return the presets of a folder by name, or the file."""
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.yaml"))
    if not files:
        raise ConfigError(f"{path} holds no preset; expected files NAME.yaml{looked_in(path)}")
    return files


def _check_stages(words: Sequence[str], stages: Sequence[Any]) -> None:
    """Refuse ``STAGE.key=value`` for a stage that is not trained: it would change nothing.

    Raises:
        ConfigError: names the stages.
    """
    for word in words:
        stage = word.partition(".")[0]
        if stage in STAGES and stage not in stages:
            raise ConfigError(
                f"{word!r} is for stage {stage}, and the stages that train are {stages}; leave it "
                "out, or name one of them"
            )


def _overrides_of(written: Mapping[str, Any], words: Sequence[str], is_alone: bool) -> list[str]:
    """Return the ``key=value`` that are meant for one of several stages.

    Args:
        written: the stage's preset.
        words: of the command line.
        is_alone: no other stage trains.

    Raises:
        ConfigError: a key that stages cannot share.
    """
    stage = written.get("stage")
    overrides = []
    for word in words:
        first, _, rest = word.partition(".")
        key = word.partition("=")[0]
        if first == stage:
            overrides.append(rest)
        elif is_alone:
            overrides.append(word)
        elif first in STAGES or (first == "model" and "init" in written):
            continue  # for another stage
        elif key in OWN_KEYS:
            raise ConfigError(
                f"{word!r} is given for several stages, each of which has another {key}; name the "
                f"stage, as in {stage}.{word}, or choose one with --only {stage}"
            )
        else:
            overrides.append(word)
    return overrides


def _check_chain(presets: Sequence[Preset]) -> None:
    """Refuse a stage that would start from a run that neither exists nor is trained before it.

    Raises:
        ConfigError: names the preset and its ``init``.
    """
    outputs: list[Path] = []
    for preset in presets:
        init = preset.config.init
        if init is not None and not Path(init).exists() and not _is_within(init, outputs):
            places = PresetPlaces(preset.path, preset.overrides)
            raise ConfigError(
                places.label(
                    "init",
                    f"init: {init} is not there{looked_in(init)}, and no stage before this one "
                    f"writes it; they write {', '.join(map(str, outputs)) or 'nothing'}",
                )
            )
        outputs.append(Path(preset.config.output).absolute())


def _is_within(folder: str, outputs: Sequence[Path]) -> bool:
    """Return whether a folder is one of the outputs, or within one, as ``best/`` is."""
    path = Path(folder).absolute()
    return any(path.is_relative_to(output) for output in outputs)
