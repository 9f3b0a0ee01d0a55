"""Run the command line that the stage scripts in ``train/`` share."""

from __future__ import annotations

import argparse

from avllm.config import Stage, load_config
from avllm.config_errors import ConfigError
from avllm.errors import exit_on_user_error
from avllm.log import hush_libraries
from avllm.training.trainer import run_stage


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
    hush_libraries()
    with exit_on_user_error():
        config = load_config(args.preset, args.overrides)
        if config.stage != stage:
            raise ConfigError(
                f"{args.preset} is a preset of stage {config.stage}; this script trains stage "
                f"{stage}. Give a preset of that stage, or run the other script"
            )
        print(run_stage(config))
