"""Stage 4: preferences. DPO on chosen and rejected answers trains a copy of stage 3's LoRA set.

    python train/stage4_prefer.py PRESET [key=value ...]
    accelerate launch --config_file train/launch/zero2.yaml train/stage4_prefer.py PRESET ...
    torchrun --nproc_per_node 2 train/stage4_prefer.py PRESET [key=value ...]

The preset says `init: RUN` (a finished stage 3 or 4), `lora: {name: prefer, copy_of: default}`,
what trains, the objective `dpo`, `data.rows: preference`, and manifests whose rows have `rejected`
answers.
"""

from avllm.training.stage_script import run_script

if __name__ == "__main__":
    run_script("prefer", __doc__ or "")
