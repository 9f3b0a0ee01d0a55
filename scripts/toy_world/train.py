"""Train several stages in one process, so that libraries load once; see quickstart.py.

    torchrun --nproc_per_node 2 scripts/toy_world/train.py SECONDS PRESET...

As the scripts in train/, one after the other. The presets are written for two processes; a single
one takes twice the micro-steps and gets the same steps. SECONDS is a JSON file in which the time of
each stage is added up. A finished stage is skipped, an interrupted one goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch.distributed as dist

from avllm.config import load_config
from avllm.precision import training_attention
from avllm.training.trainer import run_stage


def main() -> None:
    """Run the presets in order."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seconds", type=Path, help="JSON file for the time of each stage")
    parser.add_argument("presets", nargs="+", type=Path)
    args = parser.parse_args()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        dist.init_process_group("gloo")  # one group for all stages
    for preset in args.presets:
        began = time.perf_counter()
        config = load_config(preset)
        changes = []
        if processes == 1:
            changes.append(f"train.accumulate={2 * config.train.accumulate}")
        if config.model is not None:  # later stages have it from the first
            changes.append(f"model.llm.attention={training_attention('cpu')}")
        config = load_config(preset, changes)
        run_stage(config)
        if os.environ.get("RANK", "0") == "0":
            spent = json.loads(args.seconds.read_text()) if args.seconds.is_file() else {}
            name = Path(config.output).name
            spent[name] = round(spent.get(name, 0.0) + time.perf_counter() - began, 1)
            args.seconds.write_text(json.dumps(spent))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
