"""Measure what cached features of frozen encoders save of a training step.

    python scripts/bench/cache.py [--json] [--tiny] [--steps 3] [--batch-size 2] [--threads 2]

Encoders of the sizes of SigLIP-base and Whisper-small with random weights, 8 frames a clip, a small
LLM, on the CPU. The same weights take the same steps twice, from files and from a cache. `faster`
compares the steps alone, as if workers decoded for nothing; `faster_with_decoding` also counts
decoding, in this process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.audio.frame import AudioFrame
from av.video.frame import VideoFrame

from avllm.config import RunConfig
from avllm.data.dataset import SampleDataset
from avllm.evaluation.environment import environment
from avllm.log import hush_libraries
from avllm.training.accelerator import make_accelerator
from avllm.training.features import use_cache
from avllm.training.start import Parts, build_datasets, build_parts, padding
from avllm.training.task import Task

BASE = {
    "width": 768,
    "layers": 12,
    "heads": 12,
    "inner": 3072,
    "image": 224,
    "patch": 16,
    "mels": 80,
    "steps": 1500,
}
TINY = {
    "width": 16,
    "layers": 1,
    "heads": 2,
    "inner": 32,
    "image": 32,
    "patch": 8,
    "mels": 20,
    "steps": 50,
}
LLM = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
WORDS = ["what", "is", "this", "?", "red", "green", "blue", "USER", "ASSISTANT", ":"]
RATE = 16_000  # samples a second
SECONDS = 4  # of a clip
BAR = 5.0  # times faster
SAME = 1e-5  # largest difference of losses


def make_llm(folder: Path) -> Path:
    """Return a Llama of a few million random weights and a tokenizer of ten words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), pad_token_id=0, **LLM)).save_pretrained(
        folder
    )
    return folder


