"""Stage 1: contrastive alignment. Align clip and caption embeddings.

    python train/stage1_align.py PRESET [key=value ...]
    accelerate launch --config_file train/launch/zero2.yaml train/stage1_align.py PRESET ...
    torchrun --nproc_per_node 2 train/stage1_align.py PRESET [key=value ...]

The preset describes the model (backbones, connector, layout), what trains, on which manifests and
for how long.
"""

from avllm.training.stage_script import run_script

if __name__ == "__main__":
    run_script("align", __doc__ or "")
