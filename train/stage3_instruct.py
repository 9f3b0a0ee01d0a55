"""Stage 3: instructions. Next-token prediction on answers; connector and LoRA adapters train.

    python train/stage3_instruct.py PRESET [key=value ...]
    accelerate launch --config_file train/launch/zero2.yaml train/stage3_instruct.py PRESET ...
    torchrun --nproc_per_node 2 train/stage3_instruct.py PRESET [key=value ...]

The preset says `init: RUN` (a finished stage 2 or 3), what trains (`lora:` adds adapters), and the
manifests.
"""

from avllm.training.stage_script import run_script

if __name__ == "__main__":
    run_script("instruct", __doc__ or "")