def make_manifest(folder: Path, clips: int) -> Path:
    """Return clips of noise in a colour with a tone, and a question about each."""
    drawn = np.random.default_rng(0)
    rows = []
    for number in range(clips):
        colour = number % 3
        write_clip(folder / f"{number}.mp4", colour, 200.0 * (number + 1), drawn)
        asked = [
            {"type": "video", "video": f"{number}.mp4"},
            {"type": "text", "text": "what is this ?"},
        ]
        answer = [{"type": "text", "text": ("red", "green", "blue")[colour]}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"id": str(number), "messages": messages}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def write_clip(path: Path, colour: int, hertz: float, drawn: np.random.Generator) -> None:
    """H.264 and AAC, 320x240 at 10 frames a second."""
    with av.open(str(path), "w") as container:
        video, sound = (
            container.add_stream("libx264", rate=10),
            container.add_stream("aac", rate=RATE, layout="mono"),
        )
        video.width = 320
        video.height = 240
        video.pix_fmt = "yuv420p"
        for _ in range(10 * SECONDS):
            picture = drawn.integers(0, 80, (240, 320, 3), dtype=np.uint8)
            picture[..., colour] += 150
            container.mux(video.encode(VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(video.encode())
        wave = 0.3 * np.sin(2 * np.pi * hertz * np.arange(RATE * SECONDS) / RATE)
        frame = AudioFrame.from_ndarray(wave[None].astype(np.float32), "fltp", "mono")
        frame.sample_rate = RATE
        frame.pts = 0
        container.mux(sound.encode(frame))
        container.mux(sound.encode())


def stage(folder: Path, manifest: Path, size: dict[str, int], precision: str = "fp32") -> RunConfig:
    """Connector training on questions, as stage 2 and 3 do it."""
    shape = {"num_hidden_layers": size["layers"], "num_attention_heads": size["heads"]}
    eye = {"hidden_size": size["width"], "intermediate_size": size["inner"], **shape}
    eye |= {
        "model_type": "siglip_vision_model",
        "image_size": size["image"],
        "patch_size": size["patch"],
    }
    ear = {"model_type": "whisper", "d_model": size["width"], "encoder_layers": size["layers"]}
    ear |= {
        "encoder_attention_heads": size["heads"],
        "encoder_ffn_dim": size["inner"],
        "num_mel_bins": size["mels"],
    }
    ear |= {"max_source_positions": size["steps"], "decoder_layers": 1}
    return RunConfig.model_validate(
        {
            "stage": "caption",
            "init_from_scratch": True,
            "output": str(folder / "run"),
            "model": {
                "llm": {"name": str(make_llm(folder / "llm"))},
                "encoders": {
                    "video": {"type": "siglip", "config": eye},
                    "audio": {"type": "whisper", "config": ear},
                },
                "connector": [
                    {"type": "spatial_pool", "stream": "video", "factor": 2},
                    {"type": "temporal_pool", "stream": "audio", "seconds": 0.5},
                    {"type": "mlp", "stream": "video"},
                    {"type": "mlp", "stream": "audio"},
                ],
                "sampling": {"num_frames": 8},
            },
            "trainable": [["^connector", 1e-3], [".*", None]],
            "objectives": [{"type": "next_token"}],
            "data": {"train": str(manifest), "num_workers": 0, "cache": str(folder / "cache")},
            "train": {"epochs": 1, "trackers": [], "precision": precision},
        }
    )


def epoch(
    parts: Parts, task: Task, dataset: SampleDataset, batch_size: int
) -> dict[str, list[float]]:
    """Train on all rows once, from the same weights each time.

    Returns:
        the losses, and the seconds of reading and of each step.
    """
    collate = padding(parts, blanks=False)
    before = {n: p.detach().clone() for n, p in parts.model.connector.named_parameters()}
    optimizer = torch.optim.AdamW(parts.model.connector.parameters(), lr=1e-3)
    measured: dict[str, list[float]] = {"losses": [], "reading": [], "steps": []}
    for first in range(0, len(dataset), batch_size):
        began = time.perf_counter()
        (micro,) = collate(
            [dataset[i] for i in range(first, min(first + batch_size, len(dataset)))]
        )
        read = time.perf_counter()
        losses, _ = task(micro.batch)
        loss = losses["next_token"] / micro.batch.num_targets
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        measured["losses"].append(float(loss.detach()))
        measured["reading"].append(read - began)
        measured["steps"].append(time.perf_counter() - read)
    for name, p in parts.model.connector.named_parameters():
        p.data.copy_(before[name])
    return measured


def measure(folder: Path, size: dict[str, int], steps: int, batch_size: int) -> dict[str, Any]:
    """Measure steps from files and from the cache, and what bfloat16 changes in the losses."""
    config = stage(folder, make_manifest(folder, steps * batch_size), size)
    accelerator = make_accelerator(config, Path(config.output))
    torch.manual_seed(0)
    parts = build_parts(config)
    parts.model.connector.requires_grad_(True)
    task = Task(parts.model, config.objectives)
    dataset, _ = build_datasets(config, parts)
    epoch(parts, task, dataset, batch_size)  # warms up
    plain = epoch(parts, task, dataset, batch_size)
    began = time.perf_counter()
    use_cache(config, parts, dataset, None, accelerator)
    filling = time.perf_counter() - began
    cached = epoch(parts, task, dataset, batch_size)
    config.data.cache_dtype = "bfloat16"
    use_cache(config, parts, dataset, None, accelerator)
    halved = epoch(parts, task, dataset, batch_size)

    def apart(other: dict[str, list[float]]) -> float:
        return max(abs(a - b) for a, b in zip(plain["losses"], other["losses"], strict=True))

    def seconds(of: dict[str, list[float]], *kinds: str) -> float:
        return statistics.median(map(sum, zip(*(of[k] for k in kinds), strict=True)))

    return {
        "faster": round(seconds(plain, "steps") / seconds(cached, "steps"), 2),
        "faster_with_decoding": round(
            seconds(plain, "steps", "reading") / seconds(cached, "steps", "reading"), 2
        ),
        "bar": BAR,
        "loss_difference": apart(cached),
        "loss_difference_bar": SAME,
        "loss_difference_bfloat16": apart(halved),
        "step_seconds": {
            "files": round(seconds(plain, "steps"), 4),
            "cache": round(seconds(cached, "steps"), 4),
        },
        "reading_seconds": {
            "files": round(seconds(plain, "reading"), 4),
            "cache": round(seconds(cached, "reading"), 4),
        },
        "filling_seconds": round(filling, 3),
        "steps": steps,
        "batch": batch_size,
        "frames": 8,
    }


def main() -> None:
    """Measure, with the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="encoders of a few thousand weights, to see that it runs",
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument(
        "--threads", type=int, default=None, help="of torch; as it finds them when not given"
    )
    arguments = parser.parse_args()
    hush_libraries()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        size = TINY if arguments.tiny else BASE
        figures = measure(Path(folder), size, arguments.steps, arguments.batch_size)
    took = figures["step_seconds"]
    steps = f"a step {took['files']} s from files, {took['cache']} s from the cache"
    print(f"{steps}: {figures['faster']} times (bar {BAR})")
    halved = figures["loss_difference_bfloat16"]
    print(f"losses differ by {figures['loss_difference']:.1e}, with bfloat16 by {halved:.1e}")
    if arguments.json:
        print(json.dumps({**figures, "environment": environment()}))


if __name__ == "__main__":
    main()
