"""Stage 2: captioning. Next-token prediction on captions; the connector learns the LLM's language.

    python train/stage2_caption.py PRESET [key=value ...]
    accelerate launch --config_file train/launch/zero2.yaml train/stage2_caption.py PRESET ...
    torchrun --nproc_per_node 2 train/stage2_caption.py PRESET [key=value ...]

The preset says `init: RUN` (a finished stage 1, whose model it takes), what trains, on which
manifests, for how long.
"""

from avllm.training.stage_script import run_script

if __name__ == "__main__":
    run_script("caption", __doc__ or "")
