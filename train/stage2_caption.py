"""Stage 2: captioning. Next-token prediction on captions; the connector learns to speak the LLM's language.

    python train/stage2_caption.py PRESET [key=value ...]
    accelerate launch --config_file train/launch/zero2.yaml train/stage2_caption.py PRESET [key=value ...]
    torchrun --nproc_per_node 2 train/stage2_caption.py PRESET [key=value ...]

The preset says `init: RUN` (a finished stage 1, whose model it takes), what trains, on which manifests, for how long.
"""

import argparse

from avllm.config import ConfigError, load_config
from avllm.errors import exit_on_user_error
from avllm.training.trainer import run_stage


def main() -> None:
    """Read the preset, apply overrides, train, and print the run's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", help="a YAML file, e.g. one of train/presets/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.max_steps=100 output=runs/x")
    args = parser.parse_args()
    with exit_on_user_error():
        config = load_config(args.preset, args.overrides)
        if config.stage != "caption":
            raise ConfigError(f"{args.preset} is a preset of stage {config.stage}; this script trains stage caption")
        print(run_stage(config))


if __name__ == "__main__":
    main()
